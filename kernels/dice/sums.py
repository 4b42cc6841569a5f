"""The sums of softmax, Dice and cross-entropy in one read of logits and labels, and their gradient in one more.

Logits are (N, C, S) for S pixels, in the memory order (N, C, S) or (N, S, C); labels (N, S), or soft targets of the
logits' shape. One channel is the logit of the second of two classes. A pixel whose label is ``ignore_index`` or out of
range counts nowhere. All sums are in float32: each program writes one row of partial sums, and
:func:`_reduce.sum_splits` adds the rows in an order that never changes.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl

from .. import _launch, _reduce
from .config import DiceConfig, choose_config, layout_of
from .tiles import fast_exp, folded, folded_pair, load_labels, load_tile, store_tile

MOST_SAMPLES = 65535
"""The greatest second side of a CUDA grid; larger batches are taken in pieces."""

_PROGRAMS = 4096
"""About how many programs share a forward pass: several waves of any GPU, and few rows of partial sums."""


def pieces(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """A batch as batches that a grid has room for."""
    return zip(*(t.split(MOST_SAMPLES) for t in tensors), strict=True)


def forward_programs(samples: int, pixels: int, config: DiceConfig) -> int:
    """How many programs share the pixels of each sample in a forward pass."""
    return min(_launch.cdiv(pixels, config.block_s), _launch.cdiv(_PROGRAMS, max(samples, 1)))


def empty_like_logits(logits: torch.Tensor) -> torch.Tensor:
    """Uninitialised (N, C, S) in the memory order of ``logits``."""
    n, c, s = logits.shape
    if layout_of(logits) == "planes":
        return _launch.empty((n, c, s), logits.dtype, logits.device)
    return _launch.empty((n, s, c), logits.dtype, logits.device).transpose(1, 2)


@triton.jit
def _class_weights(weights_ptr, C: tl.constexpr, BLOCK_C: tl.constexpr, HAS_WEIGHTS: tl.constexpr):
    """(BLOCK_C,) weights of the channels' classes, and that of the class without a channel where there is one."""
    offs_c = tl.arange(0, BLOCK_C)
    w = tl.full((BLOCK_C,), 1.0, tl.float32)
    background = 1.0
    if HAS_WEIGHTS:
        w = tl.load(weights_ptr + offs_c + (C == 1), mask=offs_c < C, other=0.0)
        background = tl.load(weights_ptr)
    return w, background


