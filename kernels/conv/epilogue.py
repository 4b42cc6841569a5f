"""What every variant of the 3×3 convolution does with its accumulator: bias, ReLU, mask, max-pool windows, the head, or
statistics for the norm that follows.

Accumulators are fp32 tiles [C_out, pixels]: output channels by rows, pixels by columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .. import _launch
from .._launch import mma


@triton.jit
def bias_activation(acc, bias_ptr, offs_k, C_out, SLOPE: tl.constexpr):
    """``activation(acc + bias)``; ``bias_ptr`` may be None."""
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_k, mask=offs_k < C_out, other=0.0).to(tl.float32)[:, None]
    return _launch.activation(acc, SLOPE)


@triton.jit
def max_of_pairs(x):
    """Maximum over a last axis of two. NaN wins, as in PyTorch's pooling."""
    first, second = tl.split(x)
    return tl.maximum(first, second, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def store_masked(y, mask_desc, y_desc, n, h, w, k):
    """Stores ``y`` [C_out, pixels], times (mask > 0) if there is a mask, and returns it."""
    if mask_desc is not None:
        y = tl.where(tl.reshape(mask_desc.load([n, h, w, k]), (y.shape[1], y.shape[0])).T > 0, y, 0.0)
    y_desc.store([n, h, w, k], tl.reshape(y.to(y_desc.dtype).T, y_desc.block_shape))
    return y


@triton.jit
def store_to_either(y, mask_desc, y_desc, second_mask_desc, second_desc, n, h, w, k):
    """:func:`store_masked` to the image that has channel ``k``: the second's follow those of the first."""
    c_first = y_desc.shape[3]
    if k < c_first:
        store_masked(y, mask_desc, y_desc, n, h, w, k)
    else:
        store_masked(y, second_mask_desc, second_desc, n, h, w, k - c_first)


@triton.jit
def store_images(y, mask_desc, y_desc, second_mask_desc, second_desc, n, h, w, k):
    """Stores a tile of one output image, and returns it masked, or of two, in halves where it has twice the channels of
    their boxes.

    A tile across both images takes halves because bulk stores, unlike loads, must not start at a negative channel.
    """
    BLOCK_K: tl.constexpr = y.shape[0]
    if second_desc is None:
        y = store_masked(y, mask_desc, y_desc, n, h, w, k)
    elif y_desc.block_shape[3] == BLOCK_K:
        store_to_either(y, mask_desc, y_desc, second_mask_desc, second_desc, n, h, w, k)
    else:
        halves = tl.permute(tl.reshape(y.to(y_desc.dtype), (2, BLOCK_K // 2, y.shape[1])), (1, 2, 0))
        lower, upper = tl.split(halves)
        store_to_either(lower, mask_desc, y_desc, second_mask_desc, second_desc, n, h, w, k)
        store_to_either(upper, mask_desc, y_desc, second_mask_desc, second_desc, n, h, w, k + BLOCK_K // 2)
    return y


@triton.jit
def store_statistics(partial_ptr, mean, rest, squares, count, tile, offs_k, C_out):
    """partial[tile] (4, C_out) = mean, the rest of it, sum of squared distances from both, number of them.

    ``tile`` is one, or that of each of ``offs_k``.
    """
    at = partial_ptr + tile.to(tl.int64) * (4 * C_out) + offs_k
    k_mask = offs_k < C_out
    tl.store(at, mean, mask=k_mask)
    tl.store(at + C_out, rest, mask=k_mask)
    tl.store(at + 2 * C_out, squares, mask=k_mask)
    tl.store(at + 3 * C_out, tl.full(mean.shape, 0.0, tl.float32) + count, mask=k_mask)


@triton.jit
def tile_statistics(partial_ptr, parts, insides, tile, offs_k, C_out, dtype: tl.constexpr):
    """Stores the statistics of all ``parts`` [C_out, pixels] of a tile over the pixels inside, of which the first part
    has one at least.

    They are those of what is rounded to ``dtype``, as it is written: of what the norm reads. The mean is that of the
    first part, and the rest what the tile's differs from it: each part is read once, and few registers are needed.
    """
    first = tl.where(insides[0][None, :], parts[0].to(dtype).to(tl.float32), 0.0)
    mean = tl.sum(first, axis=1) / tl.sum(insides[0].to(tl.float32), axis=0)
    count, rest, squares = 0.0, tl.zeros_like(mean), tl.zeros_like(mean)
    for i in tl.static_range(len(parts)):
        off = tl.where(insides[i][None, :], parts[i].to(dtype).to(tl.float32) - mean[:, None], 0.0)
        count += tl.sum(insides[i].to(tl.float32), axis=0)
        rest += tl.sum(off, axis=1)
        squares += tl.sum(off * off, axis=1)
    rest /= count
    store_statistics(partial_ptr, mean, rest, squares - rest * rest * count, count, tile, offs_k, C_out)


@triton.jit
def head_store(features, head_weight_ptr, head_bias_ptr, out_ptr, pixel, pixel_mask, offs_k, C_out,
               NUM_CLASSES: tl.constexpr, BLOCK_CLASSES: tl.constexpr, OUTPUT: tl.constexpr, PRECISION: tl.constexpr):
    """1×1 convolution of ``features`` [C_out, pixels] to classes; stores logits, their softmax, the argmax, or for
    regions one more than the last positive class.

    ``features`` are first rounded to the activations' dtype, as if they had been written and read back, so that the
    fused head sees what a separate one would. ``pixel`` is the flat (n, h, w) index of each column.
    """
    dtype: tl.constexpr = head_weight_ptr.dtype.element_ty
    offs_class = tl.arange(0, BLOCK_CLASSES)
    class_mask = offs_class < NUM_CLASSES
    weight = tl.load(head_weight_ptr + offs_class[:, None] * C_out + offs_k[None, :],
                     mask=class_mask[:, None] & (offs_k < C_out)[None, :], other=0.0)
    logits = tl.zeros((BLOCK_CLASSES, features.shape[1]), tl.float32)
    logits = mma(weight, features.to(dtype), logits, PRECISION)
    if head_bias_ptr is not None:
        logits += tl.load(head_bias_ptr + offs_class, mask=class_mask, other=0.0).to(tl.float32)[:, None]
    if OUTPUT == "labels":
        # NaN counts as the maximum, as in torch.argmax, which a comparison alone would never choose
        ranked = tl.where(class_mask[:, None], tl.where(logits != logits, float("inf"), logits), -float("inf"))
        tl.store(out_ptr + pixel, tl.argmax(ranked, axis=0, tie_break_left=True).to(tl.uint8), mask=pixel_mask)
    elif OUTPUT == "regions":
        last = tl.max(tl.where(class_mask[:, None] & (logits > 0), offs_class[:, None] + 1, 0), axis=0)
        tl.store(out_ptr + pixel, last.to(tl.uint8), mask=pixel_mask)
    else:
        if OUTPUT == "probabilities":
            masked = tl.where(class_mask[:, None], logits, -float("inf"))
            exponential = tl.exp(masked - tl.max(masked, axis=0)[None, :])
            logits = exponential / tl.sum(exponential, axis=0)[None, :]
        tl.store(out_ptr + pixel[None, :] * NUM_CLASSES + offs_class[:, None], logits.to(out_ptr.dtype.element_ty),
                 mask=class_mask[:, None] & pixel_mask[None, :])
