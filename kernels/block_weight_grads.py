"""All weight and bias gradients of a block at once: one launch of products where one tile suits them, one of sums."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from . import _launch, _stride2_weight_grad
from ._reduce import add_rows
from .conv.weight_grad import Product, as_weight, partial_sums
from .upsample_conv import fold_rows


@triton.jit(do_not_specialize=["splits", "splits1", "up_splits", "start1", "start2"])
def block_sums_kernel(partial_ptr, dw_ptr, db_ptr, splits, size, row_size, partial1_ptr, dw1_ptr, db1_ptr, splits1,
                      size1, row_size1, up_ptr, dwu_ptr, dbu_ptr, up_splits, up_size, up_row_size, start1, start2,
                      FOLDS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_M: tl.constexpr):
    """The second passes of two convolutions and, if there is one, of an upsampling, side by side.

    The second's programs begin at ``start1``, the upsampling's at ``start2``. ``up_size`` are the elements of dwu, or
    C_out and C_in where FOLDS.
    """
    pid = tl.program_id(0)
    if pid < start1:
        add_rows(pid, partial_ptr, dw_ptr, db_ptr, splits, size, row_size, BLOCK_S, BLOCK_M)
    elif pid < start2:
        add_rows(pid - start1, partial1_ptr, dw1_ptr, db1_ptr, splits1, size1, row_size1, BLOCK_S, BLOCK_M)
    elif up_ptr is not None:
        if FOLDS:  # which holds four sums
            fold_rows(pid - start2, up_ptr, dwu_ptr, dbu_ptr, up_splits, up_size[0], up_size[1], up_row_size,
                      BLOCK_S // 2, BLOCK_M)
        else:
            add_rows(pid - start2, up_ptr, dwu_ptr, dbu_ptr, up_splits, up_size, up_row_size, BLOCK_S, BLOCK_M)


def weight_grads(
    dz1: torch.Tensor, x: torch.Tensor, skip: torch.Tensor | None, dz2: torch.Tensor, y1: torch.Tensor,
    du: torch.Tensor | None, low: torch.Tensor | None, pad: int, transpose: bool,
) -> tuple[torch.Tensor, ...]:
    """(dw1, db1, dw2, db2, dwu, dbu) of ``conv2(relu(conv1([skip, x])))`` and of x itself if it is made of ``low``.

    dz1 and dz2 are the gradients before the ReLUs, y1 the input of conv2. ``du`` is the gradient of x, before a ReLU,
    where that is ``low`` after a transposed convolution (``transpose``) or an upsampling one; without it the last two
    have no elements. Shapes and memory are those of the single operators.
    """
    products = [Product(dz1, x, skip, True), Product(dz2, y1, None, True)]
    rows = partial_sums(products, pad)
    weights = [_launch.empty(each.shape, x.dtype, x.device) for each in products]
    biases = [_launch.empty((each.shape[0],), x.dtype, x.device) for each in products]
    up, up_size, columns, folds = None, 0, 0, False
    if du is None or low is None:
        dwu, dbu = _launch.empty((0,), x.dtype, x.device), _launch.empty((0,), x.dtype, x.device)
    else:
        du, low = _launch.channels_last(du), _launch.channels_last(low)
        c_in, c_out, side, folds = low.shape[1], du.shape[1], 2 if transpose else 3, not transpose
        config = _stride2_weight_grad.choose_config(du, low, side)
        up = _stride2_weight_grad.partial_sums(du, low, du, side, in_first=transpose, config=config)
        shape = (c_in, 4, c_out) if transpose else (c_out, 4, c_in)
        dwu, dbu = _launch.empty(shape, x.dtype, x.device), _launch.empty((c_out,), x.dtype, x.device)
        up_size, columns = (c_out, c_in) if folds else dwu.numel(), c_out * c_in if folds else up.shape[1]
    block_s, block_m = _tile(max(len(each) for each in (*rows, *([] if up is None else [up]))))
    starts = [_launch.cdiv(each.row_size, block_m) for each in products]
    starts[1] += starts[0]
    programs = starts[1] + _launch.cdiv(columns, block_m) + (_launch.cdiv(dbu.numel(), block_m) if folds else 0)
    arguments = [argument for partial, dw, db in zip(rows, weights, biases)
                 for argument in (partial, dw, db, len(partial), dw.numel(), partial.shape[1])]  # fmt: skip
    arguments += [None] * 6 if up is None else [up, dwu, dbu, len(up), up_size, up.shape[1]]
    _launch.launch(block_sums_kernel, (programs,), *arguments, *starts, FOLDS=folds, BLOCK_S=block_s,
                   BLOCK_M=block_m)
    if up is not None:
        dwu = dwu.unflatten(1, (2, 2)).permute(0, 3, 1, 2)
    return as_weight(weights[0]), biases[0], as_weight(weights[1]), biases[1], dwu, dbu


def _tile(splits: int) -> tuple[int, int]:
    """(BLOCK_S, BLOCK_M): 2048 elements, in which few rows are loaded at once and many rows take few steps."""
    block_s = 4 if splits <= 8 else 32 if splits < 512 else 128
    return block_s, 2048 // block_s
