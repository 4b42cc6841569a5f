"""The Dice kernels compiled for GPUs that need not be there: whole-vector loads and stores, no spills.

By default sm_90 for 3, 4 and 100 classes in channels-last bfloat16 and for 4 in planes of float32, and with class
weights 4 classes for sm_80 and, as a slow test, for sm_100; ``--full`` takes all. The disassembler is slow to start, so
a test gives it all of its kernels for an architecture at once.
"""

import itertools
from collections import defaultdict

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
QUICK = {(90, c, *NHWC, False) for c in (3, 4, 100)} | {(90, 4, *NCHW, False)}
QUICK |= {(80, 4, *NCHW, True), (100, 4, *NHWC, True)}
"""What is compiled without ``--full``: (architecture, classes, layout, dtype, weighted)."""
CLASSES = (1, 2, 3, 4, 8, 16, 24, 32, 48, 64, 100, 128)
LAYOUTS = [(layout, dtype) for layout in ("NCHW", "NHWC") for dtype in (torch.float32, torch.bfloat16)]


def empty_logits(c, layout, dtype):
    if layout == "NCHW":
        return torch.empty(4, c, PIXELS, dtype=dtype, device="meta")
    return torch.empty(4, PIXELS, c, dtype=dtype, device="meta").transpose(1, 2)


def launches(c, layout, dtype, architecture, weighted):
    """Forward, backward and confusion counts of a batch, with class weights and an ignored label or neither."""
    logits, labels = empty_logits(c, layout, dtype), torch.empty(4, PIXELS, dtype=torch.uint8, device="meta")
    weights, ignored = (torch.empty(max(c, 2), device="meta"), 255) if weighted else (None, None)
    grad, slopes = torch.empty((), device="meta"), torch.empty(1, 3 * c + 3, device="meta")
    with _launch.recording(architecture) as found:
        dice.sums(logits, labels, weights, ignored, True, False)
        dice.sums_grad(grad, slopes, logits, labels, weights, ignored, True)
        dice_confusion.confusion(logits, labels, max(c, 2), ignored)
    return [launch for launch in found if "dice" in launch.kernel.__name__ or "confusion" in launch.kernel.__name__]


@pytest.mark.usefixtures("newest_unless_full")
@pytest.mark.parametrize("architecture", [80, 90, pytest.param(100, marks=pytest.mark.slow)])
def test_machine_code(architecture, request):
    full = request.config.getoption("--full", default=False)
    found = []
    for c, layout, weighted in itertools.product(CLASSES, LAYOUTS, (False, True)):
        if full or (architecture, c, *layout, weighted) in QUICK:
            made = launches(c, *layout, architecture, weighted)
            assert len(made) == 3
            found += [(c, *layout, launch) for launch in made]
    reports = inspect_all([compile_launch(launch, architecture) for *_, launch in found], architecture)
    for (c, layout, dtype, launch), report in zip(found, reports):
        name = f"{c} classes, {layout}, {dtype}, {report.kernel}: {report.registers} registers, {dict(report.opcodes)}"
        # rows of 100 two-byte classes start at multiples of 8 bytes only
        narrow_rows = layout == "NHWC" and c > 4 and c * dtype.itemsize % 16 != 0
        width = "64" if narrow_rows else "128"
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
def test_forward_loop_is_short(request, show_table):
    """Instructions a logit, and nothing passed between threads where each has all classes of its pixels.

    At 3 TB/s an H100 has time for 19 instructions a 16-bit logit and 38 a float32 one, of which the exponential takes
    three and the logarithm, in PyTorch's accuracy, twenty a pixel.
    """
    full = request.config.getoption("--full", default=False)
    cases = [(c, layout, dtype) for layout, dtype in (LAYOUTS if full else (NHWC, NCHW))
             for c in ((2, 3, 4, 100) if dtype == torch.bfloat16 else (4, 100) if full else (4,))]  # fmt: skip
    found = [launches(*case, 90, False)[:2] for case in cases]
    reports = inspect_all([compile_launch(launch, 90) for pair in found for launch in pair], 90, around="loads")
    for (c, layout, dtype), (forward, backward), loop, whole in zip(cases, found, reports[::2], reports[1::2]):
        # of one thread, whose share of a tile's logits the instructions are divided by
        per_logit = loop.instructions / (forward.args["BLOCK_S"] * c / (32 * forward.num_warps))
        per_gradient = sum(n for opcode, n in whole.opcodes.items() if opcode != "NOP")
        per_gradient /= backward.args["BLOCK_S"] * c / (32 * backward.num_warps)
        size = c * dtype.itemsize
        text = (f"Dice, {c} classes, {dtype}, {layout}: {size + 1} / {2 * size + 1} bytes a pixel, {per_logit:.1f} / "
                f"{per_gradient:.1f} instructions a logit, {loop.registers} / {whole.registers} registers")  # fmt: skip
        show_table(text)
        assert loop.main_loops == 1, text
        assert per_logit <= {2: 42, 3: 42, 4: 34, 100: 55}[c], text
        if c <= 4:
            assert loop.count("SHFL") == 0, text


