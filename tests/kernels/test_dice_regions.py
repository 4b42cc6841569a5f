"""The launchers of overlapping regions against memberships in memory: sums and gradients."""

import pytest
import torch

from fastunet.functional import region_dice_cross_entropy
from fastunet.functional.dice_regions import region_table
from fastunet.kernels import _launch
from fastunet.kernels.dice import regions
from fastunet.kernels.dice import sums as dice
from tests.kernels.conftest import COMPILED
from tests.kernels.dice_cases import LABEL_DTYPES, LAYOUTS, inputs
from tests.region_cases import BRATS, NESTED, sums_of
from tests.tolerance import assert_within_budget

REGIONS = {
    "one": [(1, 3)], "two": [(1,), (1, 2)], "brats": BRATS, "four": [*BRATS, (4,)], "nested": NESTED,
    "most": [(1 + i % 7, 1 + i % 5) for i in range(32)],
}  # fmt: skip

CASES = [(name, dtype) for name in REGIONS for dtype in (torch.float32, torch.float16)]
CASES += [pytest.param(name, torch.bfloat16, marks=COMPILED) for name in ("brats", "nested")]
SMALL = dice.DiceConfig(block_s=16, keep=4)
WEIGHTS = torch.tensor([0.5, 1.0, 2.0])


def case(name, s, dtype, device, layout="NCHW", label_dtype=torch.uint8):
    """Regions, their table, logits and labels; as in ``inputs`` some are 200, and one is 180 and out of range."""
    found = REGIONS[name]
    logits, _ = inputs(2, len(found), s, dtype, device, layout)
    _, labels = inputs(2, 8, s, dtype, device, layout, label_dtype)
    return found, region_table(found, 8).to(device), logits, labels


def check_sums(actual, found, logits, labels, weights, ignore=200):
    c = len(found)
    same, exact = (sums_of(logits.to(d), labels, found, 8, weights, ignore) for d in (torch.float32, torch.float64))
    edges = [0, c, 2 * c, 3 * c, 3 * c + 1, 3 * c + 2, 3 * c + 3]
    for name, a, b in zip(["I", "P", "T", "cross-entropy", "weight", "wrong"], edges, edges[1:]):
        assert_within_budget(actual[:, a:b], same[:, a:b], exact[:, a:b], name)


def gradient(slopes, *arguments):
    """With doubled slopes and a factor of one half, which is exact."""
    return regions.sums_grad(torch.full((), 0.5, device=slopes.device), 2 * slopes, *arguments)


def check_gradient(actual, slopes, found, logits, labels, weights, ignore=200):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.detach().to(logits.dtype if dtype == torch.float32 else dtype, copy=True).requires_grad_()
        sums_of(leaf.to(dtype), labels, found, 8, weights, ignore).backward(slopes.to(dtype))
        gradients.append(leaf.grad)
    assert_within_budget(actual, *gradients, "dlogits")


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, dtype", CASES)
def test_sums_and_gradient(name, layout, dtype, device):
    found, table, logits, labels = case(name, 70, dtype, device, layout)
    weights = torch.rand(len(found), device=device)
    slopes = torch.randn(2, 3 * len(found) + 3, device=device)
    options = weights, table, 200, True
    check_sums(regions.sums(logits, labels, *options, True), found, logits, labels, weights)
    dlogits = gradient(slopes, logits, labels, *options)
    assert (dlogits.dtype, dlogits.stride()) == (dtype, logits.stride())
    check_gradient(dlogits, slopes, found, logits, labels, weights)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name, dtype", [
    ("two", torch.float32), ("most", torch.float16), pytest.param("brats", torch.bfloat16, marks=COMPILED),
])  # fmt: skip
def test_one_logarithm_a_pixel(name, layout, dtype, device):
    """Without weights; few pixels, because the interpreter multiplies one element after another."""
    found, table, logits, labels = case(name, 18, dtype, device, layout)
    sums = regions.sums(logits, labels, None, table, 200, True, True, SMALL)
    check_sums(sums, found, logits, labels, None)


