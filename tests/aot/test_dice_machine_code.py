"""The Dice kernels compiled for GPUs that need not be there: whole-vector loads and stores, no spills.

By default sm_90 for 4 and 100 classes in channels-last bfloat16 and in planes of float32, for 3 in bfloat16, and with
class weights 4 classes once for each architecture; ``--full`` takes all.
"""

import pytest
import torch

pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")

from fastunet.inspection.machine_code import compile_launch, failures, inspect, inspect_all
from fastunet.kernels import _launch
from fastunet.kernels.dice import confusion as dice_confusion
from fastunet.kernels.dice import regions as dice_regions
from fastunet.kernels.dice import rule as dice_rule
from fastunet.kernels.dice import sums as dice

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter has no machine code")

PIXELS = 240 * 240
NHWC, NCHW = ("NHWC", torch.bfloat16), ("NCHW", torch.float32)
QUICK = {(90, c, *usual, False) for c in (4, 100) for usual in (NHWC, NCHW)} | {(90, 3, *NHWC, False)}
QUICK |= {(90, 4, *NHWC, True), (80, 4, *NCHW, True), (100, 4, *NHWC, True)}
"""What is compiled without ``--full``: (architecture, classes, layout, dtype, weighted)."""
ALL = [(architecture, c) for architecture in (80, 90, 100) for c in (1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 100, 128)]


def launches(c, layout, dtype, architecture, weighted):
    """Forward, backward and confusion counts of a batch, with class weights and an ignored label or neither."""
    if layout == "NCHW":
        logits = torch.empty(4, c, PIXELS, dtype=dtype, device="meta")
    else:
        logits = torch.empty(4, PIXELS, c, dtype=dtype, device="meta").transpose(1, 2)
    labels = torch.empty(4, PIXELS, dtype=torch.uint8, device="meta")
    weights, ignored = (torch.empty(max(c, 2), device="meta"), 255) if weighted else (None, None)
    grad, slopes = torch.empty((), device="meta"), torch.empty(1, 3 * c + 3, device="meta")
    with _launch.recording(architecture) as found:
        dice.sums(logits, labels, weights, ignored, True, False)
        dice.sums_grad(grad, slopes, logits, labels, weights, ignored, True)
        dice_confusion.confusion(logits, labels, max(c, 2), ignored)
    return [launch for launch in found if "dice" in launch.kernel.__name__ or "confusion" in launch.kernel.__name__]


@pytest.mark.usefixtures("newest_unless_full")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("architecture, c", ALL)
def test_machine_code(architecture, c, layout, dtype, request):
    full = request.config.getoption("--full", default=False)
    wanted = [weighted for weighted in (False, True) if full or (architecture, c, layout, dtype, weighted) in QUICK]
    if not wanted:
        pytest.skip("compiled with --full")
    found = [launch for weighted in wanted for launch in launches(c, layout, dtype, architecture, weighted)]
    assert len(found) == 3 * len(wanted)
    # rows of 100 two-byte classes start at multiples of 8 bytes only
    narrow_rows = layout == "NHWC" and c > 4 and c * dtype.itemsize % 16 != 0
    width = "64" if narrow_rows else "128"
    reports = inspect_all([compile_launch(launch, architecture) for launch in found], architecture)
    for launch, report in zip(found, reports):
        name = f"{report.kernel}: {report.registers} registers, {dict(report.opcodes)}"
        assert (report.stack, report.spills) == (0, 0), name
        assert not [text for text in failures(report, launch) if "LDSM" not in text], name
        wide = report.count(f"LDG.E.{width}") + report.count("LDGSTS.E.BYPASS.128") + report.count(f"LDGSTS.E.{width}")
        assert wide > 0, name
        if report.kernel == "dice_backward_kernel":
            assert report.count("STG.E.") == report.count(f"STG.E.{width}") > 0, name
            vectors = c * dtype.itemsize * launch.args["BLOCK_S"] // (int(width) // 8) // (32 * launch.num_warps)
            if c <= 4:  # every logit by a whole vector: as many loads as vectors in a thread's share of the tile
                slopes = 2 if c == 4 else 0  # those of I and of P are a vector each
                assert report.count("LDG.E.128") - slopes == report.count("STG.E.128") == vectors, name


@pytest.mark.usefixtures("newest_unless_full")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("c, dtype, most", [
    (2, torch.bfloat16, 42), (3, torch.bfloat16, 42), (4, torch.bfloat16, 34), (4, torch.float32, 34),
    (100, torch.bfloat16, 55), (100, torch.float32, 55),
])  # fmt: skip
def test_forward_loop_is_short(c, dtype, layout, most, request, show_table):
    """Instructions a logit, and nothing passed between threads where each has all classes of its pixels.

    At 3 TB/s an H100 has time for 19 instructions a 16-bit logit and 38 a float32 one, of which the exponential takes
    three and the logarithm, in PyTorch's accuracy, twenty a pixel.
    """
    if (layout, dtype) not in (NHWC, NCHW) and not request.config.getoption("--full", default=False):
        pytest.skip("compiled with --full")
    if layout == "NCHW":
        logits = torch.empty(4, c, PIXELS, dtype=dtype, device="meta")
    else:
        logits = torch.empty(4, PIXELS, c, dtype=dtype, device="meta").transpose(1, 2)
    labels = torch.empty(4, PIXELS, dtype=torch.uint8, device="meta")
    grad, slopes = torch.empty((), device="meta"), torch.empty(1, 3 * c + 3, device="meta")
    with _launch.recording(90) as found:
        dice.sums(logits, labels, None, None, True, False)
        dice.sums_grad(grad, slopes, logits, labels, None, None, True)
    forward, _, backward = found
    loop, whole = inspect_all([compile_launch(launch, 90) for launch in (forward, backward)], 90, around="loads")
    # of one thread, whose share of a tile's logits the instructions are divided by
    per_logit = loop.instructions / (forward.args["BLOCK_S"] * c / (32 * forward.num_warps))
    per_gradient = sum(n for opcode, n in whole.opcodes.items() if opcode != "NOP")
    per_gradient /= backward.args["BLOCK_S"] * c / (32 * backward.num_warps)
    size = c * dtype.itemsize
    show_table(
        f"Dice, {c} classes, {dtype}, {layout}: {size + 1} / {2 * size + 1} bytes a pixel, "
        f"{per_logit:.1f} / {per_gradient:.1f} instructions a logit, {loop.registers} / {whole.registers} registers"
    )
    assert loop.main_loops == 1
    assert per_logit <= most
    if c <= 4:
        assert loop.count("SHFL") == 0


