"""The sums of the Dice losses in plain PyTorch: the specification of ``kernels/dice/sums.py``, and its form on a CPU.

The batch is walked in chunks of images or of pixels, a few megabytes each, so that no one-hot tensor of a whole batch
exists, and its softmax only in the memory of the gradient. Pixels whose label is ``ignore_index`` or out of range count
nowhere. Everywhere C is the number of channels and K = max(C, 2) the number of classes: one channel is the logit of the
second of two classes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from fastunet.autograd import tracked

_CHUNK_BYTES = 4 * 1024 * 1024
"""Of a chunk's probabilities, for two threads. Each operation on a chunk ends with threads that wait for each other."""

_LEAST_PROBABILITY = 1e-30
"""Below, float32 probabilities are about to lose digits, and then to become zero: the logarithm of one is no use."""


def sums(
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None,
    ignore_index: int | None,
    cross_entropy: bool,
    per_sample: bool,
    label_smoothing: float = 0.0,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Every sum that the Dice and cross-entropy losses need.

    Args:
        logits: (N, C, S) for S pixels.
        targets: (N, S) integer labels, or (N, C, S) memberships in [0, 1].
        class_weights: (K,) weights of the cross-entropy, or None.
        ignore_index: the label that counts nowhere, or None.
        cross_entropy: whether its sum is wanted; it is 0 otherwise.
        per_sample: a row of sums for each sample; or one row for the batch.
        label_smoothing: e, which makes t of the cross-entropy (1 - e) t + e / K; its sum of weights stays that of t.
        keep: from :func:`room_for_probabilities`, filled here for :func:`sums_grad`; or None.

    Returns:
        (R, 3 C + 3) for R rows, in float32 (float64 for float64 logits): I = sum(p t), P = sum(p) and T = sum(t) of
        each channel, then ``sum(-w_t t log p)``, ``sum(w_t t)`` and the number of labels out of range.
    """
    n, c, pixel_count = logits.shape
    k = max(c, 2)
    numbers, complete = _class_numbers(logits), every_pixel_counts(targets, k, ignore_index)
    # Of each class: I, P, T and, if wanted, sum(t log p).
    totals = torch.zeros(4, n, k, dtype=torch.float64, device=logits.device)
    ignored = torch.zeros(n, dtype=torch.float64, device=logits.device)
    for samples, pixels, block in chunks(logits, k, 1 + cross_entropy, in_place=keep is not None):
        t, z = block[0], logits[samples, :, pixels]
        product = block[1] if cross_entropy else t
        p = torch.softmax(class_logits(t, z), 1, out=block[-1] if keep is None else keep[samples, :, pixels])
        ignored[samples] += _fill_memberships(t, targets[samples, ..., pixels], numbers, ignore_index)
        if not complete:
            p *= t.sum(1, keepdim=True)
        totals[1, samples] += p.sum(-1)
        totals[2, samples] += t.sum(-1)
        totals[0, samples] += torch.mul(p, t, out=product).sum(-1)
        if cross_entropy:
            if label_smoothing:
                _smooth(t, targets, label_smoothing)
            totals[3, samples] += _log_likelihood(product, t, z, labels=targets.ndim == 2 and not label_smoothing)
    weights = totals.new_ones(k) if class_weights is None else class_weights.double()
    wrong = pixel_count - totals[2].sum(1) - ignored if targets.ndim == 2 else torch.zeros_like(ignored)
    scalars = -(totals[3] * weights).sum(1), (totals[2] * weights).sum(1), wrong
    return rows_of_sums(totals[:3, :, k - c :], scalars, per_sample).to(sum_dtype(logits))


def sums_grad(
    grad: torch.Tensor,
    slopes: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None,
    ignore_index: int | None,
    cross_entropy: bool,
    label_smoothing: float = 0.0,
    kept: torch.Tensor | None = None,
) -> torch.Tensor:
    """The gradient of a loss of :func:`sums` with respect to the logits.

    With g = dL/dI t + dL/dP per class, n = dL/d(cross-entropy sum) and W = sum_k w_k t_k per pixel:
    ``dz_c = p_c (g_c - sum_k p_k g_k) + n (p_c W - w_c t_c)``; with the gradient with respect to log p,
    h_c = p_c g_c - n w_c t_c, that is ``dz_c = h_c - p_c sum_k h_k``.

    Args:
        grad: scalar, the factor of ``slopes``.
        slopes: (R, 3 C + 3), the loss's derivatives with respect to the sums. Only I, P and the first scalar depend on
            the logits.
        kept: the probabilities that :func:`sums` kept, which the gradient overwrites; or None, to compute them again.

    Returns:
        dz, of the shape, dtype and strides of ``logits``.
    """
    if tracked(grad, slopes, logits):
        options = class_weights, ignore_index, cross_entropy, label_smoothing
        return _sums_grad_plainly(grad, slopes, logits, targets, *options)
    c = logits.shape[1]
    k = max(c, 2)
    *grads, grad_nll = slopes_of_sums(grad, slopes, logits)
    grad_i, grad_p = (torch.nn.functional.pad(slope, (0, 0, k - c, 0)) for slope in grads)
    if class_weights is not None:
        grad_nll = grad_nll * class_weights.to(grad_nll.dtype)[:, None]
    result, numbers = torch.empty_like(logits) if kept is None else kept, _class_numbers(logits)
    complete = every_pixel_counts(targets, k, ignore_index)
    # Where the result has the layout of a chunk, p is in it until dz takes its place.
    in_place = like_chunks(logits, k)
    for samples, pixels, block in chunks(logits, k, 1 + cross_entropy, in_place=in_place):
        t, dz = block[0], result[samples, :, pixels]
        h, p = block[1] if cross_entropy else t, dz if in_place else block[-1]
        if kept is None:
            torch.softmax(class_logits(t, logits[samples, :, pixels]), 1, out=p)
        _fill_memberships(t, targets[samples, ..., pixels], numbers, ignore_index)
        if kept is None and not complete:
            p *= t.sum(1, keepdim=True)
        torch.mul(t, grad_i[samples], out=h).add_(grad_p[samples]).mul_(p)
        if cross_entropy:
            if label_smoothing:
                _smooth(t, targets, label_smoothing)
            h.addcmul_(t, grad_nll[samples], value=-1)
        torch.addcmul(h[:, k - c :], p[:, k - c :], h.sum(1, keepdim=True), value=-1, out=dz)
    return result


def _sums_grad_plainly(
    grad: torch.Tensor, slopes: torch.Tensor, logits: torch.Tensor, targets: torch.Tensor,
    class_weights: torch.Tensor | None, ignore_index: int | None, cross_entropy: bool, label_smoothing: float,
) -> torch.Tensor:
    """:func:`sums_grad` in ordinary PyTorch, which autograd can follow."""
    c = logits.shape[1]
    z = logits.to(sum_dtype(logits))
    if c == 1:
        z = torch.cat([torch.zeros_like(z), z], 1)
    t = torch.empty_like(z)
    _fill_memberships(t, targets, _class_numbers(logits), ignore_index)
    p = z.softmax(1)
    if targets.ndim == 2:
        p = p * t.sum(1, keepdim=True)
    *grads, grad_nll = slopes_of_sums(grad, slopes, logits)
    grad_i, grad_p = (torch.nn.functional.pad(slope, (0, 0, z.shape[1] - c, 0)) for slope in grads)
    h = p * (grad_i * t + grad_p)
    if cross_entropy:
        if label_smoothing:
            t = t.clone()  # autograd keeps the other
            _smooth(t, targets, label_smoothing)
        weights = t.new_ones(z.shape[1]) if class_weights is None else class_weights.to(t.dtype)
        h = h - grad_nll * weights[:, None] * t
    return (h - p * h.sum(1, keepdim=True))[:, z.shape[1] - c :].to(logits.dtype)


def room_for_probabilities(logits: torch.Tensor) -> torch.Tensor | None:
    """Memory in which :func:`sums` can keep p until :func:`sums_grad` turns it into dz, or None.

    It spares the second softmax, a third of the work, and costs no memory at the peak. None where p does not have the
    layout and dtype of dz (16-bit logits, channels_last, one logit) and on a GPU.
    """
    kept = logits.device.type == "cpu" and like_chunks(logits, max(logits.shape[1], 2))
    return torch.empty_like(logits) if kept else None


def sum_dtype(logits: torch.Tensor) -> torch.dtype:
    """float64 for float64 logits, else float32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def rows_of_sums(totals: torch.Tensor, scalars: tuple[torch.Tensor, ...], per_sample: bool) -> torch.Tensor:
    """(R, 3 C + 3) of ``totals``, (3, N, C) with I, P and T, and three ``scalars``, (N,) each."""
    rows = torch.cat([*totals, torch.stack(scalars, 1)], 1)
    return rows if per_sample else rows.sum(0, keepdim=True)


def slopes_of_sums(
    grad: torch.Tensor, slopes: torch.Tensor, logits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """dL/dI and dL/dP, (N, C, 1), and dL/d(cross-entropy sum), (N, 1, 1), of ``grad`` times rows of ``slopes``."""
    n, c, _ = logits.shape
    rows = (grad * slopes).expand(n, -1)[..., None]
    return rows[:, :c], rows[:, c : 2 * c], rows[:, 3 * c, None]


def chunks(
    logits: torch.Tensor, rows: int, buffers: int, in_place: bool = True
) -> Iterator[tuple[slice, slice, torch.Tensor]]:
    """The samples and pixels of each chunk, and a (buffers, samples, rows, pixels) block that the next one overwrites.

    A chunk is part of one image, or as many small images as fit. Unless p is made ``in_place``, in memory of the
    gradient, there is one buffer more. Then, and for parts of images, which operations copy, a chunk has half the size.
    """
    n, _, s = logits.shape
    buffers += not in_place
    most = max(1, _CHUNK_BYTES * max(1, torch.get_num_threads() // 2) // (4 * rows))
    if s > most or not in_place:
        most = max(1, most // 2)
    chunk = max(1, -(-s // max(1, -(-s // most))))
    images = max(1, min(n, most // max(1, s)))
    memory = torch.empty(buffers * images * rows * chunk, dtype=sum_dtype(logits), device=logits.device)
    for sample in range(0, n, images):
        count = min(images, n - sample)
        for start in range(0, s, chunk):
            size = min(chunk, s - start)
            block = memory[: buffers * count * rows * size].view(buffers, count, rows, size)
            yield slice(sample, sample + count), slice(start, start + size), block


def _class_numbers(logits: torch.Tensor) -> torch.Tensor:
    """(K, 1), in the dtype of the sums."""
    return torch.arange(max(logits.shape[1], 2), dtype=sum_dtype(logits), device=logits.device)[:, None]


def every_pixel_counts(targets: torch.Tensor, classes: int, ignore_index: int | None) -> bool:
    """Whether no pixel is ignored or out of range; False if not known, as on a GPU, where asking would wait."""
    if targets.ndim == 3:
        return True
    if targets.is_cuda or not targets.numel() or (ignore_index is not None and 0 <= ignore_index < classes):
        return False
    least, greatest = targets.aminmax()
    return least.item() >= 0 and greatest.item() < classes


def _fill_memberships(
    t: torch.Tensor, targets: torch.Tensor, numbers: torch.Tensor, ignore_index: int | None
) -> torch.Tensor | int:
    """Writes the (N, K, chunk) memberships of a chunk's targets, 0 where a pixel counts nowhere.

    Returns:
        The number of ignored pixels of each sample.
    """
    if targets.ndim == 3:
        t[:, t.shape[1] - targets.shape[1] :] = targets
        if targets.shape[1] < t.shape[1]:
            torch.sub(1, t[:, 1], out=t[:, 0])
        return 0
    labels = targets.to(t.dtype)
    ignored: torch.Tensor | int = 0
    if ignore_index is not None:
        at = targets == ignore_index
        ignored = at.sum(1)
        labels = labels.masked_fill(at, -1)
    # Comparing floats into floats is vectorised; comparing integers into booleans takes five times as long.
    torch.eq(labels[:, None], numbers, out=t)
    return ignored


def _smooth(t: torch.Tensor, targets: torch.Tensor, label_smoothing: float) -> None:
    """Makes t (N, K, chunk) ``(1 - e) t + e / K`` where a pixel counts."""
    counts = t.sum(1, keepdim=True) if targets.ndim == 2 else 1
    t.mul_(1 - label_smoothing).add_(counts, alpha=label_smoothing / t.shape[1])


def _log_likelihood(product: torch.Tensor, t: torch.Tensor, logits: torch.Tensor, labels: bool) -> torch.Tensor:
    """sum(t log p) of each sample and class of a chunk. ``product`` holds p t, and is overwritten."""
    if labels and not logits.is_cuda:
        # One logarithm a pixel, that of the true class; pixels that count nowhere have t = 0 everywhere.
        true = product.sum(1, keepdim=True)
        least = true.amin().item()
        if least == 0:
            true += 1 - t.sum(1, keepdim=True)
            least = true.amin().item()
        if least >= _LEAST_PROBABILITY:
            return torch.mul(t, true.log_(), out=product).sum(-1)
    log_p = torch.log_softmax(class_logits(product, logits), 1).mul_(t)
    # 0 · -inf, a class that is impossible and not true, is 0. NaN logits still show: in P.
    return log_p.nan_to_num_(nan=0.0, posinf=torch.inf, neginf=-torch.inf).sum(-1)


def like_chunks(logits: torch.Tensor, rows: int) -> bool:
    """Whether p, t and dz of a chunk, of ``rows`` a pixel, have the layout and dtype of the logits."""
    return logits.is_contiguous() and logits.shape[1] == rows and logits.dtype == sum_dtype(logits)


def class_logits(memory: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """(N, C, chunk) logits as dense (N, K, chunk) in the dtype of ``memory``, where they are copied if they differ."""
    if memory.shape == logits.shape and memory.dtype == logits.dtype and logits.is_contiguous():
        return logits
    memory[:, memory.shape[1] - logits.shape[1] :] = logits
    if logits.shape[1] < memory.shape[1]:
        memory[:, 0] = 0
    return memory
