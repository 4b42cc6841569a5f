"""The sums of overlapping regions: sigmoid, Dice and binary cross-entropy in one read, and their gradient in one more.

Logits are (N, C, S) with a channel for each of C regions, in the memory order (N, C, S) or (N, S, C); labels (N, S).
``members`` says of each class, by the bits of an int32, which regions hold it, so that a pixel's memberships are one
word in registers. Layout, order of the sums and pixels that count nowhere are as in ``sums.py``.

With s = -z where the region holds the pixel and z elsewhere, sigmoid(s) is the probability of the wrong answer,
``max(s, 0) + log(1 + exp(-|z|))`` the loss, and nothing cancels, however sure the network is.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from .. import _launch, _reduce
from . import sums as dice
from .config import DiceConfig, choose_regions_config, layout_of
from .tiles import fast_exp, folded, folded_pair, load_labels, load_tile, store_tile


@triton.jit
def _memberships(labels_ptr, members_ptr, z, first, S, C: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr,
                 BLOCK_S: tl.constexpr, IGNORE: tl.constexpr):  # fmt: skip
    """Of a tile: z, -inf (surely outside, and right so) where nothing counts; whether regions hold the pixels, which
    pixels count, and which are ignored."""
    label, valid, ignored = load_labels(labels_ptr, first, S, CLASSES, BLOCK_S, IGNORE)
    bits = tl.load(members_ptr + label, mask=valid, other=0)
    offs_c = tl.arange(0, BLOCK_C)[:, None]
    inside = ((bits[None, :] >> offs_c) & 1) != 0
    return tl.where(valid[None, :] & (offs_c < C), z, float("-inf")), inside, valid, ignored


@triton.jit
def _sigmoid(z):
    """exp(-|z|), and the greater and the smaller of sigmoid(z) and sigmoid(-z)."""
    e = fast_exp(-tl.abs(z))
    larger = 1 / (1 + e)
    return e, larger, e * larger


@triton.jit
def _both(a, b):
    """(1 + a) (1 + b) - 1, without losing small ones."""
    return a * b + a + b


@triton.jit
def _log1p(x):
    """log(1 + x) of x >= 0, as exact for small x as for large: what the sum loses is put right to first order."""
    y = 1 + x
    return tl.log(y) + (x - (y - 1)) / y


@triton.jit
def dice_regions_forward_kernel(
    logits_ptr, labels_ptr, weights_ptr, members_ptr, partial_ptr, S,
    C: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, KEEP: tl.constexpr,
    STAGES: tl.constexpr, LAYOUT: tl.constexpr, VECTOR: tl.constexpr, IGNORE: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
    CROSS_ENTROPY: tl.constexpr,
):  # fmt: skip
    """partial[program, sample] = (I, P, T of each region, sum of w · loss, sum of w, wrong labels) of its tiles."""
    sample, programs = tl.program_id(1), tl.num_programs(0)
    logits_ptr += sample.to(tl.int64) * C * S
    labels_ptr += sample.to(tl.int64) * S
    offs_c = tl.arange(0, BLOCK_C)
    w = (offs_c < C).to(tl.float32)
    if HAS_WEIGHTS:
        w = tl.load(weights_ptr + offs_c, mask=offs_c < C, other=0.0)
    # p t and t side by side, as in the kernel of the softmax
    hits = tl.zeros((BLOCK_C, KEEP, 2), tl.float32)
    predicted = tl.zeros((BLOCK_C, KEEP), tl.float32)
    loss = tl.zeros((BLOCK_S,), tl.float32)
    ignored = tl.zeros((BLOCK_S,), tl.int32)
    counted = tl.zeros((BLOCK_S,), tl.int32)
    pixels = 0
    for tile in tl.range(tl.program_id(0), tl.cdiv(S, BLOCK_S), programs, num_stages=STAGES):
        first = tile * BLOCK_S
        pixels += tl.minimum(S - first, BLOCK_S)
        z = load_tile(logits_ptr, first, S, C, BLOCK_C, BLOCK_S, LAYOUT, VECTOR)
        z, inside, valid, ignore = _memberships(labels_ptr, members_ptr, z, first, S, C, CLASSES, BLOCK_C, BLOCK_S,
                                                IGNORE)  # fmt: skip
        e, larger, smaller = _sigmoid(z)
        p = tl.where(z >= 0, larger, smaller)
        hits += folded_pair(tl.join(tl.where(inside, p, 0.0), inside.to(tl.float32)), KEEP, LAYOUT)
        predicted += folded(p, KEEP, LAYOUT)
        counted += valid.to(tl.int32)
        if IGNORE is not None:
            ignored += ignore.to(tl.int32)
        if CROSS_ENTROPY:
            wrong_by = tl.where((z >= 0) == inside, 0.0, tl.abs(z))
            if HAS_WEIGHTS:
                loss += tl.sum(w[:, None] * (wrong_by + _log1p(e)), axis=0)
            else:  # one logarithm a pixel, of the product of all 1 + e, which is below 2^32
                loss += tl.sum(wrong_by, axis=0) + _log1p(tl.reduce(e, 0, _both))
    intersection, truth = tl.split(hits)
    intersection, predicted, truth = tl.sum(intersection, axis=1), tl.sum(predicted, axis=1), tl.sum(truth, axis=1)
    count = tl.sum(counted)
    row = partial_ptr + (tl.program_id(0).to(tl.int64) * tl.num_programs(1) + sample) * (3 * C + 3)
    tl.store(row + offs_c, intersection, mask=offs_c < C)
    tl.store(row + C + offs_c, predicted, mask=offs_c < C)
    tl.store(row + 2 * C + offs_c, truth, mask=offs_c < C)
    tl.store(row + 3 * C, tl.sum(loss))
    tl.store(row + 3 * C + 1, tl.sum(w) * count)
    tl.store(row + 3 * C + 2, (pixels - tl.sum(ignored) - count).to(tl.float32))


@triton.jit
def dice_regions_backward_kernel(
    grad_ptr, slopes_ptr, logits_ptr, labels_ptr, weights_ptr, members_ptr, dlogits_ptr, S,
    C: tl.constexpr, CLASSES: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr, LAYOUT: tl.constexpr,
    VECTOR: tl.constexpr, IGNORE: tl.constexpr, HAS_WEIGHTS: tl.constexpr, CROSS_ENTROPY: tl.constexpr,
    PER_SAMPLE: tl.constexpr,
):  # fmt: skip
    """dz = p (1 - p) (dL/dI t + dL/dP) + n w (p - t), with n = dL/d(sum of w · loss)."""
    sample, first = tl.program_id(1), tl.program_id(0) * BLOCK_S
    offs_c = tl.arange(0, BLOCK_C)
    logits_ptr += sample.to(tl.int64) * C * S
    dlogits_ptr += sample.to(tl.int64) * C * S
    labels_ptr += sample.to(tl.int64) * S
    if PER_SAMPLE:
        slopes_ptr += sample * (3 * C + 3)
    grad = tl.load(grad_ptr)
    grad_i = grad * tl.load(slopes_ptr + offs_c, mask=offs_c < C, other=0.0)
    grad_p = grad * tl.load(slopes_ptr + C + offs_c, mask=offs_c < C, other=0.0)
    z = load_tile(logits_ptr, first, S, C, BLOCK_C, BLOCK_S, LAYOUT, VECTOR)
    z, inside, _, _ = _memberships(labels_ptr, members_ptr, z, first, S, C, CLASSES, BLOCK_C, BLOCK_S, IGNORE)
    _, larger, smaller = _sigmoid(z)
    dz = larger * smaller * (tl.where(inside, grad_i[:, None], 0.0) + grad_p[:, None])
    if CROSS_ENTROPY:
        grad_loss = grad * tl.load(slopes_ptr + 3 * C)
        if HAS_WEIGHTS:
            grad_loss *= tl.load(weights_ptr + offs_c, mask=offs_c < C, other=0.0)[:, None]
        wrong = tl.where((z >= 0) == inside, smaller, larger)
        dz += tl.where(inside, -grad_loss, grad_loss) * wrong
    store_tile(dlogits_ptr, dz, first, S, C, BLOCK_C, BLOCK_S, LAYOUT, VECTOR)


def sums(
    logits: torch.Tensor,
    labels: torch.Tensor,
    region_weights: torch.Tensor | None,
    members: torch.Tensor,
    ignore_index: int | None,
    cross_entropy: bool,
    per_sample: bool,
    config: DiceConfig | None = None,
) -> torch.Tensor:
    """(R, 3 C + 3) float32: I, P, T of each region, sums of w · binary cross-entropy and of w, labels out of range.

    Args:
        logits: (N, C, S), dense in that order or in (N, S, C).
        labels: (N, S) integers.
        region_weights: (C,) float32 weights of the cross-entropy, or None.
        members: (classes,) int32, the regions of each class as bits.
        ignore_index: the label that counts nowhere, or None.
        cross_entropy: whether its sum is wanted; it is 0 otherwise.
        per_sample: R = N rows; or one row for the whole batch.
    """
    n, c, s = logits.shape
    if n > dice.MOST_SAMPLES:
        options = region_weights, members, ignore_index, cross_entropy, per_sample, config
        parts = torch.cat([sums(*piece, *options) for piece in dice.pieces(logits, labels)])
        return parts if per_sample else parts.sum(0, keepdim=True)
    config = config or choose_regions_config(c, layout_of(logits), logits.element_size())
    programs = dice.forward_programs(n, s, config)
    partial = _launch.empty((programs, n, 3 * c + 3), torch.float32, logits.device)
    _launch.launch(
        dice_regions_forward_kernel, (programs, n),
        logits, labels.contiguous(), region_weights, members, partial, s, KEEP=config.keep, STAGES=config.num_stages,
        **_constants(logits, region_weights, members, ignore_index, cross_entropy, config),
        num_warps=config.num_warps,
    )  # fmt: skip
    if not per_sample:
        partial = partial.view(programs * n, 1, 3 * c + 3)
    return _reduce.sum_splits(partial, torch.float32)


def sums_grad(
    grad: torch.Tensor,
    slopes: torch.Tensor,
    logits: torch.Tensor,
    labels: torch.Tensor,
    region_weights: torch.Tensor | None,
    members: torch.Tensor,
    ignore_index: int | None,
    cross_entropy: bool,
    config: DiceConfig | None = None,
) -> torch.Tensor:
    """The gradient of the loss with respect to the logits, in their dtype and memory order.

    Args:
        grad: float32 scalar, the factor of ``slopes``.
        slopes: (R, 3 C + 3) float32, the loss's derivatives with respect to :func:`sums`, whose other arguments follow.
    """
    n, c, s = logits.shape
    if n > dice.MOST_SAMPLES:
        options = region_weights, members, ignore_index, cross_entropy, config
        rows = dice.pieces(slopes.expand(n, -1), logits, labels)
        return torch.cat([sums_grad(grad, *piece, *options) for piece in rows])
    config = config or choose_regions_config(c, layout_of(logits), logits.element_size())
    dlogits = dice.empty_like_logits(logits)
    _launch.launch(
        dice_regions_backward_kernel, (_launch.cdiv(s, config.block_s), n),
        grad, slopes.contiguous(), logits, labels.contiguous(), region_weights, members, dlogits, s,
        **_constants(logits, region_weights, members, ignore_index, cross_entropy, config),
        PER_SAMPLE=len(slopes) > 1, num_warps=config.num_warps,
    )  # fmt: skip
    return dlogits


def _constants(logits, region_weights, members, ignore_index, cross_entropy, config) -> dict:
    """The compile-time constants of both kernels."""
    c = logits.shape[1]
    return dict(
        C=c,
        CLASSES=len(members),
        BLOCK_C=_launch.next_power_of_2(c),
        BLOCK_S=config.block_s,
        LAYOUT=layout_of(logits),
        VECTOR=16 // logits.element_size(),
        IGNORE=ignore_index,
        HAS_WEIGHTS=region_weights is not None,
        CROSS_ENTROPY=cross_entropy,
    )
