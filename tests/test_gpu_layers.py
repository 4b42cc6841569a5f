"""On a GPU: every operator call of the presets at its real shape, in every dtype, against float64."""

from __future__ import annotations

import contextlib
import dataclasses

import pytest
import torch

pytest.importorskip("triton")

from fastunet.inspection.layers import CASES, NORM_CASES, Call, network_calls, standalone_calls
from fastunet.inspection.tuning import tensors
from fastunet.kernels import _launch, _tuned
from tests.tolerance import assert_within_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available() or _launch.INTERPRETED, reason="no CUDA device"),
]

MODES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}


def calls(name: str) -> list[Call]:
    """The different operator calls of a network; one image where it is large, else two."""
    network, (height, width) = (CASES | NORM_CASES)[name]
    batch = 1 if height > 500 else 2
    found = network_calls(network, batch, height, width)
    for output in ("probabilities", "logits"):
        found += network_calls(network, batch, height, width, training=False, output=output)
    found += standalone_calls(network, batch, height, width)
    return list({f"{call.operator} {call.arguments}": call for call in reversed(found)}.values())[::-1]


@contextlib.contextmanager
def products(mode: str):
    previous = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = mode != "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = previous


def check(call: Call, dtype: torch.dtype, repeats: int, device: str = "cuda") -> None:
    """Within the error budget, every element written, and ``repeats`` times the same bits."""
    operands = call.random(dtype, device)
    with _launch.poisoned():
        results = tensors(call.launcher()(*operands))
    same, exact = call.reference(operands), call.reference(operands, torch.float64)
    for i, (result, like, reference) in enumerate(zip(results, same, exact, strict=True)):
        name = f"{call.layer} {call.operator} result {i}"
        if result.is_floating_point():
            assert_within_budget(result, like, reference, name)
        else:
            assert torch.equal(result, reference.to(result.dtype)), name
    for _ in range(repeats):
        for again, first in zip(tensors(call.launcher()(*operands)), results, strict=True):
            assert torch.equal(again, first), f"{call.layer} {call.operator} differs between repeats"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", [*CASES, *NORM_CASES])
def test_every_layer(name, mode):
    with products(mode):
        failures = []
        for call in calls(name):
            try:
                check(call, MODES[mode], repeats=10 if name == "brats 128" else 1)
            except AssertionError as error:
                failures.append(str(error))
        assert not failures, "\n".join(failures)


@pytest.mark.parametrize("warps", [4, 8])
def test_every_layer_with_other_warps(warps):
    """The heuristic's tile with 4 and with 8 warps; flattened loops have been miscompiled for one of them before."""
    failures = []
    for call in calls("brats 128"):
        with _launch.recording(_launch.architecture()), _tuned.asking() as asked:
            call.launcher()(*call.allocate(torch.bfloat16))
        with contextlib.ExitStack() as stack:
            for entry, starts in asked.items():
                stack.enter_context(_tuned.forcing(entry, dataclasses.replace(starts[0], num_warps=warps)))
            try:
                check(call, torch.bfloat16, repeats=1)
            except AssertionError as error:
                failures.append(str(error))
    assert not failures, "\n".join(failures)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_properties(0).total_memory < 40 * 2**30,
                    reason="less than 40 GiB of GPU memory")  # fmt: skip
@pytest.mark.parametrize("operator", ["conv_relu", "conv_relu_data_grad", "max_pool2d", "relu_backward"])
def test_tensors_beyond_two_to_the_31_elements(operator):
    """65 images of 512² × 128 are 2³¹ + 2²⁵ elements; the last image must equal that image alone."""
    x = torch.zeros(65, 128, 512, 512, dtype=torch.bfloat16, device="cuda").to(memory_format=torch.channels_last)
    x[-1].normal_()
    weight = torch.randn(128, 128, 3, 3, dtype=torch.bfloat16, device="cuda") / 34

    def run(x):
        ops = torch.ops.fastunet
        if operator == "conv_relu":
            return ops.conv_relu(x, None, weight, None, 1, 0.0, "triton")
        if operator == "conv_relu_data_grad":
            return ops.conv_relu_data_grad(x, weight, x, None, 1, True, False, "triton")[0]
        return ops.max_pool2d(x, "triton") if operator == "max_pool2d" else ops.relu_backward(x, x, 0.0, "triton")

    alone = run(x[-1:].clone(memory_format=torch.channels_last))
    # another batch may choose another tile, whose sums round otherwise
    torch.testing.assert_close(run(x)[-1:], alone, rtol=0, atol=2 * torch.finfo(x.dtype).eps * alone.abs().max().item())
    assert alone.abs().max() > 0
