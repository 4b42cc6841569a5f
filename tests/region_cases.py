"""Batches for the tests of the losses of regions, and the loss as one would write it without a library."""

from __future__ import annotations

import torch
import torch.nn.functional as F

BRATS = [(1, 2, 3), (1, 3), (3,)]
"""Whole tumour, tumour core and enhancing tumour."""
NESTED = [(1,), (4,), (1, 4), (2, 3, 4), (3,)]
"""Five regions of six classes, of which class 5 is in none."""


def targets_of(labels, regions, dtype):
    """(N, R, ...) memberships, 0 or 1."""
    rows = [torch.isin(labels.long(), torch.tensor(members, device=labels.device)) for members in regions]
    return torch.stack(rows, 1).to(dtype)


def sums_of(logits, labels, regions, classes, weights, ignore):
    """(N, 3 R + 3): I, P, T, the weighted cross-entropy, the weights and the labels out of range, one by one."""
    valid = (labels.long() >= 0) & (labels.long() < classes) & (True if ignore is None else labels != ignore)
    wrong = ~valid & (True if ignore is None else labels != ignore)
    counts = valid[:, None].to(logits.dtype)
    t = targets_of(labels, regions, logits.dtype) * counts
    p = logits.sigmoid() * counts
    w = torch.ones(len(regions), device=logits.device) if weights is None else weights
    w = w.to(logits.dtype)[:, None] * counts
    loss = F.binary_cross_entropy_with_logits(logits, t, reduction="none") * w
    scalars = torch.stack([loss.sum((1, 2)), w.sum((1, 2)), wrong.sum(1).to(logits.dtype)], 1)
    return torch.cat([(p * t).sum(2), p.sum(2), t.sum(2), scalars], 1)


def literal(logits, labels, regions, *, weights=None, ignore=None, smooth=1.0, reduction="batch", ce_weight=1.0,
            dice_weight=1.0, empty="smooth"):  # fmt: skip
    """The loss by memberships in memory, option by option."""
    r = len(regions)
    sums = sums_of(logits.flatten(2), labels.flatten(1), regions, 128, weights, ignore)
    sums = sums.sum(0, keepdim=True) if reduction == "batch" else sums
    i, p, t = sums[:, :r], sums[:, r : 2 * r], sums[:, 2 * r : 3 * r]
    scores = (2 * i + smooth) / (p + t + smooth)
    if empty == "one":
        scores = torch.where(t > 0, scores, (p == 0).to(p.dtype))
    w = torch.ones(r, dtype=p.dtype, device=p.device) if weights is None else weights.to(p.dtype)
    w = (w * ((t > 0) if empty == "skip" else 1)).expand_as(scores)
    cross_entropy = sums[:, 3 * r].sum() / sums[:, 3 * r + 1].sum()
    return dice_weight * (w * (1 - scores)).sum() / w.sum() + ce_weight * cross_entropy
