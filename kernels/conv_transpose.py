"""2x2 stride-2 transposed convolution with bias, weight (C_in, C_out, 2, 2): launchers over ``_stride2``.

y[n, 2i + a, 2j + b, co] = bias[co] + sum_ci w[ci, co, a, b] x[n, i, j, ci].
"""

from __future__ import annotations

import torch

from . import _launch, _reduce, _stride2, _stride2_weight_grad
from ._stride2 import Stride2Config
from ._stride2_weight_grad import WeightGradConfig
from ._weights import stride2_taps


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, config: Stride2Config | None = None
) -> torch.Tensor:
    """y (N, C_out, 2H, 2W), channels_last, of ``x`` (N, C_in, H, W)."""
    x = _launch.channels_last(x)
    config = config or _stride2.choose_forward_config(x, weight.shape[1], side=2)
    k = stride2_taps(weight, out_first=True)
    return _stride2.forward(x, k, bias, slope=1.0, side=2, config=config)


def data_grad(
    dy: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, mask_x: bool, config: Stride2Config | None = None
) -> torch.Tensor:
    """dx (N, C_in, H, W) of ``dy`` (N, C_out, 2H, 2W), times x > 0 if ``mask_x`` (x the output of a ReLU)."""
    dy, x = _launch.channels_last(dy), _launch.channels_last(x)
    config = config or _stride2.choose_data_grad_config(dy, x, side=2)
    k = stride2_taps(weight, out_first=False)
    dx = _launch.empty_image(tuple(x.shape), x.dtype, x.device)
    return _stride2.data_grad(dy, k, dx, x if mask_x else None, side=2, config=config)


def weight_grad(
    dy: torch.Tensor, x: torch.Tensor, has_bias: bool, config: WeightGradConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dw (C_in, C_out, 2, 2), channels_last, and db (C_out,) in ``x``'s dtype; db is (0,) without ``has_bias``."""
    dy, x = _launch.channels_last(dy), _launch.channels_last(x)
    config = config or _stride2_weight_grad.choose_config(dy, x, side=2)
    summed = dy if has_bias else None
    partial = _stride2_weight_grad.partial_sums(dy, x, summed, side=2, in_first=True, config=config)
    dw, db = _reduce.sum_gradients(partial, (x.shape[1], 4, dy.shape[1]), x.dtype)
    return dw.unflatten(1, (2, 2)).permute(0, 3, 1, 2), db
