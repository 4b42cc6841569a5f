"""The loss of the sums that ``sums.py`` yields, and its slopes with respect to them: one program, whatever the batch.

In PyTorch this is some fifty operations on a few hundred numbers. Each costs a GPU a launch, and all together more than
the two passes over the logits.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _launch

_TILE = 1024
"""Entries of a tile, several of which are in registers at a time: 8 a thread at 4 warps."""


@triton.jit
def _load(sums_ptr, first, R, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """I, P and T of rows from ``first``, (BLOCK_R, BLOCK_C) each, their offsets and mask."""
    offs_r, offs_c = first + tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    at = offs_r.to(tl.int64)[:, None] * (3 * C + 3) + offs_c[None, :]
    mask = (offs_r < R)[:, None] & (offs_c < C)[None, :]
    i = tl.load(sums_ptr + at, mask=mask, other=0.0)
    p = tl.load(sums_ptr + at + C, mask=mask, other=0.0)
    t = tl.load(sums_ptr + at + 2 * C, mask=mask, other=0.0)
    return i, p, t, at, mask


@triton.jit
def _present(t, EMPTY: tl.constexpr):
    """Where the ratio itself is the score: everywhere, or by the other rules where there is truth."""
    if EMPTY == "smooth":
        return tl.full(t.shape, 1, tl.int1)
    else:
        return t != 0


@triton.jit
def dice_rule_kernel(
    sums_ptr, weights_ptr, loss_ptr, wrong_ptr, slopes_ptr, R, smooth, alpha, beta, rest, dice_weight, ce_weight,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, FIRST: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    EMPTY: tl.constexpr, NAN_IF_WRONG: tl.constexpr,
):  # fmt: skip
    """loss = dice_weight · mean(1 - D) + ce_weight · cross-entropy over R rows of sums; the number of wrong labels.

    D = (2 I + s) / (2 (rest I + alpha P + beta T) + s), with rest = 1 - alpha - beta.
    """
    offs_r, offs_c = tl.arange(0, BLOCK_R), tl.arange(0, BLOCK_C)
    class_weight = ((offs_c >= FIRST) & (offs_c < C)).to(tl.float32)[None, :]
    if HAS_WEIGHTS:
        class_weight *= tl.load(weights_ptr + offs_c, mask=offs_c < C, other=0.0)[None, :]
    lost = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    weights = tl.zeros((BLOCK_R, BLOCK_C), tl.float32)
    nll = tl.zeros((BLOCK_R,), tl.float32)
    ce_weights = tl.zeros((BLOCK_R,), tl.float32)
    wrong = tl.zeros((BLOCK_R,), tl.float32)
    for first in range(0, R, BLOCK_R):
        scalars = sums_ptr + (first + offs_r).to(tl.int64) * (3 * C + 3) + 3 * C
        nll += tl.load(scalars, mask=first + offs_r < R, other=0.0)
        ce_weights += tl.load(scalars + 1, mask=first + offs_r < R, other=0.0)
        wrong += tl.load(scalars + 2, mask=first + offs_r < R, other=0.0)
        i, p, t, _, mask = _load(sums_ptr, first, R, C, BLOCK_R, BLOCK_C)
        present = _present(t, EMPTY)
        score = (2 * i + smooth) / tl.where(present & mask, 2 * (rest * i + (alpha * p + beta * t)) + smooth, 1.0)
        weight = tl.where(mask, class_weight, 0.0)
        if EMPTY == "one":
            score = tl.where(present, score, (p == 0).to(tl.float32))
        if EMPTY == "skip":
            weight = tl.where(present, weight, 0.0)
            score = tl.where(present, score, 1.0)
        lost += weight * (1 - score)
        weights += weight
    weight, ce_total, wrong = tl.sum(tl.sum(weights, axis=1)), tl.sum(ce_weights), tl.sum(wrong)
    dice_factor = dice_weight / tl.where(weight == 0, 1.0, weight)
    ce_factor = ce_weight / tl.where(ce_total == 0, 1.0, ce_total)
    loss = dice_factor * tl.sum(tl.sum(lost, axis=1)) + ce_factor * tl.sum(nll)
    if NAN_IF_WRONG:
        poison = tl.where(wrong > 0, float("nan"), 0.0)
    else:
        poison = 0.0
    tl.store(loss_ptr, loss + poison)
    tl.store(wrong_ptr, wrong)
    for first in range(0, R, BLOCK_R):
        i, p, t, at, mask = _load(sums_ptr, first, R, C, BLOCK_R, BLOCK_C)
        denominator = 2 * (rest * i + (alpha * p + beta * t)) + smooth
        inverse = 1 / tl.where(_present(t, EMPTY) & mask, denominator, 1.0)
        factor = tl.where(_present(t, EMPTY), -dice_factor * class_weight, 0.0) * inverse
        score = (2 * i + smooth) * inverse
        tl.store(slopes_ptr + at, 2 * factor * (1 - rest * score) + poison, mask=mask)
        tl.store(slopes_ptr + at + C, -2 * alpha * factor * score + poison, mask=mask)
        tl.store(slopes_ptr + at + 2 * C, tl.zeros_like(t) + poison, mask=mask)
        scalars = slopes_ptr + (first + offs_r).to(tl.int64) * (3 * C + 3) + 3 * C
        tl.store(scalars, tl.zeros_like(nll) + ce_factor + poison, mask=first + offs_r < R)
        tl.store(scalars + 1, tl.zeros_like(nll) + poison, mask=first + offs_r < R)
        tl.store(scalars + 2, tl.zeros_like(nll) + poison, mask=first + offs_r < R)


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
    """The loss and the number of labels out of range, both float32 scalars, and d loss / d sums.

    Args:
        sums: (R, 3 C + 3) float32 from ``dice.sums``.
        class_weights: (C,) float32 weights of the mean over classes, or None.
        smooth, empty, include_background, dice_weight, ce_weight: as in ``dice_cross_entropy``.
        nan_if_wrong: make the loss and its slopes NaN if a label was out of range.
        alpha, beta: the factors of false positives and false negatives in the ratio.
    """
    rows, c = sums.shape[0], sums.shape[1] // 3 - 1
    block_c = _launch.next_power_of_2(c)
    loss, wrong = (_launch.empty((), torch.float32, sums.device) for _ in range(2))
    slopes = _launch.empty(tuple(sums.shape), torch.float32, sums.device)
    _launch.launch(
        dice_rule_kernel, (1,), sums.contiguous(), class_weights, loss, wrong, slopes, rows, smooth, alpha, beta,
        1 - alpha - beta, dice_weight, ce_weight, C=c,
        BLOCK_R=min(_launch.next_power_of_2(max(rows, 1)), _TILE // block_c), BLOCK_C=block_c,
        FIRST=0 if include_background else 1, HAS_WEIGHTS=class_weights is not None, EMPTY=empty,
        NAN_IF_WRONG=nan_if_wrong,
    )  # fmt: skip
    return loss, wrong, slopes
