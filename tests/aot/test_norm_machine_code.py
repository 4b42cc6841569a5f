"""The norm kernels compiled for GPUs that need not be there: whole-vector loads and stores, no spills."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")

from fastunet.inspection.machine_code import compile_launch, inspect
from fastunet.kernels import _launch
from fastunet.kernels.norm import backward, forward, statistics

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter has no machine code")

QUICK = [(90, torch.bfloat16, 64), (90, torch.float32, 24), (80, torch.bfloat16, 32), (100, torch.bfloat16, 512)]
ALL = [(a, d, c) for a in (80, 90, 100) for d in (torch.float32, torch.bfloat16) for c in (16, 24, 32, 64, 320, 512)]


def launches(architecture, dtype, c):
    """Instance norm with LeakyReLU and pool, forward and backward with both gradients."""
    z, pooled = (
        torch.empty(4, c, side, side, dtype=dtype, device="meta", memory_format=torch.channels_last)
        for side in (240, 120)
    )
    affine = torch.empty(c, device="meta")
    with _launch.recording(architecture) as found:
        mean, var = statistics.statistics(z, c, True)
        forward.normalise(z, mean, var, affine, affine, 1e-5, 0.01, True)
        backward.backward(z, pooled, z, affine, affine, mean, var, mean, 1e-5, 0.01, "")
    return [launch for launch in found if launch.kernel.__name__.startswith("norm_")]


@pytest.mark.parametrize("architecture, dtype, c", sorted({*QUICK, *ALL}, key=str))
def test_machine_code(architecture, dtype, c, request):
    if (architecture, dtype, c) not in QUICK and not request.config.getoption("--full", default=False):
        pytest.skip("compiled with --full")
    found = {launch.kernel.__name__: launch for launch in launches(architecture, dtype, c)}
    assert len(found) == 6
    for name, launch in found.items():
        report = inspect(compile_launch(launch, architecture), architecture)
        text = f"{name}: {report.registers} registers, {dict(report.opcodes)}"
        assert (report.stack, report.spills) == (0, 0), text
        images = {"norm_statistics_kernel": (1, 0), "norm_forward_kernel": (4, 5), "norm_sums_kernel": (9, 0),
                  "norm_data_grad_kernel": (9, 4)}.get(name)  # fmt: skip
        if images:
            assert report.count("LDG.E.128") >= images[0], text
            assert report.count("STG.E.128") == images[1], text
