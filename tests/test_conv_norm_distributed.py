"""Batch norm over two gloo processes with unequal batches against one process with all of it."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from fastunet.functional import conv_norm
from tests.processes import ended, start_group

pytestmark = pytest.mark.skipif(not dist.is_gloo_available(), reason="this PyTorch is built without gloo")


def tensors():
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 2, 5, 6), (3, 2, 3, 3), (3,), (3,), (4, 3, 5, 6), (4, 3, 2, 3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def measured(samples, process_group):
    """Results, gradients of the input and of the parameters, and running statistics."""
    x, weight, norm_weight, norm_bias, dy, d_pooled = tensors()
    x, dy, d_pooled = x[samples], dy[samples], d_pooled[samples]
    leaves = [t.requires_grad_() for t in (x, weight, norm_weight, norm_bias)]
    running = torch.zeros(3, dtype=torch.float64), torch.ones(3, dtype=torch.float64)
    outputs = conv_norm(
        x, weight, norm_weight=norm_weight, norm_bias=norm_bias, running_mean=running[0], running_var=running[1],
        slope=0.1, pool=True, process_group=process_group,
    )  # fmt: skip
    dx, *d_parameters = torch.autograd.grad(outputs, leaves, [dy, d_pooled])
    return [t.detach() for t in (*outputs, dx)], d_parameters, list(running)


def work(folder):
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    samples = slice(0, 1) if rank == 0 else slice(1, 4)
    torch.save(measured(samples, dist.group.WORLD), f"{folder}/{rank}.pt")
    x, weight = (t.requires_grad_() for t in tensors()[:2])
    y = conv_norm(x[samples], weight, process_group=dist.group.WORLD)
    (gradient,) = torch.autograd.grad(y.square().sum(), weight, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivatives of a norm over several processes"):
        gradient.sum().backward()
    dist.destroy_process_group()


def test_two_processes_equal_one(tmp_path):
    assert [ended(process) for process in start_group(work, tmp_path)] == [0, 0]
    of_samples, d_parameters, running = measured(slice(0, 4), None)
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for a, b, wanted in zip(first[0], second[0], of_samples, strict=True):
        torch.testing.assert_close(torch.cat([a, b]), wanted, rtol=1e-10, atol=1e-10)
    for a, b, wanted in zip(first[1], second[1], d_parameters, strict=True):
        torch.testing.assert_close(a + b, wanted, rtol=1e-10, atol=1e-10)
    for each in (first, second):
        for found, wanted in zip(each[2], running, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
