"""The sums of the Dice operators in plain PyTorch: the specification of ``kernels/dice.py``, and its form on a CPU.

The image is walked in chunks of pixels that fit a core's cache, so that neither a one-hot tensor nor the softmax of a
whole image exists. Pixels whose label is ``ignore_index`` or out of range count nowhere. Everywhere C is the number of
channels and K = max(C, 2) the number of classes: one channel is the logit of the second of two classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

NONE_WRONG = -(2**31)
"""Stands for "no value is out of range" in :func:`confusion`."""

_CHUNK_BYTES = 512 * 1024
"""Of a chunk's probabilities, per thread. Smaller chunks spend more on starting operations than their cache saves."""

_LOG2_E = 1 / math.log(2)


def sums(
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None,
    ignore_index: int | None,
    cross_entropy: bool,
) -> torch.Tensor:
    """Per sample every sum that the Dice and cross-entropy losses need.

    Args:
        logits: (N, C, S) for S pixels.
        targets: (N, S) integer labels, or (N, C, S) memberships in [0, 1].
        class_weights: (K,) weights of the cross-entropy, or None.
        ignore_index: the label that counts nowhere, or None.
        cross_entropy: whether its sum is wanted; it is 0 otherwise.

    Returns:
        (N, 3 C + 3) in float32 (float64 for float64 logits): I = sum(p t), P = sum(p) and T = sum(t) of each channel,
        then ``sum(-w_t t log p)``, ``sum(w_t t)`` and the number of labels out of range.
    """
    n, c = logits.shape[:2]
    k = max(c, 2)
    # Of each class: I, P, T and, if wanted, sum(t log p).
    totals = torch.zeros(n, 4, k, dtype=torch.float64, device=logits.device)
    ignored = torch.zeros(n, dtype=torch.float64, device=logits.device)
    for sample, pixels, block in _chunks(logits, 4):
        product, p, t, log_p = (block[i] for i in range(4))
        ignored[sample] += _fill_memberships(t, targets[sample, ..., pixels], ignore_index)
        total = _fill_softmax(p, log_p, logits[sample, :, pixels], t if targets.ndim == 2 else None)
        torch.mul(p, t, out=product)
        if cross_entropy:
            # 0 · -inf, a class that is impossible and not true, is 0. NaN logits still show: in P.
            log_p.sub_(total.log_()).mul_(t).nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        rows = 4 if cross_entropy else 3
        totals[sample, :rows] += block[:rows].sum(-1)
    weights = totals.new_ones(k) if class_weights is None else class_weights.double()
    wrong = logits.shape[2] - totals[:, 2].sum(1) - ignored if targets.ndim == 2 else torch.zeros_like(ignored)
    scalars = torch.stack([-(totals[:, 3] * weights).sum(1), (totals[:, 2] * weights).sum(1), wrong], 1)
    return torch.cat([totals[:, :3, k - c :].flatten(1), scalars], 1).to(sum_dtype(logits))


def sums_grad(
    grad: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None,
    ignore_index: int | None,
    cross_entropy: bool,
) -> torch.Tensor:
    """The gradient of :func:`sums` with respect to the logits.

    With g = dL/dI t + dL/dP per class, n = dL/d(cross-entropy sum) and W = sum_k w_k t_k per pixel:
    ``dz_c = p_c (g_c - sum_k p_k g_k) + n (p_c W - w_c t_c)``.

    Args:
        grad: (N, 3 C + 3), the loss's gradient with respect to the sums; only I, P and the first scalar depend on z.

    Returns:
        dz, of the shape, dtype and strides of ``logits``.
    """
    c = logits.shape[1]
    k = max(c, 2)
    grad_i, grad_p = (torch.nn.functional.pad(grad[:, j * c : (j + 1) * c], (k - c, 0))[..., None] for j in (0, 1))
    grad_nll = grad[:, 3 * c, None, None]
    if class_weights is not None:
        grad_nll = grad_nll * class_weights.to(grad.dtype)[:, None]
    result = torch.empty_like(logits)
    for sample, pixels, block in _chunks(logits, 4):
        g, p, t, product = (block[i] for i in range(4))
        _fill_memberships(t, targets[sample, ..., pixels], ignore_index)
        _fill_softmax(p, g, logits[sample, :, pixels], t if targets.ndim == 2 else None)
        torch.mul(t, grad_i[sample], out=g).add_(grad_p[sample])
        mean = torch.mul(p, g, out=product).sum(0)
        if cross_entropy:
            weighted = t.mul_(grad_nll[sample])
            dz = p.mul_(g.sub_(mean.sub_(weighted.sum(0)))).sub_(weighted)
        else:
            dz = p.mul_(g.sub_(mean))
        result[sample, :, pixels] = dz[k - c :]
    return result