@triton.jit
def _softmax(z, valid, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Of a (BLOCK_C, BLOCK_S) tile: z - max z, the probabilities (0 where not valid), the maximum, log(sum(exp))."""
    if BLOCK_C > C:
        z = tl.where((tl.arange(0, BLOCK_C) < C)[:, None], z, float("-inf"))
    peak = tl.max(z, axis=0)
    if C == 1:
        peak = tl.maximum(peak, 0.0)
    shifted = z - peak[None, :]
    e = fast_exp(shifted)
    total = tl.sum(e, axis=0)
    if C == 1:
        total += fast_exp(-peak)
    return shifted, e * tl.where(valid, 1 / total, 0.0)[None, :], peak, tl.log(total)


@triton.jit
def _nll_of_all(shifted, peak, log_total, w, w_background, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Per pixel sum(-w log p) over all classes, true or not."""
    inside = (tl.arange(0, BLOCK_C) < C)[:, None]
    nll = tl.sum(tl.where(inside, w[:, None] * (log_total[None, :] - shifted), 0.0), axis=0)
    if C == 1:
        nll += w_background * (log_total + peak)
    return nll


@triton.jit
def dice_forward_kernel(
    logits_ptr, targets_ptr, weights_ptr, partial_ptr, S,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, KEEP: tl.constexpr, STAGES: tl.constexpr,
    LAYOUT: tl.constexpr, VECTOR: tl.constexpr, SOFT: tl.constexpr, IGNORE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr, SMOOTHING: tl.constexpr,
):  # fmt: skip
    """partial[program, sample] = (I, P, T of each channel, sum(-w t log p), sum(w t), wrong labels) of its tiles."""
    sample, programs = tl.program_id(1), tl.num_programs(0)
    logits_ptr += sample.to(tl.int64) * C * S
    targets_ptr += sample.to(tl.int64) * (C if SOFT else 1) * S
    offs_c = tl.arange(0, BLOCK_C)
    w, w_background = _class_weights(weights_ptr, C, BLOCK_C, HAS_WEIGHTS)
    # p t and t side by side: sums of t alone, which needs no logits, would get a register layout of their own
    hits = tl.zeros((BLOCK_C, KEEP, 2), tl.float32)
    predicted = tl.zeros((BLOCK_C, KEEP), tl.float32)
    nll = tl.zeros((BLOCK_S,), tl.float32)
    ignored = tl.zeros((BLOCK_S,), tl.int32)
    counted = tl.zeros((BLOCK_S,), tl.int32)
    pixels = 0
    for tile in tl.range(tl.program_id(0), tl.cdiv(S, BLOCK_S), programs, num_stages=STAGES):
        first = tile * BLOCK_S
        pixels += tl.minimum(S - first, BLOCK_S)
        z = load_tile(logits_ptr, first, S, C, BLOCK_C, BLOCK_S, LAYOUT, VECTOR)
        if SOFT:
            t = load_tile(targets_ptr, first, S, C, BLOCK_C, BLOCK_S, LAYOUT, VECTOR)
            valid = first + tl.arange(0, BLOCK_S) < S
        else:
            label, valid, ignore = load_labels(targets_ptr, first, S, C + (C == 1), BLOCK_S, IGNORE)
            true = label[None, :] == (offs_c + (C == 1))[:, None]
            t = true.to(tl.float32)
            if IGNORE is not None:
                ignored += ignore.to(tl.int32)
            if C == 1:
                counted += valid.to(tl.int32)
        shifted, p, peak, log_total = _softmax(z, valid, C, BLOCK_C)
        hits += folded_pair(tl.join(p * t, t), KEEP, LAYOUT)
        predicted += folded(p, KEEP, LAYOUT)
        if CROSS_ENTROPY:
            # 0 · -inf, a class that is impossible and not true, is 0
            if SOFT:
                weighted, background = t * w[:, None], 0.0
                if C == 1:
                    background = w_background * (1 - tl.sum(t, axis=0))
                true_logit = tl.sum(weighted * tl.where(t == 0, 0.0, shifted), axis=0) - background * peak
                loss = (tl.sum(weighted, axis=0) + background) * log_total - true_logit
            else:
                true_logit = tl.sum(tl.where(true, shifted, 0.0), axis=0)
                if C == 1:
                    true_logit = tl.where(label == 1, true_logit, -peak)
                loss = log_total - true_logit
                if HAS_WEIGHTS:
                    loss *= tl.load(weights_ptr + label, mask=valid, other=0.0)
            if SMOOTHING > 0:
                loss *= 1 - SMOOTHING
                share: tl.constexpr = SMOOTHING / (C + (C == 1))
                loss += share * _nll_of_all(shifted, peak, log_total, w, w_background, C, BLOCK_C)
            nll += tl.where(valid, loss, 0.0)
    intersection, truth = tl.split(hits)
    intersection, predicted, truth = tl.sum(intersection, axis=1), tl.sum(predicted, axis=1), tl.sum(truth, axis=1)
    if C > 1 and not SOFT:
        count = tl.sum(truth).to(tl.int32)
    else:
        count = pixels if SOFT else tl.sum(counted)
    weights = tl.sum(w * truth)
    if C == 1:
        weights += w_background * (count - tl.sum(truth))
    row = partial_ptr + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + sample) * (3 * C + 3)
    tl.store(row + offs_c, intersection, mask=offs_c < C)
    tl.store(row + C + offs_c, predicted, mask=offs_c < C)
    tl.store(row + 2 * C + offs_c, truth, mask=offs_c < C)
    tl.store(row + 3 * C, tl.sum(nll))
    tl.store(row + 3 * C + 1, weights)
    tl.store(row + 3 * C + 2, (pixels - tl.sum(ignored) - count).to(tl.float32))


