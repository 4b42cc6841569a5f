"""The kernel that turns sums into a loss, against its PyTorch specification and autograd."""

import pytest
import torch

from fastunet.functional import dice_rule as specification
from fastunet.kernels import _launch
from fastunet.kernels.dice import rule as dice_rule
from tests.tolerance import assert_within_budget


def rows_of_sums(rows, c, device):
    """As of 900 pixels a row: every third class without truth, and one of them without prediction."""
    generator = torch.Generator().manual_seed(0)
    shares = torch.rand(rows, c, generator=generator)
    truth = (900 * torch.rand(rows, c, generator=generator)).round()
    truth[:, 1::3] = 0
    predicted = 900 * torch.rand(rows, c, generator=generator)
    predicted[:, 1] = 0
    scalars = torch.rand(rows, 3, generator=generator) * torch.tensor([500.0, 900.0, 0.0])
    return torch.cat([shares * torch.minimum(truth, predicted), predicted, truth, scalars], 1).to(device)


RULES = {
    "plain": (1.0, "smooth", True, 1.0, 1.0, False),
    "foreground": (0.5, "smooth", False, 2.0, 0.0, True),
    "skip": (1.0, "skip", True, 1.0, 0.3, False),
    "skip foreground": (0.0, "skip", False, 1.0, 0.3, True),
    "one": (0.0, "one", True, 0.5, 1.0, False),
    "Tversky": (1.0, "smooth", True, 1.0, 0.3, False, 0.3, 0.7),
    "Tversky skip": (0.0, "skip", False, 1.0, 0.0, False, 2.0, 0.5),
}


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("rule", RULES.values(), ids=RULES.keys())
@pytest.mark.parametrize("rows, c", [(1, 2), (1, 4), (3, 3), (70, 20), (40, 128)])
def test_equals_the_specification(rows, c, rule, weighted, device):
    sums = rows_of_sums(rows, c, device)
    weights = torch.rand(c, device=device) if weighted else None
    with _launch.poisoned():
        found = dice_rule.loss(sums, weights, *rule)
    same = specification.loss(sums, weights, *rule)
    exact = specification.loss(sums.double(), None if weights is None else weights.double(), *rule)
    for name, *values in zip(["loss", "wrong", "slopes"], found, same, exact, strict=True):
        assert_within_budget(*values, name)


def test_one_logit(device):
    """One class of sums, that of the foreground."""
    sums = rows_of_sums(2, 3, device)[:, [0, 3, 6, 9, 10, 11]]
    found, same, exact = (f(s, None, *RULES["plain"]) for f, s in (
        (dice_rule.loss, sums), (specification.loss, sums), (specification.loss, sums.double())))  # fmt: skip
    for name, *values in zip(["loss", "wrong", "slopes"], found, same, exact, strict=True):
        assert_within_budget(*values, name)


@pytest.mark.parametrize("empty", ["smooth", "skip", "one"])
def test_nothing_counts(empty, device):
    """No pixel: the loss is 0 under every rule, and nothing is divided by zero."""
    for rows in (0, 2):
        sums = torch.zeros(rows, 15, device=device)
        loss, wrong, slopes = dice_rule.loss(sums, None, 1.0, empty, True, 1.0, 1.0, True)
        assert (loss.item(), wrong.item()) == (0, 0)
        assert slopes.isfinite().all()


@pytest.mark.parametrize("empty", ["smooth", "skip", "one"])
def test_nan_shows(empty, device):
    sums = rows_of_sums(2, 4, device)
    sums[1, 4:8] = torch.nan
    sums[1, 8:12] = torch.tensor([0.0, 3, 4, 5])
    assert dice_rule.loss(sums, None, 1.0, empty, True, 1.0, 1.0, False)[0].isnan()


@pytest.mark.parametrize("empty", ["smooth", "skip", "one"])
def test_a_truth_that_is_nan_is_not_skipped(empty, device):
    sums = rows_of_sums(2, 4, device)
    sums[1, 8] = torch.nan
    assert dice_rule.loss(sums, None, 1.0, empty, True, 1.0, 1.0, False)[0].isnan()
    assert specification.loss(sums, None, 1.0, empty, True, 1.0, 1.0, False)[0].isnan()


def test_wrong_labels(device):
    sums = rows_of_sums(2, 4, device)
    sums[1, 14] = 3
    loss, wrong, slopes = dice_rule.loss(sums, None, 1.0, "smooth", True, 1.0, 1.0, True)
    assert loss.isnan()
    assert wrong == 3
    assert slopes.isnan().all()
    assert specification.loss(sums, None, 1.0, "smooth", True, 1.0, 1.0, True)[2].isnan().all()
    loss, wrong, slopes = dice_rule.loss(sums, None, 1.0, "smooth", True, 1.0, 1.0, False)
    assert loss.isfinite()
    assert wrong == 3
    assert slopes.any()


def test_repeats_are_bit_identical(device):
    sums = rows_of_sums(70, 20, device)
    for first, second in zip(*(dice_rule.loss(sums, None, *RULES["skip"]) for _ in range(2)), strict=True):
        assert torch.equal(first, second)