@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, ids=str)
def test_label_dtypes(label_dtype, device):
    found, table, logits, labels = case("brats", 40, torch.float32, device, label_dtype=label_dtype)
    weights = WEIGHTS.to(device)
    if label_dtype != torch.uint8:
        labels[0, 2] = -7
    if label_dtype == torch.int64:
        labels[0, 3] = 2**32 + 1
    check_sums(regions.sums(logits, labels, weights, table, 200, True, True), found, logits, labels, weights)


@pytest.mark.parametrize("s", [1, 15, 16, 17, 129])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sizes_around_a_tile(layout, s, device, monkeypatch):
    monkeypatch.setattr(dice, "_PROGRAMS", 4)  # so that a program walks several tiles
    found, table, logits, labels = case("brats", s, torch.float16, device, layout)
    weights, slopes = WEIGHTS.to(device), torch.randn(2, 12, device=device)
    check_sums(regions.sums(logits, labels, weights, table, 200, True, True, SMALL), found, logits, labels, weights)
    dlogits = gradient(slopes, logits, labels, weights, table, 200, True, SMALL)
    check_gradient(dlogits, slopes, found, logits, labels, weights)


def test_without_cross_entropy_and_in_one_row(device):
    found, table, logits, labels = case("brats", 40, torch.float32, device)
    options = WEIGHTS.to(device), table, 200
    rows = regions.sums(logits, labels, *options, True, True)
    torch.testing.assert_close(regions.sums(logits, labels, *options, True, False), rows.sum(0, keepdim=True))
    without = regions.sums(logits, labels, *options, False, True)
    rows[:, 9] = 0
    assert torch.equal(without, rows)
    slopes = torch.randn(1, 12, device=device)
    silent = torch.cat([slopes[:, :9], torch.zeros_like(slopes[:, :3])], 1).expand(2, 12)
    check_gradient(gradient(slopes, logits, labels, None, table, 200, False), silent, found, logits, labels, None)


@pytest.mark.parametrize("n, s", [(0, 16), (2, 0)])
def test_nothing_to_read(n, s, device):
    logits, labels = torch.zeros(n, 3, s, device=device), torch.zeros(n, s, dtype=torch.uint8, device=device)
    table = region_table(BRATS).to(device)
    assert torch.equal(regions.sums(logits, labels, None, table, None, True, True), torch.zeros(n, 12, device=device))
    slopes = torch.zeros(n, 12, device=device)
    assert gradient(slopes, logits, labels, None, table, None, True).shape == (n, 3, s)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_samples_than_a_grid_holds(layout, device, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 20, generator=generator).to(device)
    logits = logits if layout == "NCHW" else logits.transpose(1, 2).contiguous().transpose(1, 2)
    labels = torch.randint(0, 4, (5, 20), generator=generator).to(device)
    options = WEIGHTS.to(device), region_table(BRATS).to(device), None, True
    slopes = torch.randn(5, 12, device=device)

    def everything():
        sums = [regions.sums(logits, labels, *options, per_sample) for per_sample in (True, False)]
        return sums + [gradient(rows, logits, labels, *options) for rows in (slopes, slopes[:1])]

    whole = everything()
    monkeypatch.setattr(dice, "MOST_SAMPLES", 2)
    for in_pieces, at_once in zip(everything(), whole, strict=True):
        torch.testing.assert_close(in_pieces, at_once, rtol=1e-6, atol=1e-6)


