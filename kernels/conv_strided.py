"""3x3 convolution with stride 2 and padding 1, bias and activation: launchers over ``_stride2``.

It is what ``_stride2`` calls the data gradient of SIDE 3, with this operator's weights for k; so its own data gradient
is the forward pass there, and its weight gradient the one there with image and gradient exchanged. The kernels see an
image as pairs of rows and columns: one of odd sides is copied with zeros at its bottom or right, which the padding is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from . import _launch, _reduce, _stride2, _stride2_weight_grad
from ._stride2 import Stride2Config
from ._stride2_weight_grad import WeightGradConfig
from ._weights import stride2_slots, stride2_taps


def _check(pad: int) -> None:
    if pad != 1:
        raise ValueError(f"a convolution of stride 2 has kernels for padding 1, not {pad}")


def _even(x: torch.Tensor) -> torch.Tensor:
    """NHWC memory of ``x`` with even sides."""
    height, width = x.shape[2:]
    if height % 2 or width % 2:
        x = F.pad(x, (0, width % 2, 0, height % 2))
    return _launch.channels_last(x)


def forward(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pad: int, slope: float,
    config: Stride2Config | None = None,
) -> torch.Tensor:  # fmt: skip
    """y (N, C_out, (H + 1) // 2, (W + 1) // 2) of ``x`` (N, C_in, H, W) and ``weight`` (C_out, C_in, 3, 3).

    Raises:
        ValueError: ``pad`` is not 1; so do the gradients.
    """
    _check(pad)
    x = _even(x)
    n, _, height, width = x.shape
    y = _launch.empty_image((n, weight.shape[0], height // 2, width // 2), x.dtype, x.device)
    config = config or _stride2.choose_data_grad_config(x, y, side=3)
    return _stride2.data_grad(x, stride2_taps(weight, out_first=False), y, None, 3, config, bias, slope)


def data_grad(
    dz: torch.Tensor, weight: torch.Tensor, x: torch.Tensor, pad: int, config: Stride2Config | None = None
) -> torch.Tensor:
    """dx, of the shape of ``x`` (N, C_in, H, W), of ``dz``, the gradient before this operator's own activation."""
    _check(pad)
    dz = _launch.channels_last(dz)
    config = config or _stride2.choose_forward_config(dz, weight.shape[1], side=3)
    dx = _stride2.forward(dz, stride2_slots(weight), None, slope=1.0, side=3, config=config)
    return _launch.channels_last(dx[:, :, : x.shape[2], : x.shape[3]])


def weight_grad(
    dz: torch.Tensor, x: torch.Tensor, pad: int, has_bias: bool, config: WeightGradConfig | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """dw (C_out, C_in, 3, 3), channels_last, and db (C_out,) in ``x``'s dtype; db is (0,) without ``has_bias``."""
    _check(pad)
    dz, x = _launch.channels_last(dz), _even(x)
    config = config or _stride2_weight_grad.choose_config(x, dz, side=3)
    summed = dz if has_bias else None
    partial = _stride2_weight_grad.partial_sums(x, dz, summed, side=3, in_first=True, config=config)
    dw, db = _reduce.sum_gradients(partial, (dz.shape[1], 9, x.shape[1]), x.dtype)
    return dw.unflatten(1, (3, 3)).permute(0, 3, 1, 2), db
