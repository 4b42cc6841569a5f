"""The loss of overlapping regions on a CPU: values, gradients, options and errors."""

import functools

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional import region_dice_cross_entropy
from fastunet.functional.dice_regions import region_table
from fastunet.losses import RegionDiceCrossEntropyLoss
from tests.dice_cases import LAYOUTS, arguments, batch, check_exactly, check_within_budget
from tests.region_cases import BRATS, NESTED, literal
from tests.tolerance import assert_within_budget

REGIONS = {"one": [(1, 3)], "brats": BRATS, "nested": NESTED}
OPTIONS = {
    "plain": {},
    "ignore": dict(ignore=2),
    "everything": dict(weights=True, ignore=255, smooth=0.5, reduction="sample", ce_weight=0.3, dice_weight=2.0),
    "skip": dict(empty="skip", reduction="sample"),
    "one": dict(empty="one", smooth=0.0, reduction="sample", weights=True),
}


def case(regions, dtype=torch.float64, size=(7, 9), n=3):
    """Logits of the regions, and labels of six classes."""
    logits, _ = batch(len(regions), size, n=n, dtype=dtype)
    return logits, torch.randint(0, 6, (n, *size), generator=torch.Generator().manual_seed(1)).to(torch.uint8)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("regions", REGIONS.values(), ids=REGIONS.keys())
def test_equals_the_eager_loss(regions, options, layout, tiny_chunks):
    logits, labels = case(regions)
    if options.get("ignore") == 255:
        labels[0, 2] = 255
    labels[1] = 0  # a sample without any region
    logits = logits.contiguous(memory_format=LAYOUTS[layout]).requires_grad_()
    theirs, ours = arguments(options, len(regions), torch.float64, "region_weights")
    loss = region_dice_cross_entropy(logits, labels, regions, num_classes=6, **ours)
    check_exactly(logits, loss, literal(logits, labels, regions, **theirs))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_low_precision_stays_within_budget(dtype, tiny_chunks):
    logits, labels = case(BRATS, dtype, (40, 50))
    fused = functools.partial(region_dice_cross_entropy, labels=labels, regions=BRATS, num_classes=6)
    check_within_budget(logits, fused, lambda z: literal(z, labels, BRATS))


@pytest.mark.parametrize("some_ignored", [False, True])
def test_kept_probabilities_become_the_same_gradient(some_ignored, tiny_chunks):
    """The first backward pass overwrites what the forward pass kept; a second one computes it again, bit by bit."""
    logits, labels = case(BRATS, torch.float32)
    if some_ignored:
        labels[:, ::3] = 255
    leaf = logits.clone().requires_grad_()
    loss = region_dice_cross_entropy(leaf, labels, BRATS, num_classes=6, ignore_index=255 if some_ignored else None)
    first = torch.autograd.grad(loss, leaf, retain_graph=True)[0].clone()
    assert torch.equal(first, torch.autograd.grad(loss, leaf, retain_graph=True)[0])


def test_confident_predictions_keep_their_small_cross_entropy():
    logits, labels = case(BRATS, torch.float32, (64, 64))
    inside = torch.stack([torch.isin(labels, torch.tensor(r)) for r in BRATS], 1)
    logits = torch.where(inside, 12 + logits, -12 + logits)
    ours = region_dice_cross_entropy(logits, labels, BRATS, num_classes=6, dice_weight=0)
    found = [F.binary_cross_entropy_with_logits(logits.to(d), inside.to(d)) for d in (torch.float32, torch.float64)]
    assert_within_budget(ours, *found)


@pytest.mark.parametrize("regions", [BRATS, [(1,)]], ids=["brats", "one"])
def test_gradients_of_first_and_second_order(regions, tiny_chunks):
    logits, labels = case(regions, size=(3, 4), n=2)
    labels[0, 0] = 255
    weights = torch.linspace(0.5, 2, len(regions), dtype=torch.float64)

    def loss(z):
        return region_dice_cross_entropy(z, labels, regions, num_classes=6, ignore_index=255, region_weights=weights)

    assert torch.autograd.gradcheck(loss, logits.requires_grad_())
    assert torch.autograd.gradgradcheck(loss, logits)


def test_opcheck():
    logits, labels = case(BRATS, torch.float32)
    flat, pixels, table = logits.flatten(2), labels.flatten(1), region_table(BRATS, 6)
    torch.library.opcheck(torch.ops.fastunet.dice_region_sums, (flat, pixels, None, table, 255, True, False, "torch"))
    gradient = torch.ones(()), torch.rand(3, 12), flat, pixels, torch.rand(3), table, None, True, "torch"
    torch.library.opcheck(torch.ops.fastunet.dice_region_sums_grad, gradient)


def test_compiles_to_one_graph_and_says_nan_for_wrong_labels():
    logits, labels = case(BRATS, torch.float32)
    loss = RegionDiceCrossEntropyLoss(BRATS, num_classes=6, empty="skip", reduction="sample")
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    got, want = compiled(a, labels), loss(b, labels)
    got.backward()
    want.backward()
    torch.testing.assert_close(got, want)
    assert torch.equal(a.grad, b.grad)
    labels[0, 0, 0] = 9
    assert compiled(logits, labels).isnan()


def test_repeats_are_bit_identical(tiny_chunks):
    logits, labels = case(BRATS, torch.float32)
    losses = [region_dice_cross_entropy(logits.requires_grad_(), labels, BRATS, num_classes=6) for _ in range(2)]
    assert torch.equal(*losses)
    assert torch.equal(*(torch.autograd.grad(loss, logits)[0] for loss in losses))


