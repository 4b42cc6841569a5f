"""The loss of sums and its slopes in plain PyTorch, against autograd of the definition."""

import pytest
import torch

from fastunet.functional.dice_rule import dice_score, loss, mean_over_counted


@pytest.mark.parametrize("weighted", [False, True], ids=["", "weights"])
@pytest.mark.parametrize("background", [True, False], ids=["", "foreground"])
@pytest.mark.parametrize("empty, smooth", [("smooth", 1.0), ("skip", 1.0), ("one", 0.0)])
@pytest.mark.parametrize("tversky", [(0.5, 0.5), (0.3, 0.7), (2.0, 0.0)], ids=["", "Tversky", "positives"])
@pytest.mark.parametrize("rows", [1, 3])
def test_slopes_are_the_derivatives(rows, tversky, empty, smooth, background, weighted):
    generator = torch.Generator().manual_seed(0)
    sums = 10 * torch.rand(rows, 15, dtype=torch.float64, generator=generator)
    sums[:, 9] = 0  # a class without truth
    sums[0, 5] = 0  # nor prediction
    weights = torch.rand(4, dtype=torch.float64, generator=generator) if weighted else None
    leaf, first = sums.clone().requires_grad_(), 0 if background else 1
    i, p, t = (leaf[:, 4 * j + first : 4 * j + 4] for j in range(3))
    alpha, beta = tversky
    score = dice_score(i, p, t, smooth=smooth, empty=empty, alpha=alpha, beta=beta)
    counted = t > 0 if empty != "smooth" else t >= 0
    literal = (i + smooth / 2) / (i + alpha * (p - i) + beta * (t - i) + smooth / 2)
    torch.testing.assert_close(score[counted], literal[counted], rtol=1e-12, atol=0)
    dice = mean_over_counted(1 - score, t, empty=empty, weights=None if weights is None else weights[first:])
    expected = 0.7 * dice + 0.3 * leaf[:, 12].sum() / leaf[:, 13].sum()
    value, wrong, slopes = loss(sums, weights, smooth, empty, background, 0.7, 0.3, False, alpha, beta)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-13, atol=0)
    assert wrong == sums[:, 14].sum()
    wanted = torch.autograd.grad(expected, leaf)[0]
    of_logits = [*range(8), 12]  # the others do not depend on the logits
    torch.testing.assert_close(slopes[:, of_logits], wanted[:, of_logits], rtol=1e-12, atol=1e-15)
    assert not slopes[:, [*range(8, 12), 13, 14]].any()


def test_a_truth_that_is_nan_is_not_skipped():
    truth = torch.tensor([[1.0, torch.nan]])
    assert mean_over_counted(torch.tensor([[0.5, torch.nan]]), truth, empty="skip").isnan()
