"""Confusion counts in one read of logits (or predicted labels) and true labels.

Each program writes one row of int32 partial counts, and integer sums make the order of the rows irrelevant. Up to four
classes, every thread counts each of the at most 16 pairs of its own pixels; beyond, a product of one-hot tiles counts
them, exactly in float32 as long as a program has fewer than 2^24 pixels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from .. import _launch, _tuned
from . import sums as dice
from .tiles import load_tile

NONE_WRONG = -(2**31)
"""Stands for "no value is out of range"."""

_MOST_PIXELS = 2**23
"""Of one program, so that float32 counts are exact."""


@dataclass(frozen=True)
class ConfusionConfig:
    """Pixels of a tile, programs over the whole batch, whether pairs are counted one by one, warps, loop stages."""

    block_s: int
    programs: int
    pairs: bool = False
    num_warps: int = 4
    num_stages: int = 3


def choose_config(classes: int, itemsize: int) -> ConfusionConfig:
    """The committed winner for ``classes`` of ``itemsize`` bytes (0: labels) on this GPU, else a heuristic."""
    return _tuned.choose("dice_confusion", (classes, itemsize), ConfusionConfig, lambda: _heuristic(classes, itemsize))


def _heuristic(classes: int, itemsize: int) -> ConfusionConfig:
    """Fewer programs where a row of counts is long."""
    if classes <= 4:
        return ConfusionConfig(block_s=128 * (16 // (itemsize or 4)), programs=4096, pairs=True)
    if classes <= 16:
        return ConfusionConfig(block_s=256, programs=2048)
    # Eight warps: with four, compilers keep a few bytes of some class counts on the stack.
    if classes <= 32:
        return ConfusionConfig(block_s=128, programs=2048, num_warps=8)
    # One stage: Hopper's asynchronous product would read one-hot tiles from registers while the next iteration writes
    # them, which ptxas before 13.3 assembles wrongly (triton#9433). The small products above are not asynchronous.
    return ConfusionConfig(block_s=32, programs=512, num_warps=8, num_stages=1)


@triton.jit
def _first_maximum(ptr, first, S, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
                   LAYOUT: tl.constexpr, VECTOR: tl.constexpr):  # fmt: skip
    """Per pixel the first class with the greatest logit; NaN counts as infinite. Of one logit: whether positive."""
    z = load_tile(ptr, first, S, C, BLOCK_C, BLOCK_S, LAYOUT, VECTOR)
    if C == 1:
        return tl.sum((z > 0).to(tl.int32) | (z != z).to(tl.int32), axis=0)
    offs_c = tl.arange(0, BLOCK_C)[:, None]
    z = tl.where(z != z, float("inf"), z)
    z = tl.where(offs_c < C, z, float("-inf"))
    return tl.min(tl.where(z == tl.max(z, axis=0)[None, :], offs_c, BLOCK_C), axis=0)


@triton.jit
def _labels(ptr, first, S, CLASSES: tl.constexpr, BLOCK_S: tl.constexpr):
    """Labels in their own dtype, and as int32 with -1 where they are out of range."""
    offs_s = first + tl.arange(0, BLOCK_S)
    label = tl.load(ptr + offs_s, mask=offs_s < S, other=0)
    if label.dtype != tl.int64:
        label = label.to(tl.int32)
    return label, tl.where((label >= 0) & (label < CLASSES), label, -1).to(tl.int32)


@triton.jit
def confusion_kernel(
    predictions_ptr, labels_ptr, partial_ptr, S,
    CLASSES: tl.constexpr, BLOCK_K: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
    LAYOUT: tl.constexpr, VECTOR: tl.constexpr, HARD: tl.constexpr, IGNORE: tl.constexpr, NONE_WRONG: tl.constexpr,
    PAIRS: tl.constexpr,
):  # fmt: skip
    """partial[sample, program] = (counts by truth and prediction, wrong pixels, the greatest wrong value)."""
    sample, programs = tl.program_id(1), tl.num_programs(0)
    predictions_ptr += sample.to(tl.int64) * (1 if HARD else C) * S
    labels_ptr += sample.to(tl.int64) * S
    offs_k = tl.arange(0, BLOCK_K)
    offs_pair = tl.arange(0, BLOCK_K * BLOCK_K)
    if PAIRS:
        counts = tl.zeros((BLOCK_K * BLOCK_K, 128), tl.int32)
    else:
        counts = tl.zeros((BLOCK_K, BLOCK_K), tl.float32)
    wrongs = tl.zeros((BLOCK_S,), tl.int32)
    greatest = tl.full((BLOCK_S,), NONE_WRONG, tl.int32)
    for tile in range(tl.program_id(0), tl.cdiv(S, BLOCK_S), programs):
        first = tile * BLOCK_S
        given, truth = _labels(labels_ptr, first, S, CLASSES, BLOCK_S)
        counted = first + tl.arange(0, BLOCK_S) < S
        if IGNORE is not None:
            counted &= given != IGNORE
        value = tl.where(truth < 0, given, NONE_WRONG)
        if HARD:
            given, predicted = _labels(predictions_ptr, first, S, CLASSES, BLOCK_S)
            value = tl.maximum(value, tl.where(predicted < 0, given, NONE_WRONG))
        else:
            predicted = _first_maximum(predictions_ptr, first, S, C, BLOCK_C, BLOCK_S, LAYOUT, VECTOR)
        wrong = counted & ((truth < 0) | (predicted < 0))
        wrongs += wrong.to(tl.int32)
        value = tl.minimum(tl.maximum(value, NONE_WRONG), 2147483647).to(tl.int32)
        greatest = tl.maximum(greatest, tl.where(wrong, value, NONE_WRONG))
        truth = tl.where(counted & (predicted >= 0), truth, -1)
        if PAIRS:
            pair = tl.where(truth >= 0, truth * BLOCK_K + predicted, -1)
            is_pair = (pair[None, :] == offs_pair[:, None]).to(tl.int32)
            counts += tl.sum(tl.reshape(is_pair, (BLOCK_K * BLOCK_K, 128, BLOCK_S // 128)), axis=2)
        else:
            is_truth = (truth[None, :] == offs_k[:, None]).to(tl.float16)
            is_predicted = (predicted[:, None] == offs_k[None, :]).to(tl.float16)
            counts = tl.dot(is_truth, is_predicted, counts)
    row = partial_ptr + (sample.to(tl.int64) * programs + tl.program_id(0)) * (CLASSES * CLASSES + 2)
    if PAIRS:
        counts = tl.reshape(tl.sum(counts, axis=1), (BLOCK_K, BLOCK_K))
    mask = (offs_k < CLASSES)[:, None] & (offs_k < CLASSES)[None, :]
    tl.store(row + offs_k[:, None] * CLASSES + offs_k[None, :], counts.to(tl.int32), mask=mask)
    tl.store(row + CLASSES * CLASSES, tl.sum(wrongs))
    tl.store(row + CLASSES * CLASSES + 1, tl.max(greatest, axis=0))


def confusion(
    predictions: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    ignore_index: int | None,
    config: ConfusionConfig | None = None,
) -> torch.Tensor:
    """(N, classes² + 2) int64: the matrix by rows of truth, the pixels out of range, the greatest such value.

    Args:
        predictions: (N, C, S) logits, dense in that order or in (N, S, C), or (N, S) integer labels.
        labels: (N, S) integers.
        classes: at most 128; C, or 2 where C is 1.
        ignore_index: the true label whose pixels are not counted, or None.
    """
    n, s = labels.shape
    if n > dice.MOST_SAMPLES:
        parts = dice.pieces(predictions, labels)
        return torch.cat([confusion(*part, classes, ignore_index, config) for part in parts])
    hard = predictions.ndim == 2
    c = classes if hard else predictions.shape[1]
    config = config or choose_config(classes, 0 if hard else predictions.element_size())
    programs = max(_launch.cdiv(config.programs, max(n, 1)), _launch.cdiv(s, _MOST_PIXELS))
    programs = min(programs, _launch.cdiv(s, config.block_s))
    partial = _launch.empty((n, programs, classes * classes + 2), torch.int32, labels.device)
    _launch.launch(
        confusion_kernel, (programs, n),
        predictions.contiguous() if hard else predictions, labels.contiguous(), partial, s,
        CLASSES=classes, BLOCK_K=max(1 if config.pairs else 16, _launch.next_power_of_2(classes)),
        C=c, BLOCK_C=_launch.next_power_of_2(c), BLOCK_S=config.block_s,
        LAYOUT="planes" if hard else dice.layout_of(predictions),
        VECTOR=1 if hard else 16 // predictions.element_size(),
        HARD=hard, IGNORE=ignore_index, NONE_WRONG=NONE_WRONG, PAIRS=config.pairs,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
    if programs == 0:
        partial = partial.new_zeros((n, 1, classes * classes + 2))
        partial[..., -1] = NONE_WRONG
    return torch.cat([partial[..., :-1].sum(1), partial[..., -1:].amax(1).long()], 1)
