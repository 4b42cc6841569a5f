"""The fused network inside what shards, averages or adapts it, in two processes where that takes two."""

from __future__ import annotations

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from fastunet import UNet, reference
from tests.processes import ended, start_group


def built(kind):
    torch.manual_seed(0)
    return kind(width=4, depth=2, dropout=0.0)


def in_a_group(train) -> None:
    """What ``train`` does with this process's half of the images, and the gradients of the plain build for all."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(1)
    images = torch.randn(4, 2, 16, 12)
    plain = built(reference.UNet)
    plain(images).square().mean().backward()
    for found in train(images[2 * rank : 2 * rank + 2]):
        expected = {name: p.grad for name, p in plain.named_parameters()}
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    dist.destroy_process_group()


def data_parallel(mine):
    for option in ("gradient_as_bucket_view", "static_graph", "find_unused_parameters"):
        model = nn.parallel.DistributedDataParallel(built(UNet), **{option: True})
        for _ in range(2):
            model.zero_grad(set_to_none=True)
            model(mine).square().mean().backward()
        yield {name: p.grad for name, p in model.module.named_parameters()}


def fully_sharded(mine):
    """FSDP2, block by block."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (2,))
    model = built(UNet)
    for block in (*model.encoders, model.bottleneck, *model.decoders, model.head):
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(mine).square().mean().backward()
    yield {name: p.grad.full_tensor() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    before = model(mine).square().mean().item()
    optimiser.step()
    assert model(mine).square().mean().item() < before


@pytest.mark.parametrize("train", [data_parallel, fully_sharded])
def test_two_processes_train_as_the_plain_build_does(train, tmp_path):
    group = start_group(in_a_group, train, told=tmp_path / "told")
    assert [ended(process) for process in group] == [0, 0], (tmp_path / "told0.err").read_text()[-3000:]


def test_lora_of_peft_moves_the_output_and_learns():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    x, found = torch.randn(2, 2, 16, 16), []
    for build in (reference.UNet, UNet):
        torch.manual_seed(0)
        model = build(width=4, depth=2, dropout=0.0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            config = peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False)
            adapted = peft.get_peft_model(model, config)
            y = adapted(x)
            y.square().mean().backward()
            gradients = [p.grad for p in adapted.parameters() if p.requires_grad]
            merged = adapted.merge_and_unload()(x)
        found.append((y.detach(), gradients, merged.detach()))
    (want, want_gradients, _), (got, gradients, merged) = found
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(merged, want, rtol=1e-3, atol=1e-4)
    assert len(gradients) == len(want_gradients) > 0
    torch.testing.assert_close(gradients, want_gradients, rtol=1e-3, atol=1e-5)


def test_quantisation_aware_training_observes_every_layer():
    quantization = pytest.importorskip("torch.ao.quantization", reason="this PyTorch has no torch.ao")
    x, found = torch.randn(2, 2, 16, 16), []
    for build in (reference.UNet, UNet):
        torch.manual_seed(0)
        model = build(width=4, depth=2, dropout=0.0).train()
        model.qconfig = quantization.get_default_qat_qconfig("x86")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            prepared = quantization.prepare_qat(model)
            y = prepared(x)
            y.square().mean().backward()
        scales = {k: v for k, v in prepared.state_dict().items() if "activation_post_process.min_val" in k}
        found.append((y.detach(), scales, [p.grad for p in prepared.parameters()]))
    (want, want_scales, want_gradients), (got, scales, gradients) = found
    assert scales.keys() == want_scales.keys() != set()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradients, want_gradients, rtol=1e-3, atol=1e-5)