@triton.jit
def dice_backward_kernel(
    grad_ptr, slopes_ptr, logits_ptr, targets_ptr, weights_ptr, dlogits_ptr, S,
    C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr,
    SOFT: tl.constexpr, IGNORE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    SMOOTHING: tl.constexpr, PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """dz_c = p_c (g_c - sum_k p_k g_k) + n (p_c sum(w t) - w_c t_c), with g = dL/dI t + dL/dP and n = dL/d(nll)."""
    sample, first = tl.program_id(1), tl.program_id(0) * BLOCK_S
    offs_c = tl.arange(0, BLOCK_C)
    logits_ptr += sample.to(tl.int64) * C * S
    dlogits_ptr += sample.to(tl.int64) * C * S
    targets_ptr += sample.to(tl.int64) * (C if SOFT else 1) * S
    if PER_SAMPLE:
        slopes_ptr += sample * (3 * C + 3)
    grad = tl.load(grad_ptr)
    grad_i = grad * tl.load(slopes_ptr + offs_c, mask=offs_c < C, other=0.0)
    grad_p = grad * tl.load(slopes_ptr + C + offs_c, mask=offs_c < C, other=0.0)
    grad_nll = grad * tl.load(slopes_ptr + 3 * C)
    z = load_tile(logits_ptr, first, S, C, BLOCK_C, BLOCK_S, LAYOUT, VECTOR)
    if SOFT:
        t = load_tile(targets_ptr, first, S, C, BLOCK_C, BLOCK_S, LAYOUT, VECTOR)
        w, w_background = _class_weights(weights_ptr, C, BLOCK_C, HAS_WEIGHTS)
        pull = t * (grad_nll * w)[:, None]
        push = tl.sum(pull, axis=0)
        if C == 1:
            push += grad_nll * w_background * (1 - tl.sum(t, axis=0))
        valid = first + tl.arange(0, BLOCK_S) < S
    else:
        label, valid, _ = load_labels(targets_ptr, first, S, C + (C == 1), BLOCK_S, IGNORE)
        true = label[None, :] == (offs_c + (C == 1))[:, None]
        t = true.to(tl.float32)
        push = tl.where(valid, grad_nll, 0.0)
        if HAS_WEIGHTS:
            push = grad_nll * tl.load(weights_ptr + label, mask=valid, other=0.0)
        pull = tl.where(true, push[None, :], 0.0)
    if SMOOTHING > 0:
        w, w_background = _class_weights(weights_ptr, C, BLOCK_C, HAS_WEIGHTS)
        share = tl.where(valid, SMOOTHING / (C + (C == 1)) * grad_nll, 0.0)
        pull = (1 - SMOOTHING) * pull + w[:, None] * share[None, :]
        w_total = tl.sum(tl.where(offs_c < C, w, 0.0))
        if C == 1:
            w_total += w_background
        push = (1 - SMOOTHING) * push + w_total * share
    _, p, _, _ = _softmax(z, valid, C, BLOCK_C)
    g = grad_i[:, None] * t + grad_p[:, None]
    common = tl.sum(p * g, axis=0)
    if CROSS_ENTROPY:
        dz = p * (g - (common - push)[None, :]) - pull
    else:
        dz = p * (g - common[None, :])
    store_tile(dlogits_ptr, dz, first, S, C, BLOCK_C, BLOCK_S, LAYOUT, VECTOR)


def sums(
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None,
    ignore_index: int | None,
    cross_entropy: bool,
    per_sample: bool,
    label_smoothing: float = 0.0,
    config: DiceConfig | None = None,
) -> torch.Tensor:
    """(R, 3 C + 3) float32: I, P, T of each channel, sum(-w t log p), sum(w t), labels out of range.

    Args:
        logits: (N, C, S), dense in that order or in (N, S, C).
        targets: (N, S) integers, or (N, C, S) memberships.
        class_weights: (max(C, 2),) float32 weights of the cross-entropy, or None.
        ignore_index: the label that counts nowhere, or None.
        cross_entropy: whether its sum is wanted; it is 0 otherwise.
        per_sample: R = N rows; or one row for the whole batch.
        label_smoothing: e, which makes t of the cross-entropy (1 - e) t + e / max(C, 2).
    """
    n, c, s = logits.shape
    if n > MOST_SAMPLES:
        options = class_weights, ignore_index, cross_entropy, per_sample, label_smoothing, config
        parts = torch.cat([sums(*piece, *options) for piece in pieces(logits, targets)])
        return parts if per_sample else parts.sum(0, keepdim=True)
    arguments = _Arguments(logits, targets, class_weights, ignore_index, cross_entropy, label_smoothing, config)
    programs = forward_programs(n, s, arguments.config)
    partial = _launch.empty((programs, n, 3 * c + 3), torch.float32, logits.device)
    _launch.launch(
        dice_forward_kernel, (programs, n), logits, arguments.targets, class_weights, partial, s,
        KEEP=arguments.config.keep, STAGES=arguments.config.num_stages, **arguments.constants,
        num_warps=arguments.config.num_warps,
    )  # fmt: skip
    if not per_sample:
        partial = partial.view(programs * n, 1, 3 * c + 3)
    return _reduce.sum_splits(partial, torch.float32)


def sums_grad(
    grad: torch.Tensor,
    slopes: torch.Tensor,
    logits: torch.Tensor,
    targets: torch.Tensor,
    class_weights: torch.Tensor | None,
    ignore_index: int | None,
    cross_entropy: bool,
    label_smoothing: float = 0.0,
    config: DiceConfig | None = None,
) -> torch.Tensor:
    """The gradient of the loss with respect to the logits, in their dtype and memory order.

    Args:
        grad: float32 scalar, the factor of ``slopes``.
        slopes: (R, 3 C + 3) float32, the loss's derivatives with respect to :func:`sums`, whose other arguments follow.
    """
    n, _, s = logits.shape
    if n > MOST_SAMPLES:
        options = class_weights, ignore_index, cross_entropy, label_smoothing, config
        rows = pieces(slopes.expand(n, -1), logits, targets)
        return torch.cat([sums_grad(grad, *piece, *options) for piece in rows])
    arguments = _Arguments(logits, targets, class_weights, ignore_index, cross_entropy, label_smoothing, config)
    dlogits = empty_like_logits(logits)
    _launch.launch(
        dice_backward_kernel, (_launch.cdiv(s, arguments.config.block_s), n),
        grad, slopes.contiguous(), logits, arguments.targets, class_weights, dlogits, s,
        **arguments.constants, PER_SAMPLE=len(slopes) > 1, num_warps=arguments.config.num_warps,
    )  # fmt: skip
    return dlogits


class _Arguments:
    """What both kernels are launched with: targets in the logits' memory order, the tile, compile-time constants."""

    def __init__(self, logits, targets, class_weights, ignore_index, cross_entropy, label_smoothing, config):
        c, layout = logits.shape[1], layout_of(logits)
        soft = targets.ndim == 3
        if soft and layout != "planes":
            self.targets = targets.transpose(1, 2).contiguous()
        else:
            self.targets = targets.contiguous()
        self.config = config or choose_config(c, layout, logits.element_size())
        self.constants = dict(
            C=c,
            BLOCK_C=_launch.next_power_of_2(c),
            BLOCK_S=self.config.block_s,
            LAYOUT=layout,
            VECTOR=16 // logits.element_size(),
            SOFT=soft,
            IGNORE=ignore_index,
            HAS_WEIGHTS=class_weights is not None,
            CROSS_ENTROPY=cross_entropy,
            SMOOTHING=label_smoothing if cross_entropy else 0.0,
        )
