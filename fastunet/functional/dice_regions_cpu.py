"""The sums of overlapping regions in plain PyTorch: the specification of ``kernels/dice/regions.py``.

As in ``dice_cpu`` the batch is walked in chunks, so that no memberships of a whole batch exist, and its sigmoid only in
the memory of the gradient. Logits of pixels that count nowhere become -inf, which is surely outside of a region, and
right so: their terms are zero.
"""

from __future__ import annotations

import torch

from fastunet.autograd import tracked
from fastunet.functional.dice_cpu import (
    chunks,
    every_pixel_counts,
    like_chunks,
    rows_of_sums,
    slopes_of_sums,
    sum_dtype,
)


def sums(
    logits: torch.Tensor,
    labels: torch.Tensor,
    region_weights: torch.Tensor | None,
    members: torch.Tensor,
    ignore_index: int | None,
    cross_entropy: bool,
    per_sample: bool,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every sum that the Dice and binary cross-entropy losses of C regions need.

    Args:
        logits: (N, C, S) for S pixels.
        labels: (N, S) integer classes.
        region_weights: (C,) weights of the cross-entropy, or None.
        members: (K,) int32: bit c of entry k says whether region c holds class k.
        ignore_index: the label that counts nowhere, or None.
        cross_entropy: whether its sum is wanted; it is 0 otherwise.
        per_sample: a row of sums for each sample; or one row for the batch.
        keep: from :func:`room_for_probabilities`, filled here for :func:`sums_grad`; or None.

    Returns:
        (R, 3 C + 3) for R rows, in float32 (float64 for float64 logits): I = sum(p t), P = sum(p) and T = sum(t) of
        each region, then the sum of ``w (log(1 + exp(z)) - t z)``, that of w, and the number of labels out of range.
    """
    n, c, pixel_count = logits.shape
    chosen = _Labels(logits, labels, members, ignore_index)
    # Of each region: I, P, T and, if wanted, the cross-entropy; of each sample: pixels left out, and ignored.
    totals = torch.zeros(4, n, c, dtype=torch.float64, device=logits.device)
    left_out, ignored = torch.zeros(2, n, dtype=torch.float64, device=logits.device)
    for samples, pixels, block in chunks(logits, c, 2 + chosen.copies, in_place=keep is not None):
        t, spare = block[:2]
        p = block[-1] if keep is None else keep[samples, :, pixels]
        chosen.fill(t, samples, pixels)
        z = chosen.counted(samples, pixels, block)
        torch.sigmoid(z, out=p)
        totals[1, samples] += p.sum(-1)
        totals[2, samples] += t.sum(-1)
        totals[0, samples] += torch.mul(p, t, out=spare).sum(-1)
        if cross_entropy:
            wrong = torch.mul(t, -2, out=spare).add_(1).mul_(z)  # the logit of the wrong answer
            totals[3, samples] += torch.ops.aten.softplus.out(wrong, 1, 40, out=wrong).sum(-1)
        if not chosen.complete:
            left_out[samples] += (chosen.rows(samples, pixels) == len(members)).sum(1)
        if ignore_index is not None:
            ignored[samples] += (labels[samples, pixels] == ignore_index).sum(1)
    weights = totals.new_ones(c) if region_weights is None else region_weights.double()
    scalars = (totals[3] * weights).sum(1), weights.sum() * (pixel_count - left_out), left_out - ignored
    return rows_of_sums(totals[:3], scalars, per_sample).to(sum_dtype(logits))


def sums_grad(
    grad: torch.Tensor,
    slopes: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    region_weights: torch.Tensor | None,
    members: torch.Tensor,
    ignore_index: int | None,
    cross_entropy: bool,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of a loss of :func:`sums` with respect to the logits.

    With n = dL/d(cross-entropy sum): ``dz = p (1 - p) (dL/dI t + dL/dP) + n w (p - t)``.

    Args:
        grad: scalar, the factor of ``slopes``.
        slopes: (R, 3 C + 3), the loss's derivatives with respect to the sums. Only I, P and the first scalar depend on
            the logits.
        kept: the probabilities that :func:`sums` kept, which the gradient overwrites; or None, to compute them again.

    Returns:
        dz, of the shape, dtype and strides of ``logits``.
    """
    c = logits.shape[1]
    chosen = _Labels(logits, labels, members, ignore_index)
    again = tracked(grad, slopes, logits)
    grad_i, grad_p, grad_ce = slopes_of_sums(grad, slopes, logits)
    if region_weights is not None:
        grad_ce = grad_ce * region_weights.to(grad_ce.dtype)[:, None]
    if again:  # in ordinary PyTorch, which autograd can follow
        everything = slice(None), slice(None)
        t = torch.empty_like(logits, dtype=grad_i.dtype)
        chosen.fill(t, *everything)
        counts = (chosen.rows(*everything) < len(members))[:, None]
        p = torch.where(counts, logits, -torch.inf).to(grad_i.dtype).sigmoid()
        dz = p * (1 - p) * (grad_i * t + grad_p)
        return ((dz + grad_ce * (p - t)) if cross_entropy else dz).to(logits.dtype)
    result = torch.empty_like(logits) if kept is None else kept
    # Where the result has the layout of a chunk, p is in it until dz takes its place.
    in_place = like_chunks(logits, c)
    for samples, pixels, block in chunks(logits, c, 2 + chosen.copies, in_place=in_place):
        t, h, dz = block[0], block[1], result[samples, :, pixels]
        p = dz if in_place else block[-1]
        chosen.fill(t, samples, pixels)
        if kept is None:
            torch.sigmoid(chosen.counted(samples, pixels, block), out=p)
        torch.mul(t, grad_i[samples], out=h).add_(grad_p[samples]).mul_(p)
        h.addcmul_(h, p, value=-1)
        if cross_entropy:
            h.addcmul_(torch.sub(p, t, out=t), grad_ce[samples].expand_as(t))
        dz.copy_(h)
    return result


def room_for_probabilities(logits: torch.Tensor) -> torch.Tensor | None:
    """Memory in which :func:`sums` can keep p until :func:`sums_grad` turns it into dz, or None; as in ``dice_cpu``."""
    return torch.empty_like(logits) if logits.device.type == "cpu" and like_chunks(logits, logits.shape[1]) else None


class _Labels:
    """The memberships of a batch's pixels, by a table of classes with one row more for pixels that count nowhere.

    ``complete``: every pixel counts. ``copies``: how many buffers of a chunk :meth:`counted` needs, 0 or 1.
    """

    def __init__(self, logits: torch.Tensor, labels: torch.Tensor, members: torch.Tensor, ignore_index: int | None):
        self.logits, self.labels, self.ignore_index, self.classes = logits, labels, ignore_index, len(members)
        self.complete = every_pixel_counts(labels, self.classes, ignore_index)
        self.copies = 0 if self.complete and like_chunks(logits, logits.shape[1]) else 1
        bits = members >> torch.arange(logits.shape[1], dtype=torch.int32, device=members.device)[:, None] & 1
        self.table = torch.nn.functional.pad(bits, (0, 1)).to(sum_dtype(logits))
        # fmin() takes the other operand where one is NaN, and so leaves the logits of pixels that count as they are.
        self.limits = torch.full((self.classes + 1,), torch.nan, dtype=self.table.dtype, device=members.device)
        self.limits[-1] = -torch.inf

    def rows(self, samples: slice, pixels: slice) -> torch.Tensor:
        """(N, S) row numbers of the table."""
        labels = self.labels[samples, pixels]
        if not self.complete:
            counts = (labels >= 0) & (labels < self.classes)
            if self.ignore_index is not None:
                counts &= labels != self.ignore_index
            labels = torch.where(counts, labels, self.classes)
        return labels.to(torch.int32)

    def fill(self, t: torch.Tensor, samples: slice, pixels: slice) -> None:
        """Writes the memberships, (N, C, S), 0 where a pixel counts nowhere."""
        for target, rows in zip(t, self.rows(samples, pixels), strict=True):
            torch.index_select(self.table, 1, rows, out=target)

    def counted(self, samples: slice, pixels: slice, block: torch.Tensor) -> torch.Tensor:
        """The logits, -inf where a pixel counts nowhere, in the sums' dtype; in the third buffer of ``block`` if they
        have to be copied."""
        z = self.logits[samples, :, pixels]
        if not self.copies:
            return z
        if self.complete:
            return block[2].copy_(z)
        limits = self.limits[self.rows(samples, pixels)][:, None]
        return torch.fmin(z, limits, out=block[2])
