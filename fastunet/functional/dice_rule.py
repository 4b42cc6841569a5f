"""The Dice ratio and its one rule for a class that is absent, shared by the losses and the metrics.

:func:`loss` is the specification of ``kernels/dice/rule.py``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

EMPTY_RULES = ("smooth", "skip", "one")


def check_rule(empty: str, smooth: float) -> None:
    """Raises ``ValueError`` unless ``empty`` is a known rule and ``smooth`` a constant that it can work with."""
    if empty not in EMPTY_RULES:
        raise ValueError(f"empty is {empty!r}; expected one of {', '.join(EMPTY_RULES)}")
    if smooth < 0 or (smooth == 0 and empty == "smooth"):
        raise ValueError(f"smooth is {smooth}; it must not be negative, and positive with empty='smooth'")


def check_tversky(tversky: Sequence[float]) -> tuple[float, float]:
    """(α, β) as floats; raises ``ValueError`` unless they are two numbers of at least 0, of which one is above."""
    try:
        alpha, beta = map(float, tversky)
    except (TypeError, ValueError):
        alpha = beta = float("nan")
    if not (0 <= alpha < float("inf") and 0 <= beta < float("inf") and alpha + beta > 0):
        raise ValueError(f"tversky is {tversky!r}; expected two numbers (alpha, beta) of at least 0, one above")
    return alpha, beta


def dice_score(
    intersection: torch.Tensor,
    predicted: torch.Tensor,
    truth: torch.Tensor,
    *,
    smooth: float,
    empty: str,
    alpha: float = 0.5,
    beta: float = 0.5,
) -> torch.Tensor:
    """``(2 I + s) / (P + T + s)`` elementwise, with the ``empty`` rule where the truth is empty (``T == 0``).

    With other ``alpha`` and ``beta`` than one half it is Tversky's index (Salehi, Erdogmus and Gholipour 2017),
    ``TP / (TP + α FP + β FN)`` with TP = I, FP = P - I and FN = T - I, smoothed alike:
    ``(2 I + s) / (2 (I + α (P - I) + β (T - I)) + s)``.

    "smooth": the ratio as it stands, ``s / (P + s)``. "skip": NaN, which :func:`mean_over_counted` leaves out.
    "one": 1 where the prediction is empty too (``P == 0``), else 0. The gradient is finite everywhere, and zero at
    empty classes under "skip" and "one".

    Args:
        intersection, predicted, truth: I, P and T, floating point, of one shape.
        smooth: the constant s.
        empty: "smooth", "skip" or "one".
    """
    denominator = _denominator(intersection, predicted, truth, alpha, beta)
    return _ratio(2 * intersection, denominator, predicted, truth, smooth, empty)


def iou_score(
    intersection: torch.Tensor, predicted: torch.Tensor, truth: torch.Tensor, *, smooth: float, empty: str
) -> torch.Tensor:
    """``(I + s) / (P + T - I + s)`` elementwise, with the rule of :func:`dice_score`."""
    return _ratio(intersection, predicted + truth - intersection, predicted, truth, smooth, empty)


def _denominator(
    intersection: torch.Tensor, predicted: torch.Tensor, truth: torch.Tensor, alpha: float, beta: float
) -> torch.Tensor:
    """2 (I + α (P - I) + β (T - I)); with halves the bits of P + T."""
    return 2 * ((1 - alpha - beta) * intersection + (alpha * predicted + beta * truth))


def _ratio(
    numerator: torch.Tensor, denominator: torch.Tensor, predicted: torch.Tensor, truth: torch.Tensor, smooth: float,
    empty: str,
) -> torch.Tensor:
    if empty == "smooth":
        return (numerator + smooth) / (denominator + smooth)
    absent = truth == 0
    # The division must not see 0 / 0: its NaN would reach the gradient through torch.where.
    value = (numerator + smooth) / torch.where(absent, torch.ones_like(denominator), denominator + smooth)
    if empty == "skip":
        return torch.where(absent, torch.full_like(value, float("nan")), value)
    return torch.where(absent, (predicted == 0).to(value.dtype), value)


def mean_over_counted(
    values: torch.Tensor, truth: torch.Tensor, *, empty: str, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """The (weighted) mean of ``values`` over the entries that count: all, or under "skip" those with ``T > 0``.

    Args:
        values: (..., classes), from :func:`dice_score` or one minus it.
        truth: T, of the same shape.
        weights: (classes,) or None for equal weights.

    Returns:
        A scalar, 0 where no entry counts. NaN in an entry that counts stays NaN.
    """
    weights = torch.ones_like(values) if weights is None else weights.to(values.dtype).expand_as(values)
    if empty == "skip":
        counted = truth != 0
        weights = torch.where(counted, weights, torch.zeros_like(weights))
        values = torch.where(counted, values, torch.zeros_like(values))
    total = weights.sum()
    return (values * weights).sum() / torch.where(total == 0, torch.ones_like(total), total)


def loss(
    sums: torch.Tensor,
    class_weights: torch.Tensor | None,
    smooth: float,
    empty: str,
    include_background: bool,
    dice_weight: float,
    ce_weight: float,
    nan_if_wrong: bool,
    alpha: float = 0.5,
    beta: float = 0.5,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``dice_weight · mean(1 - D) + ce_weight · cross-entropy`` of rows of sums, and what else one pass can say.

    With w the weight of a class, W the sum of those that count, d the denominator of its ratio D (P + T + s for Dice),
    and a class that does not count or has no ratio 0: ``dL/dI = -dice_weight w / W · 2 / d · (1 - (1 - α - β) D)``,
    ``dL/dP = dice_weight w / W · 2 α D / d``.

    Args:
        sums: (R, 3 C + 3), from ``dice_cpu.sums``.
        class_weights: (C,) weights of the mean over classes, or None.
        smooth, empty, include_background, dice_weight, ce_weight: as in ``dice_cross_entropy``.
        nan_if_wrong: make the loss and its slopes NaN, which a gradient scaler notices, if a label was out of range.
        alpha, beta: of ``dice_score``.

    Returns:
        The loss and the number of labels out of range, scalars; and the slopes d loss / d sums.
    """
    c = sums.shape[1] // 3 - 1
    intersection, predicted, truth = (sums[:, j * c : (j + 1) * c] for j in range(3))
    weights = torch.ones_like(truth) if class_weights is None else class_weights.expand_as(truth).clone()
    if not include_background:
        weights[:, 0] = 0
    score = dice_score(intersection, predicted, truth, smooth=smooth, empty=empty, alpha=alpha, beta=beta)
    dice_term = mean_over_counted(1 - score, truth, empty=empty, weights=weights)
    present = torch.ones_like(truth) if empty == "smooth" else (truth != 0).to(truth.dtype)
    counted = (weights * (present if empty == "skip" else 1)).sum()
    nll, ce_weights, wrong = sums[:, 3 * c :].sum(0)
    ce_factor = ce_weight / torch.where(ce_weights == 0, torch.ones_like(ce_weights), ce_weights)
    value = dice_weight * dice_term + ce_factor * nll

    denominator = _denominator(intersection, predicted, truth, alpha, beta) + smooth
    denominator = torch.where(present == 0, torch.ones_like(truth), denominator)
    ratio = (2 * intersection + smooth) / denominator
    factor = dice_weight * weights * present / torch.where(counted == 0, torch.ones_like(counted), counted)
    slopes = torch.zeros_like(sums)
    slopes[:, :c] = -factor * 2 / denominator * (1 - (1 - alpha - beta) * ratio)
    slopes[:, c : 2 * c] = factor * 2 * alpha * ratio / denominator
    slopes[:, 3 * c] = ce_factor
    if nan_if_wrong:
        poison = torch.where(wrong > 0, float("nan"), 0.0).to(value.dtype)
        value, slopes = value + poison, slopes + poison
    return value, wrong.clone(), slopes