def confusion(predictions: torch.Tensor, labels: torch.Tensor, classes: int, ignore_index: int | None) -> torch.Tensor:
    """Counts of (truth, prediction) pairs per sample, and of the values that are out of range.

    Args:
        predictions: (N, C, S) logits, of which the first maximum is the prediction (of one logit: the second of two
            classes where it is positive), or (N, S) integer labels.
        labels: (N, S) integers.
        classes: K, at least C.

    Returns:
        (N, K² + 2) int64: the matrix row by row (rows truth), the number of pixels left out because their label or
        prediction is out of range, and the greatest such value (:data:`NONE_WRONG` if there is none).
    """
    n = len(labels)
    result = torch.zeros(n, classes * classes + 2, dtype=torch.int64, device=labels.device)
    result[:, -1] = NONE_WRONG
    for sample, pixels, block in _chunks(predictions if predictions.ndim == 3 else predictions[:, None], 1):
        truth = labels[sample, pixels].long()
        if predictions.ndim == 3:
            _copy_logits(block[0], predictions[sample, :, pixels])
            predicted = block[0].argmax(0)
        else:
            predicted = predictions[sample, pixels].long()
        counted = torch.ones_like(truth, dtype=torch.bool) if ignore_index is None else truth != ignore_index
        truth_wrong, predicted_wrong = (counted & ((v < 0) | (v >= classes)) for v in (truth, predicted))
        wrong = truth_wrong | predicted_wrong
        # The entry after the matrix collects the wrong pixels; ignored ones add nothing to it.
        pair = torch.where(counted & ~wrong, truth * classes + predicted, classes * classes)
        result[sample, :-1].scatter_add_(0, pair, counted.long())
        for values, out_of_range in ((truth, truth_wrong), (predicted, predicted_wrong)):
            result[sample, -1] = torch.maximum(result[sample, -1], torch.where(out_of_range, values, NONE_WRONG).amax())
    return result


def sum_dtype(logits: torch.Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def _chunks(logits: torch.Tensor, buffers: int) -> Iterator[tuple[int, slice, torch.Tensor]]:
    """The sample and pixels of each chunk, and a (buffers, K, chunk) block of memory that the next one overwrites."""
    n, c, s = logits.shape
    k = max(c, 2)
    most = max(1, _CHUNK_BYTES * torch.get_num_threads() // (4 * k))
    chunk = -(-s // max(1, -(-s // most)))
    memory = torch.empty(buffers * k * chunk, dtype=sum_dtype(logits), device=logits.device)
    for sample in range(n):
        for start in range(0, s, chunk):
            pixels = slice(start, min(start + chunk, s))
            size = pixels.stop - start
            yield sample, pixels, memory[: buffers * k * size].view(buffers, k, size)


def _fill_memberships(t: torch.Tensor, targets: torch.Tensor, ignore_index: int | None) -> torch.Tensor | int:
    """Writes the (K, chunk) memberships of a chunk's targets, 0 where a pixel counts nowhere; returns the ignored."""
    k = len(t)
    if targets.ndim == 2:
        t[k - len(targets) :] = targets
        if len(targets) < k:
            torch.sub(1, t[1], out=t[0])
        return 0
    labels, ignored = targets.to(t.dtype), 0
    if ignore_index is not None:
        at = targets == ignore_index
        ignored = at.sum()
        labels = labels.masked_fill(at, -1)
    # Comparing floats into floats is vectorised; comparing integers into booleans takes five times as long.
    torch.eq(labels, torch.arange(k, dtype=t.dtype, device=t.device)[:, None], out=t)
    return ignored


def _fill_softmax(
    p: torch.Tensor, shifted: torch.Tensor, logits: torch.Tensor, hard: torch.Tensor | None
) -> torch.Tensor:
    """Writes ``shifted`` = z - max z and ``p`` = softmax(z) over the classes; returns sum(exp(z - max z)).

    With ``hard`` memberships p is 0 at the pixels that belong to no class.
    """
    _copy_logits(shifted, logits)
    shifted -= shifted.amax(0)
    # exp2 is vectorised in PyTorch where exp is not, and takes a third of its time.
    total = torch.mul(shifted, _LOG2_E, out=p).exp2_().sum(0)
    p *= 1 / total if hard is None else hard.sum(0) / total
    return total


def _copy_logits(z: torch.Tensor, logits: torch.Tensor) -> None:
    """(C, chunk) ``logits`` into (K, chunk) ``z``."""
    z[len(z) - len(logits) :] = logits
    if len(logits) < len(z):
        z[0] = 0