@pytest.mark.usefixtures("newest_unless_full")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_regions(architecture, request, show_table):
    """With region weights, which take a logarithm a logit, no register is spilled; without, one a pixel is enough."""
    cases = [(3, "NHWC", torch.bfloat16)]
    if request.config.getoption("--full", default=False):
        cases = [(c, *layout) for c in (1, 2, 3, 4, 5, 8, 16, 32) for layout in LAYOUTS]
    elif architecture != 90:
        pytest.skip("compiled with --full")
    found = [(*case, launch) for case in cases for launch in region_launches(*case, architecture)]
    compiled = [compile_launch(launch, architecture) for *_, launch in found]
    per_logit = defaultdict(list)
    for (*case, launch), report in zip(found, inspect_all(compiled, architecture, around="loads")):
        name = f"{case}, {report.kernel}: {report.registers} registers"
        assert (report.stack, report.spills) == (0, 0), name
        assert not [text for text in failures(report, launch) if "LDSM" not in text], name
        share = launch.args["BLOCK_S"] * case[0] / (32 * launch.num_warps)
        per_logit[tuple(case)].append(report.instructions / share)
        if case[0] <= 4 and "forward" in report.kernel:
            assert report.count("SHFL") == 0, name
    for (c, layout, dtype), numbers in per_logit.items():
        text = ", ".join(f"{number:.1f}" for number in numbers)
        show_table(f"{c} regions, {dtype}, {layout}: {text} instructions a logit")
        if architecture == 90 and 3 <= c <= 4:
            assert numbers[0] <= 75
            assert numbers[2] <= 55
            assert max(numbers[1::2]) <= 40


def region_launches(c, layout, dtype, architecture):
    """Forward and backward, with region weights and an ignored label, then with neither."""
    logits, labels = empty_logits(c, layout, dtype), torch.empty(4, PIXELS, dtype=torch.uint8, device="meta")
    table = torch.empty(4, dtype=torch.int32, device="meta")
    grad, slopes = torch.empty((), device="meta"), torch.empty(1, 3 * c + 3, device="meta")
    with _launch.recording(architecture) as found:
        for weights, ignored in [(torch.empty(c, device="meta"), 255), (None, None)]:
            dice_regions.sums(logits, labels, weights, table, ignored, True, False)
            dice_regions.sums_grad(grad, slopes, logits, labels, weights, table, ignored, True)
    return [launch for launch in found if "regions" in launch.kernel.__name__]


def test_wide_confusion_product_waits_before_its_operands_change():
    """Hopper's asynchronous product reads one-hot operands from registers; ptxas before 13.3 may reuse them early."""
    launch = launches(100, "NHWC", torch.bfloat16, 90, False)[-1]
    assert launch.num_stages == 1
    report = inspect(compile_launch(launch, 90), 90)
    assert report.count("HGMMA") > 0
    assert report.count("WARPGROUP.DEPBAR") == 1


@pytest.mark.usefixtures("newest_unless_full")
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_small_kernels_do_not_spill(architecture, request):
    """The second pass over 4096 rows of partial sums, and the loss of what it yields."""
    cases = [(1, 4, "smooth"), (64, 128, "one")]
    if request.config.getoption("--full", default=False):
        cases += [(1, 128, "skip"), (16, 4, "one"), (64, 128, "smooth"), (64, 128, "skip")]
    elif architecture != 90:
        pytest.skip("compiled with --full")
    small = []
    for rows, c, empty in cases:
        logits = torch.empty(rows, c, PIXELS * 8, device="meta")
        labels = torch.empty(rows, PIXELS * 8, dtype=torch.uint8, device="meta")
        with _launch.recording(architecture) as found:
            sums = dice.sums(logits, labels, None, None, True, rows > 1)
            dice_rule.loss(sums, torch.empty(c, device="meta"), 1.0, empty, False, 1.0, 1.0, True)
        assert [launch.kernel.__name__ for launch in found[1:]] == ["sum_splits_kernel", "dice_rule_kernel"]
        small += found[1:]
    for report in inspect_all([compile_launch(launch, architecture) for launch in small], architecture):
        assert (report.stack, report.spills) == (0, 0), f"{report.kernel}: {report.registers} registers"
