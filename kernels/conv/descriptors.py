"""Bulk-copy descriptors of a 3×3 convolution's inputs. What lies outside of their shapes is read as zero."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from .convolution import Convolution


def image_boxes(image: torch.Tensor, box: tuple[int, int, int, int]) -> TensorDescriptor:
    """NHWC boxes (BN, BH, BW, BC) of an image that may be a crop of a larger one."""
    (n, c, h, w), (stride_n, _, stride_h, stride_w) = image.shape, image.stride()
    return TensorDescriptor(image, [n, h, w, c], [stride_n, stride_h, stride_w, 1], list(box))


def row_pair_boxes(image: torch.Tensor, box: tuple[int, int, int, int, int]) -> TensorDescriptor:
    """Boxes of an image of even height seen as [N, H/2, 2, W, C]."""
    (n, c, h, w), (stride_n, _, stride_h, stride_w) = image.shape, image.stride()
    return TensorDescriptor(image, [n, h // 2, 2, w, c], [stride_n, 2 * stride_h, stride_h, stride_w, 1], list(box))


def matrix_boxes(matrices: torch.Tensor, box: tuple[int, int, int]) -> TensorDescriptor:
    """Boxes of a stack of matrices whose rows are contiguous: what one source's channels end at reads as zero."""
    return TensorDescriptor(matrices, list(matrices.shape), list(matrices.stride()), list(box))


def tap_sources(conv: Convolution, box: tuple[int, int, int, int], block_k: int) -> tuple:
    """A kernel's arguments for x and for the skip: boxes of the image, boxes [1, block_k, BC] of its taps, channels.

    Of a flipped convolution, which has one source, the boxes are [1, BC, block_k].
    """
    if conv.flipped:
        taps = matrix_boxes(conv.weight.permute(1, 2, 3, 0).flatten(0, 1), (1, box[3], block_k))
        return image_boxes(conv.x, box), taps, conv.x.shape[1], None, None, 0
    args = []
    for image, weight in zip((conv.x, conv.skip), conv.taps()):
        if image is None:
            args += [None, None, 0]
        else:
            taps = matrix_boxes(weight.transpose(0, 1), (1, block_k, box[3]))
            args += [image_boxes(image, box), taps, image.shape[1]]
    return tuple(args)


def output_boxes(conv: Convolution, y: torch.Tensor, second: torch.Tensor | None, pixels: tuple[int, int, int],
                 block_k: int) -> tuple:
    """A kernel's arguments for each of two output images: boxes of its mask and of itself, None where there is none.

    They have ``block_k`` channels, or half where a tile of so many may hold channels of both images.
    """
    box = (*pixels, block_k if conv.c_first % block_k == 0 else block_k // 2)
    images = (conv.mask, y, conv.second_mask, second)
    return tuple(None if image is None else image_boxes(image, box) for image in images)


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
