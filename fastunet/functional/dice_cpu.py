"""The sums of the Dice operators in plain PyTorch: the specification of ``kernels/dice.py``, and its form on a CPU.

The image is walked in chunks of pixels that fit a core's cache, so that neither a one-hot tensor nor the softmax of a
whole image exists. Pixels whose label is ``ignore_index`` or out of range count nowhere. Everywhere C is the number of
channels and K = max(C, 2) the number of classes: one channel is the logit of the second of two classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

_CHUNK_BYTES = 256 * 1024
"""Of a chunk's probabilities, per thread: with its logits and gradient it stays in a second-level cache of 1 MiB."""

NONE_WRONG = -(2**31)
"""Stands for "no value is out of range" in :func:`confusion`."""


def sums(
    logits: torch.Tensor, targets: torch.Tensor, class_weights: torch.Tensor | None, ignore_index: int | None
) -> torch.Tensor:
    """Per sample every sum that the Dice and cross-entropy losses need.

    Args:
        logits: (N, C, S) for S pixels.
        targets: (N, S) integer labels, or (N, C, S) memberships in [0, 1].
        class_weights: (K,) weights of the cross-entropy, or None.
        ignore_index: the label that counts nowhere, or None.

    Returns:
        (N, 3 C + 3) in float32 (float64 for float64 logits): I = sum(p t), P = sum(p) and T = sum(t) of each channel,
        then ``sum(-w_t t log p)``, ``sum(w_t t)`` and the number of labels out of range.
    """
    n, c = logits.shape[:2]
    totals = torch.zeros(n, 3, max(c, 2), dtype=torch.float64, device=logits.device)
    scalars = torch.zeros(n, 3, dtype=torch.float64, device=logits.device)
    for sample, pixels in _chunks(logits.shape):
        z = _class_logits(logits[sample, :, pixels])
        if targets.ndim == 3:
            _add_soft_sums(
                z, _memberships(targets[sample, :, pixels], z), class_weights, totals[sample], scalars[sample]
            )
        else:
            _add_hard_sums(z, targets[sample, pixels], class_weights, ignore_index, totals[sample], scalars[sample])
    return torch.cat([totals[:, :, max(c, 2) - c :].flatten(1), scalars], 1).to(sum_dtype(logits))


def _add_hard_sums(z, labels, class_weights, ignore_index, totals, scalars) -> None:
    label, valid, invalid = _labels(labels, len(z), ignore_index)
    log_p = z.log_softmax(0)
    log_p_true = log_p.gather(0, label[None])[0]
    weight = valid.to(z.dtype) if class_weights is None else class_weights.to(z.dtype)[label] * valid
    scalars[0] -= torch.where(weight == 0, 0.0, log_p_true * weight).sum()
    scalars[1] += weight.sum()
    scalars[2] += invalid
    counts = valid.double()
    totals[0].scatter_add_(0, label, log_p_true.exp().double() * counts)
    totals[1] += log_p.exp_().mul_(valid).sum(1)
    totals[2].scatter_add_(0, label, counts)


def _add_soft_sums(z, t, class_weights, totals, scalars) -> None:
    log_p = z.log_softmax(0)
    weighted = t if class_weights is None else t * class_weights.to(z.dtype)[:, None]
    # A class that is impossible (log p = -inf) and not true must give 0, not NaN.
    scalars[0] -= torch.where(weighted == 0, 0.0, log_p * weighted).sum()
    scalars[1] += weighted.sum()
    p = log_p.exp_()
    totals[0] += (p * t).sum(1)
    totals[1] += p.sum(1)
    totals[2] += t.sum(1)


def sums_grad(
    grad: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None,
    ignore_index: int | None,
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
    grad_i, grad_p = (torch.nn.functional.pad(grad[:, j * c : (j + 1) * c], (k - c, 0)) for j in (0, 1))
    grad_nll = grad[:, 3 * c]
    result = torch.empty_like(logits)
    for sample, pixels in _chunks(logits.shape):
        z = _class_logits(logits[sample, :, pixels])
        at = grad_i[sample].to(z.dtype), grad_p[sample].to(z.dtype), grad_nll[sample].to(z.dtype), class_weights
        if targets.ndim == 3:
            dz = _soft_grad(z, _memberships(targets[sample, :, pixels], z), *at)
        else:
            dz = _hard_grad(z, targets[sample, pixels], *at, ignore_index)
        result[sample, :, pixels] = dz[k - c :]
    return result


def _hard_grad(z, labels, grad_i, grad_p, grad_nll, class_weights, ignore_index) -> torch.Tensor:
    label, valid, _ = _labels(labels, len(z), ignore_index)
    p = z.softmax(0)
    p_true = p.gather(0, label[None])[0]
    from_intersection = p_true * grad_i[label]
    from_nll = grad_nll if class_weights is None else grad_nll * class_weights.to(z.dtype)[label]
    mean = (p * grad_p[:, None]).sum(0) + from_intersection - from_nll
    dz = p.mul_(grad_p[:, None] - mean)
    dz.scatter_add_(0, label[None], (from_intersection - from_nll)[None])
    return dz.mul_(valid)


def _soft_grad(z, t, grad_i, grad_p, grad_nll, class_weights) -> torch.Tensor:
    p = z.softmax(0)
    weighted = grad_nll * (t if class_weights is None else t * class_weights.to(z.dtype)[:, None])
    g = torch.addcmul(grad_p[:, None], grad_i[:, None], t)
    mean = (p * g).sum(0) - weighted.sum(0)
    return p.mul_(g - mean) - weighted


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
    n, s = labels.shape
    result = torch.zeros(n, classes * classes + 2, dtype=torch.int64, device=labels.device)
    result[:, -1] = NONE_WRONG
    for sample, pixels in _chunks((n, predictions.shape[1] if predictions.ndim == 3 else 1, s)):
        truth = labels[sample, pixels].long()
        if predictions.ndim == 3:
            predicted = _class_logits(predictions[sample, :, pixels]).argmax(0)
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


def _chunks(shape: tuple[int, int, int]) -> Iterator[tuple[int, slice]]:
    n, c, s = shape
    chunk = max(1, _CHUNK_BYTES * torch.get_num_threads() // (4 * max(c, 2)))
    for sample in range(n):
        for start in range(0, s, chunk):
            yield sample, slice(start, min(start + chunk, s))


def _class_logits(z: torch.Tensor) -> torch.Tensor:
    """(C, chunk) logits as a contiguous (K, chunk) tensor of at least float32."""
    z = z.to(sum_dtype(z)).contiguous()
    return z if len(z) > 1 else torch.cat([torch.zeros_like(z), z])


def _memberships(t: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
    """(C, chunk) memberships as (K, chunk) in the dtype of the class logits ``z``."""
    t = t.to(z.dtype).contiguous()
    return t if len(t) > 1 else torch.cat([1 - t, t])


def _labels(labels: torch.Tensor, classes: int, ignore_index: int | None):
    """Labels as int64 with 0 where they do not count, whether they count, and how many are out of range."""
    label = labels.long()
    in_range = (label >= 0) & (label < classes)
    valid = in_range if ignore_index is None else in_range & (label != ignore_index)
    wrong = ~in_range if ignore_index is None else ~in_range & (label != ignore_index)
    return torch.where(valid, label, 0), valid, wrong.sum()
