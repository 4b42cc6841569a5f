"""Bulk-copy descriptors of a 3×3 convolution's inputs. What lies outside of their shapes is read as zero."""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .convolution import Convolution


def image_boxes(image: torch.Tensor, box: tuple[int, int, int, int]) -> TensorDescriptor:
    """NHWC boxes (BN, BH, BW, BC) of an image that may be a crop of a larger one."""
    (n, c, h, w), (stride_n, _, stride_h, stride_w) = image.shape, image.stride()
    return TensorDescriptor(image, [n, h, w, c], [stride_n, stride_h, stride_w, 1], list(box))


def column_boxes(image: torch.Tensor, box: tuple[int, int, int], stack: int) -> TensorDescriptor:
    """Boxes (BW, 1, BC) of a row of an image seen as [N, H, W / stack, stack, C]: of every ``stack``-th column."""
    (n, c, h, w), (stride_n, _, stride_h, stride_w) = image.shape, image.stride()
    shape, strides = [n, h, w // stack, stack, c], [stride_n, stride_h, stack * stride_w, stride_w, 1]
    return TensorDescriptor(image, shape, strides, [1, 1, *box])


def grouped(image: torch.Tensor, stack: int) -> torch.Tensor:
    """``image`` with each ``stack`` neighbouring columns as one of so many times the channels: the same memory."""
    (n, c, h, w), (stride_n, _, stride_h, _) = image.shape, image.stride()
    return image.as_strided((n, stack * c, h, w // stack), (stride_n, 1, stride_h, stack * c))


def matrix_boxes(matrices: torch.Tensor, box: tuple[int, int, int]) -> TensorDescriptor:
    """Boxes of a stack of matrices whose rows are contiguous: what one source's channels end at reads as zero."""
    return TensorDescriptor(matrices, list(matrices.shape), list(matrices.stride()), list(box))


def tap_sources(conv: Convolution, boxes: Callable[[torch.Tensor], TensorDescriptor], block_k: int, block_c: int,
                stack: int = 1) -> tuple:
    """A kernel's arguments for x and for the skip: ``boxes`` of the image, boxes [1, block_k, block_c] of its taps,
    channels.

    Of a flipped convolution, which has one source, the taps' boxes are [1, block_c, block_k]. Where columns are
    stacked, the taps are no boxes but (C_out, 9, C), of strides (9 · S, S, 1) or, flipped, (1, S, 9 · S).
    """
    args: list = []
    for image, weight in zip((conv.x, conv.skip), (conv.weight.flatten(1, 2), None) if conv.flipped else conv.taps()):
        if image is None:
            args += [None, None, 0]
            continue
        taps = weight
        if stack == 1 and conv.flipped:
            taps = matrix_boxes(weight.permute(1, 2, 0), (1, block_c, block_k))
        elif stack == 1:
            taps = matrix_boxes(weight.transpose(0, 1), (1, block_k, block_c))
        args += [boxes(image), taps, image.shape[1]]
    return tuple(args)


def output_boxes(conv: Convolution, y: torch.Tensor, second: torch.Tensor | None, pixels: tuple[int, int, int],
                 block_k: int, stack: int = 1) -> tuple:
    """A kernel's arguments for each of two output images: boxes of its mask and of itself, None where there is none.

    They have ``block_k`` channels, or half where a tile of so many may hold channels of both images, of each of
    ``stack`` columns.
    """
    box = (*pixels, stack * (block_k if conv.c_first % block_k == 0 else block_k // 2))
    images = (conv.mask, y, conv.second_mask, second)
    return tuple(None if image is None else image_boxes(grouped(image, stack), box) for image in images)


@triton.jit
def tap_weight(weight_desc, tap, k0, c, FLIPPED: tl.constexpr):
    """The weights of one tap as operand A [BK, BC], from boxes of :func:`tap_sources`.

    Those of the forward pass, read by the data gradient, are a transposed operand: free where it has 16 bits.
    """
    if FLIPPED:
        weight = weight_desc.load([8 - tap, c, k0])
        weight = tl.reshape(weight, (weight.shape[1], weight.shape[2])).T
    else:
        weight = weight_desc.load([tap, k0, c])
        weight = tl.reshape(weight, (weight.shape[1], weight.shape[2]))
    return weight
