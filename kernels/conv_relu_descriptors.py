"""Bulk-copy descriptors of a 3×3 convolution's inputs. What lies outside of their shapes is read as zero."""

from __future__ import annotations

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from .conv_relu_config import Source


def image_boxes(image: torch.Tensor, box: tuple[int, int, int, int]) -> TensorDescriptor:
    """NHWC boxes (BN, BH, BW, BC) of an image that may be a crop of a larger one."""
    (n, c, h, w), (stride_n, _, stride_h, stride_w) = image.shape, image.stride()
    return TensorDescriptor(image, [n, h, w, c], [stride_n, stride_h, stride_w, 1], list(box))


def row_pair_boxes(image: torch.Tensor, box: tuple[int, int, int, int, int]) -> TensorDescriptor:
    """Boxes of an image of even height seen as [N, H/2, 2, W, C]."""
    (n, c, h, w), (stride_n, _, stride_h, stride_w) = image.shape, image.stride()
    return TensorDescriptor(image, [n, h // 2, 2, w, c], [stride_n, 2 * stride_h, stride_h, stride_w, 1], list(box))


def weight_taps(source: Source, weight_tap: int, block_k: int, block_c: int) -> TensorDescriptor:
    """Boxes [1, block_k, block_c] of a source's weights seen as [9 taps, C_out, C]; no channel of a next tap enters."""
    c_out, _, c = source.weight.shape
    return TensorDescriptor(source.weight, [9, c_out, c], [weight_tap, 9 * weight_tap, 1], [1, block_k, block_c])


def weight_row_pairs(source: Source, weight_tap: int, block_k: int, block_c: int) -> TensorDescriptor:
    """Boxes [1, 2, block_k, block_c] of a source's weights seen as [3 columns, 3 rows, C_out, C].

    At row j - 1 a box holds the taps of rows j - 1 and j, and zeros for a row that the kernel does not have.
    """
    c_out, _, c = source.weight.shape
    return TensorDescriptor(source.weight, [3, 3, c_out, c], [weight_tap, 3 * weight_tap, 9 * weight_tap, 1],
                            [1, 2, block_k, block_c])
