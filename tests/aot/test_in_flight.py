"""No kernel touches registers of a Hopper product in flight, by PTX and by SASS; and the check can fail.

Every shipped kernel is checked by test_machine_code.py, as part of ``failures``.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fastunet.inspection.disassembly import sass
from fastunet.inspection.in_flight import parse_ptx, touched
from fastunet.inspection.machine_code import compile_launch, failures, inspect_all
from fastunet.kernels import _launch
from fastunet.kernels.conv.weight_grad import weight_grad
from fastunet.kernels.conv.weight_grad_config import WeightGradConfig
from tests.aot.selection import BEFORE_3_8

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter has no machine code")

PTX = """
.visible .entry kernel()
{
	mov.b32 %r9, 0;
$L__BB0_1:
	ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9];
	// begin inline asm
	wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%f1,%f2,%f3,%f4}, {%r1,%r2,%r3,%r4}, %rd1, p, 1, 1;
	// end inline asm
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 1;
	{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared.b64 complete, [%r9], 0;
	@!complete bra.uni waitLoop;
	}
	@%p1 bra $L__BB0_1;
	wgmma.wait_group.sync.aligned 0;
	{
	.reg .pred complete;
	waitLoop:
	mbarrier.try_wait.parity.shared.b64 complete, [%r9], 0;
	@!complete bra.uni waitLoop;
	}
	st.global.b32 [%rd2], %f1;
	ret;
}
"""
LOAD, STORE = "ld.shared.v4.b32 {%r1, %r2, %r3, %r4}, [%r9]", "st.global.b32 [%rd2], %f1"


@pytest.mark.parametrize("before, after, found", [
    ("", "", [LOAD]),
    ("wait_group.sync.aligned 1", "wait_group.sync.aligned 0", []),
    ("{%r1,%r2,%r3,%r4}, %rd1", "%rd3, %rd1", []),
    ("\twgmma.wait_group.sync.aligned 0;\n", "", [LOAD, STORE]),
], ids=["operand", "waited for", "from shared memory", "sums"])  # fmt: skip
def test_ptx(before, after, found):
    assert touched(parse_ptx(PTX.replace(before, after) if before else PTX), "ptx") == found


SASS = [
    "LDS.128 R4, [R2]",
    "HGMMA.64x8x8.F32.TF32 R24, R4, gdesc[UR4], R24, gsb0",
    "LDS.64 R8, [R2+0x10]",
    "WARPGROUP.DEPBAR.LE gsb0, {left}",
    "LDS.64 R6, [R2]",
    "@P0 BRA 0x10",
    "EXIT",
]


@pytest.mark.parametrize("left, found", [("0x1", ["LDS.64 R6, [R2]"]), ("0x0", [])], ids=["one left", "none left"])
def test_sass(left, found):
    lines = [(16 * i, text.format(left=left)) for i, text in enumerate(SASS)]
    assert touched(sass(lines), "sass") == found


def launches(c_in, c_out, config):
    """The weight gradient's products of tf32 images."""
    x, dz = (torch.empty(2, c, 32, 32, device="meta").to(memory_format=torch.channels_last) for c in (c_in, c_out))
    with _launch.recording(90) as records:
        weight_grad(dz, x, None, 1, True, config)
    return [launch for launch in records if "PRECISION" in launch.args]


@pytest.fixture
def tf32():
    previous, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, True
    yield
    torch.backends.cudnn.allow_tf32 = previous


CONFIGS = {
    "first": (2, 32, WeightGradConfig("first", 16, 64, 64)),
    "first of 8 warps": (4, 32, WeightGradConfig("first", 32, 64, 64, num_warps=8)),
    "4": (4, 32, None),
    "33": (33, 100, None),
    "pointer": (64, 64, WeightGradConfig("pointer", 64, 64, 16, block_h=2)),
}
QUICK = {"first of 8 warps", "33", "pointer"} if BEFORE_3_8 else {"first of 8 warps", "33"}


@pytest.mark.parametrize("name", CONFIGS)
def test_tf32_weight_gradients(name, tf32, request):
    """As they are launched they are right; with the stages of other dtypes, Triton before 3.8 gets them wrong."""
    if name not in QUICK and not request.config.getoption("--full", default=False):
        pytest.skip("compiled with --full")
    c_in, c_out, config = CONFIGS[name]
    found = launches(c_in, c_out, config)
    staged = [replace(launch, args=launch.args | {"STAGES": 3}, num_stages=3) for launch in found]
    reports = inspect_all([compile_launch(launch, 90) for launch in [*found, *staged]], 90)
    for launch, report in zip(found, reports):
        assert launch.num_stages == launch.args["STAGES"] == 1
        assert not report.touched
    for launch, report in zip(staged, reports[len(found) :]):
        assert bool(report.touched) == BEFORE_3_8
        assert any("product in flight" in failure for failure in failures(report, launch)) == BEFORE_3_8