def test_sure_ignored_and_wrong_logits(device):
    """Infinite logits lose nothing where they are right; NaN shows, but not where the pixel is ignored."""
    inf, table = torch.inf, region_table([(1,)]).to(device)
    logits = torch.tensor([[[inf, -inf, 200.0, -200.0, torch.nan]]], device=device)
    labels = torch.tensor([[1, 0, 1, 0, 200]], device=device)
    right = regions.sums(logits, labels, None, table, 200, True, True)
    assert right.tolist() == [[2, 2, 2, 0, 4, 0]]
    every = torch.ones(1, 6, device=device)
    assert gradient(every, logits, labels, None, table, 200, True).tolist() == [[[0, 0, 0, 0, 0]]]
    wrong = regions.sums(logits[..., 2:4], 1 - labels[:, 2:4], None, table, 200, True, True)
    assert wrong.tolist() == [[0, 1, 1, 400, 2, 0]]
    assert regions.sums(logits[..., :2], 1 - labels[:, :2], None, table, 200, True, True)[0, 3] == inf
    labels[0, 4] = 1
    assert regions.sums(logits, labels, None, table, 200, True, True)[0, [0, 1, 3]].isnan().all()


def test_small_losses_keep_their_digits(device):
    """log(1 + exp(-12)) and the like, of one region and of the product of three."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 4, (1, 32), generator=generator)
    for found in ([(1, 3)], BRATS):
        inside = torch.stack([torch.isin(labels, torch.tensor(members)) for members in found], 1)
        logits = torch.where(inside, 1.0, -1.0) * (8 + 8 * torch.rand(inside.shape, generator=generator))
        table = region_table(found, 8).to(device)
        sums = regions.sums(logits.to(device), labels.to(device), None, table, 200, True, True, SMALL)
        check_sums(sums, found, logits.to(device), labels.to(device), None)


def test_fp16_sums_beyond_its_range(device):
    """65,504 is the greatest float16: more pixels of one region than that, and the sums are still right."""
    logits = torch.zeros(1, 1, 70_000, dtype=torch.float16, device=device)
    labels = torch.ones(1, 70_000, dtype=torch.uint8, device=device)
    config = dice.DiceConfig(block_s=8192, keep=1024)
    sums = regions.sums(logits, labels, None, region_table([(1,)]).to(device), None, False, True, config)
    assert sums.tolist() == [[35_000, 35_000, 70_000, 0, 70_000, 0]]


def test_repeats_are_bit_identical(device):
    _, table, logits, labels = case("brats", 300, torch.float16, device, "NHWC")
    slopes, options = torch.randn(2, 12, device=device), (WEIGHTS.to(device), table, 200, True)
    assert torch.equal(*(regions.sums(logits, labels, *options, True) for _ in range(2)))
    assert torch.equal(*(gradient(slopes, logits, labels, *options) for _ in range(2)))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_function_runs_on_the_kernels(memory_format, device, monkeypatch):
    """Loss and gradient by the registered operators in four launches, against the PyTorch backend."""
    generator, started, launch = torch.Generator().manual_seed(0), [], _launch.launch
    monkeypatch.setattr(_launch, "launch", lambda kernel, *a, **k: (started.append(kernel), launch(kernel, *a, **k)))
    logits = torch.randn(2, 3, 5, 7, generator=generator).to(device).contiguous(memory_format=memory_format)
    labels = torch.randint(0, 4, (2, 5, 7), generator=generator).to(device)
    options = dict(region_weights=torch.tensor([0.5, 1.0, 2.0], device=device), empty="skip", reduction="sample")
    found = []
    for backend, dtype in [("triton", torch.float32), ("torch", torch.float32), ("torch", torch.float64)]:
        leaf = logits.detach().to(dtype, copy=True).requires_grad_()
        loss = region_dice_cross_entropy(leaf, labels, BRATS, backend=backend, **options)
        found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
    for name, *values in zip(["loss", "gradient"], *found):
        assert_within_budget(*values, name)
    assert [kernel.__name__ for kernel in started] == [
        "dice_regions_forward_kernel", "sum_splits_kernel", "dice_rule_kernel", "dice_regions_backward_kernel",
    ]  # fmt: skip
    labels[1, 2, 3] = 7
    with pytest.raises(ValueError, match="1 labels are out of range, 7 among them"):
        region_dice_cross_entropy(logits, labels, BRATS, backend="triton")