def test_half_precision_beyond_its_range():
    """More pixels of a region than float16 counts (65,504): finite, and right to float16's rounding of logits."""
    logits, labels = case(BRATS, torch.float16, (600, 500), n=1)
    labels.fill_(3)
    leaf, wide = logits.clone().requires_grad_(), logits.double().requires_grad_()
    loss, expected = region_dice_cross_entropy(leaf, labels, BRATS), literal(wide, labels, BRATS)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (loss * 2**10).backward()
    (expected * 2**10).backward()
    assert (leaf.grad - wide.grad).abs().max() <= 2**-10 * wide.grad.abs().max()


def test_extreme_logits():
    """Infinite ones are sure: no loss where they are right, an infinite one where they are wrong. NaN shows."""
    inf = torch.inf
    logits = torch.tensor([[[[inf, -inf, 1e4, -1e4]]]], requires_grad=True)
    labels = torch.tensor([[[1, 0, 1, 0]]])
    loss = region_dice_cross_entropy(logits, labels, [(1,)])
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits.grad, torch.zeros_like(logits))
    assert region_dice_cross_entropy(logits, 1 - labels, [(1,)]) == inf
    with torch.no_grad():
        logits[..., 0] = torch.nan
    for weights in (dict(ce_weight=0), dict(dice_weight=0)):
        assert region_dice_cross_entropy(logits, labels, [(1,)], **weights).isnan()
    ignored = region_dice_cross_entropy(logits, torch.tensor([[[255, 0, 1, 0]]]), [(1,)], ignore_index=255)
    assert ignored.item() == 0


def test_everything_ignored_and_empty_batch():
    logits, labels = case(BRATS)
    leaf = logits.requires_grad_()
    loss = region_dice_cross_entropy(leaf, torch.full_like(labels, 255), BRATS, ignore_index=255, empty="skip")
    loss.backward()
    assert loss.item() == 0
    assert torch.equal(leaf.grad, torch.zeros_like(leaf))
    assert region_dice_cross_entropy(leaf[:0], labels[:0], BRATS).item() == 0


@pytest.mark.parametrize("value", [6, 200, -1])
def test_label_out_of_range_is_named(value):
    logits, labels = case(BRATS)
    labels = labels.to(torch.int32)
    want = region_dice_cross_entropy(
        logits, torch.where(torch.arange(9) == 3, 255, labels), BRATS, num_classes=6, ignore_index=255
    )
    labels[..., 3] = value
    with pytest.raises(ValueError, match=f"21 labels are out of range, {value} among them; expected 0 to 5"):
        region_dice_cross_entropy(logits, labels, BRATS, num_classes=6)
    got = region_dice_cross_entropy(logits, labels, BRATS, num_classes=6, check_labels=False)
    torch.testing.assert_close(got, want)


def test_table_of_32_regions():
    """The last of them is the sign of the word."""
    table = region_table([(1,)] * 31 + [(2,)])
    assert table.tolist() == [0, 2**31 - 1, -(2**31)]
    logits, labels = torch.randn(1, 32, 4, 4, dtype=torch.float64), torch.randint(0, 3, (1, 4, 4))
    regions = [(1,)] * 31 + [(2,)]
    torch.testing.assert_close(
        region_dice_cross_entropy(logits, labels, regions), literal(logits, labels, regions), rtol=1e-12, atol=0
    )


def test_bad_arguments_are_named():
    logits, labels = case(BRATS)
    cases = [
        ([], {}, "0 regions; expected 1 to 32"),
        ([(1,)] * 33, {}, "33 regions"),
        ([(1,), ()], {}, r"region \(\) is made of other classes"),
        ([(0, 1)], {}, r"region \(0, 1\) is made of other classes than 1 to 1"),
        ([(1, 9)], dict(num_classes=4), r"region \(1, 9\) is made of other classes than 1 to 3"),
        (BRATS, dict(num_classes=200), "num_classes is 200"),
        (BRATS[:2], {}, r"logits have shape \(3, 3, 7, 9\); expected \(N, 2, H, W\)"),
        (BRATS, dict(region_weights=torch.ones(4)), r"region_weights have shape \(4,\); expected \(3,\)"),
        (torch.zeros(4), {}, "regions are a torch.float32 table"),
        (BRATS, dict(reduction="mean"), "reduction is 'mean'"),
        (BRATS, dict(empty="none"), "empty is 'none'"),
    ]
    for regions, options, message in cases:
        with pytest.raises(ValueError, match=message):
            region_dice_cross_entropy(logits, labels, regions, **options)
    for regions in (3, [1, 2, 3], [("a",)], [(1.5,)]):
        with pytest.raises(TypeError, match="regions is"):
            region_dice_cross_entropy(logits, labels, regions)
    with pytest.raises(ValueError, match=r"labels have shape \(3, 3, 7, 9\), which does not fit"):
        region_dice_cross_entropy(logits, torch.zeros_like(logits), BRATS)


def test_module_holds_the_table_and_the_options():
    logits, labels = case(BRATS)
    loss = RegionDiceCrossEntropyLoss(BRATS, num_classes=6, region_weights=[1, 2, 3], ignore_index=5, smooth=0.5)
    assert not loss.state_dict()
    want = literal(logits, labels, BRATS, weights=torch.tensor([1.0, 2, 3]), ignore=5, smooth=0.5)
    torch.testing.assert_close(loss(logits, labels), want, rtol=1e-12, atol=0)
    with pytest.raises(ValueError, match="for 3 regions"):
        loss(logits[:, :2], labels)
    with pytest.raises(TypeError, match="include_background"):
        RegionDiceCrossEntropyLoss(BRATS, include_background=False)