@pytest.mark.usefixtures("newest_unless_full")
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("architecture, c, dtype", [
    (architecture, c, dtype) for architecture in (80, 90, 100) for c in (1, 2, 3, 4, 5, 8, 16, 32)
    for dtype in (torch.float32, torch.bfloat16)
])  # fmt: skip
def test_regions(architecture, c, dtype, layout, request, show_table):
    """With region weights, which take a logarithm a logit, no register is spilled; without, one a pixel is enough."""
    quick = {(3, torch.bfloat16, "NHWC"), (4, torch.bfloat16, "NCHW")}
    full = request.config.getoption("--full", default=False)
    if not full and (architecture != 90 or (c, dtype, layout) not in quick):
        pytest.skip("compiled with --full")
    logits = torch.empty(4, c, PIXELS, dtype=dtype, device="meta")
    if layout == "NHWC":
        logits = torch.empty(4, PIXELS, c, dtype=dtype, device="meta").transpose(1, 2)
    labels = torch.empty(4, PIXELS, dtype=torch.uint8, device="meta")
    table = torch.empty(4, dtype=torch.int32, device="meta")
    grad, slopes = torch.empty((), device="meta"), torch.empty(1, 3 * c + 3, device="meta")
    with _launch.recording(architecture) as found:
        for weights, ignored in [(torch.empty(c, device="meta"), 255), (None, None)]:
            dice_regions.sums(logits, labels, weights, table, ignored, True, False)
            dice_regions.sums_grad(grad, slopes, logits, labels, weights, table, ignored, True)
    found = [launch for launch in found if "regions" in launch.kernel.__name__]
    per_logit = []
    reports = inspect_all([compile_launch(launch, architecture) for launch in found], architecture, around="loads")
    for launch, report in zip(found, reports):
        assert (report.stack, report.spills) == (0, 0), f"{report.kernel}: {report.registers} registers"
        assert not [text for text in failures(report, launch) if "LDSM" not in text], report.kernel
        per_logit.append(report.instructions / (launch.args["BLOCK_S"] * c / (32 * launch.num_warps)))
        if c <= 4 and "forward" in report.kernel:
            assert report.count("SHFL") == 0
    numbers = ", ".join(f"{number:.1f}" for number in per_logit)
    show_table(f"{c} regions, {dtype}, {layout}: {numbers} instructions a logit")
    if architecture == 90 and 3 <= c <= 4:
        assert per_logit[0] <= 75
        assert per_logit[2] <= 55
        assert max(per_logit[1::2]) <= 40


def test_wide_confusion_product_waits_before_its_operands_change():
    """Hopper's asynchronous product reads one-hot operands from registers; ptxas before 13.3 may reuse them early."""
    launch = launches(100, "NHWC", torch.bfloat16, 90, False)[-1]
    assert launch.num_stages == 1
    report = inspect(compile_launch(launch, 90), 90)
    assert report.count("HGMMA") > 0
    assert report.count("WARPGROUP.DEPBAR") == 1


@pytest.mark.usefixtures("newest_unless_full")
@pytest.mark.parametrize("rows, c, empty", [
    (1, 4, "smooth"), (1, 128, "skip"), (64, 128, "one"), (16, 4, "one"), (64, 128, "smooth"), (64, 128, "skip"),
])  # fmt: skip
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_small_kernels_do_not_spill(architecture, rows, c, empty, request):
    """The second pass over 4096 rows of partial sums, and the loss of what it yields."""
    quick = architecture == 90 and (rows, empty) in {(1, "smooth"), (64, "one")}
    if not quick and not request.config.getoption("--full", default=False):
        pytest.skip("compiled with --full")
    logits = torch.empty(rows, c, PIXELS * 8, device="meta")
    labels = torch.empty(rows, PIXELS * 8, dtype=torch.uint8, device="meta")
    with _launch.recording(architecture) as found:
        sums = dice.sums(logits, labels, None, None, True, rows > 1)
        dice_rule.loss(sums, torch.empty(c, device="meta"), 1.0, empty, False, 1.0, 1.0, True)
    assert [launch.kernel.__name__ for launch in found[1:]] == ["sum_splits_kernel", "dice_rule_kernel"]
    for report in inspect_all([compile_launch(launch, architecture) for launch in found[1:]], architecture):
        assert (report.stack, report.spills) == (0, 0), f"{report.kernel}: {report.registers} registers"
