"""PyTorch's gradients of a convolution of one source, and what a weight's gradient looks like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunet.functional._layout import empty_nhwc, nhwc


def gradients(
    dz: Tensor, x: Tensor, weight: Tensor, stride: int, pad: int, needed: Sequence[bool], transposed: bool = False
) -> list[Any]:
    """(dx, dw, db) by one call of PyTorch, None where none is ``needed``; in any memory order.

    The output of a transposed convolution is padded by ``pad``, too.
    """
    geometry = [stride, stride], [pad, pad], [1, 1], transposed, [pad, pad] if transposed else [0, 0], 1
    found = torch.ops.aten.convolution_backward(dz, x, weight, [dz.shape[1]], *geometry, list(needed))
    return [each if need else None for each, need in zip(found, needed)]


def weight_gradient(
    dz: Tensor, x: Tensor, shape: tuple[int, ...], stride: int, pad: int, has_bias: bool, transposed: bool = False
) -> tuple[Tensor, Tensor]:
    """dw of a weight of ``shape``, in any memory order, and db, without elements where there is no bias."""
    weight = x.new_empty(()).expand(shape)
    _, dw, db = gradients(nhwc(dz), nhwc(x), weight, stride, pad, (False, True, has_bias), transposed)
    return dw, dw.new_empty(0) if db is None else db


def fake_weight_gradient(dz: Tensor, shape: tuple[int, int, int, int], has_bias: bool) -> tuple[Tensor, Tensor]:
    """The shapes and strides of dw, in NHWC memory, and db."""
    return empty_nhwc(dz.new_empty(shape[0]), *shape[1:]), dz.new_empty(dz.shape[1] if has_bias else 0)
