"""The norm kernels, and convolutions with statistics, compiled for GPUs that need not be there: whole-vector loads and
stores, no spills, no launch too many."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")

from fastunet.inspection.machine_code import compile_launch, inspect_all
from fastunet.kernels import _launch
from fastunet.kernels.norm import backward, forward, statistics
from tests.aot.selection import BEFORE_3_8

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter has no machine code")

QUICK = [(90, torch.bfloat16, 64), (80, torch.float32, 24)]
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


REST = ["norm_merge_kernel", "norm_forward_kernel"]
CONVOLUTIONS = [
    (90, torch.bfloat16, (16, 32, 32, 240), ["conv_relu_rows_kernel", *REST]),
    (90, torch.bfloat16, (16, 1, 32, 240), ["conv_relu_first_kernel", *REST]),
    (90, torch.bfloat16, (16, 256, 256, 30), ["conv_relu_box_kernel", *REST]),
    (90, torch.bfloat16, (16, 512, 512, 8), ["conv_relu_box_split_kernel", "conv_relu_join_kernel", *REST]),
    (80, torch.bfloat16, (16, 32, 32, 240), ["conv_relu_pointer_kernel", *REST]),
    (80, torch.bfloat16, (16, 64, 64, 120), ["conv_relu_pointer_kernel", "norm_statistics_kernel", *REST]),
    (90, torch.float32, (2, 32, 32, 64), ["conv_relu_rows_kernel", *REST]),
    (100, torch.bfloat16, (16, 64, 64, 120), ["conv_relu_rows_kernel", *REST]),
]
"""(architecture, dtype, (N, C_in, C_out, side), kernels of instance norm); 120² is no multiple of a tile of 128 pixels,
which then would hold two images."""


def convolution_launches(architecture, dtype, n, c_in, c_out, side):
    image = torch.channels_last
    x = torch.empty(n, c_in, side, side, dtype=dtype, device="meta", memory_format=image)
    weight = torch.empty(c_out, c_in, 3, 3, dtype=dtype, device="meta", memory_format=image)
    affine = torch.empty(c_out, device="meta")
    with _launch.recording(architecture) as found:
        forward.forward(
            x, None, weight, affine.to(dtype), affine, affine, 1, 1, c_out, True, 1e-5, 0.01, True, ""
        )  # fmt: skip
    return found


@pytest.mark.parametrize("size, megabytes", [((16, 32, 32, 240), 2.6), ((16, 512, 512, 8), 0.3)])
def test_statistics_written_and_read(size, megabytes):
    """Of tiles of the convolution, four numbers a channel."""
    (merge,) = (
        launch
        for launch in convolution_launches(90, torch.bfloat16, *size)
        if launch.kernel.__name__ == "norm_merge_kernel"
    )
    assert round(2 * merge.args["partial_ptr"].nbytes / 1e6, 1) == megabytes


@pytest.mark.parametrize("architecture", [pytest.param(80, marks=pytest.mark.slow), 90, 100])
def test_a_convolution_with_its_norm(architecture, request):
    """Which kernels, and the convolution's code; with ``--full`` that of all."""
    full, found = request.config.getoption("--full", default=False), []
    for _, dtype, size, kernels in (case for case in CONVOLUTIONS if case[0] == architecture):
        made = convolution_launches(architecture, dtype, *size)
        assert [launch.kernel.__name__ for launch in made] == kernels
        found += [launch for launch in made if full or not launch.kernel.__name__.startswith("norm_")]
    if not full and (architecture == 100 or (BEFORE_3_8 and architecture != 90)):
        pytest.skip("compiled with --full")
    for report in inspect_all([compile_launch(launch, architecture) for launch in found], architecture):
        assert (report.stack, report.spills) == (0, 0), f"{report.kernel}: {report.registers} registers"
        assert not report.touched


@pytest.mark.usefixtures("newest_unless_full")
@pytest.mark.parametrize("architecture, dtype, c", sorted({*QUICK, *ALL}, key=str))
def test_machine_code(architecture, dtype, c, request):
    if (architecture, dtype, c) not in QUICK and not request.config.getoption("--full", default=False):
        pytest.skip("compiled with --full")
    found = {launch.kernel.__name__: launch for launch in launches(architecture, dtype, c)}
    assert len(found) == 6
    for report in inspect_all([compile_launch(launch, architecture) for launch in found.values()], architecture):
        text = f"{report.kernel}: {report.registers} registers, {dict(report.opcodes)}"
        assert (report.stack, report.spills) == (0, 0), text
        images = {"norm_statistics_kernel": (1, 0), "norm_forward_kernel": (4, 5), "norm_sums_kernel": (9, 0),
                  "norm_data_grad_kernel": (9, 4)}.get(report.kernel)  # fmt: skip
        if images:
            assert report.count("LDG.E.128") >= images[0], text
            assert report.count("STG.E.128") == images[1], text
