"""Data gradient of the 3×3 convolution with one or two sources: the forward's own kernels with other operands.

With ``dz`` the gradient before ReLU and ``pad`` 1 ("same") or 0 ("valid"),

    dx[n, c, i, j] = sum over k, r, s of  weight[k, c, r, s] · dz[n, k, i + pad - r, j + pad - s]

which is :func:`conv_relu.convolve` of ``dz`` with the taps flipped, the channel axes exchanged and offset 2 - pad;
16-bit weights are read as they are, others reordered once. The gradients of x and of a skip of its size are output
channels of one convolution, which mostly takes one launch (:func:`convolve_two`). A skip whose centre was cropped
at (crop_h, crop_w) adds that crop to the offset. Under "valid", pixels outside of the crop see no tap and so get zero;
under "same" those next to it would see the taps of the forward's zero padding, so the gradient of the crop is computed
alone and copied into zeros.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from .. import _launch
from .._weights import conv_taps
from .convolution import ConvConfig
from .forward import convolve, convolve_two


def data_grad(
    dz: torch.Tensor,
    weight: torch.Tensor,
    x: torch.Tensor,
    skip: torch.Tensor | None,
    pad: int,
    mask_x: bool,
    mask_skip: bool,
    config: ConvConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(dx, dskip) of ``conv3x3(concat([centre_crop(skip), x], 1), weight)``; dskip has shape (0,) without a skip.

    dz (N, C_out, H_out, W_out), weight (C_out, C_skip + C_x, 3, 3), x (N, C_x, H, W), skip (N, C_skip, >= H, >= W).
    Where ``mask_x`` (``mask_skip``), x (the skip) is a ReLU's output and its gradient is multiplied by (x > 0), which
    makes it the gradient before that ReLU.

    Raises:
        ValueError: the shapes do not belong together.
    """
    c_skip, (c_x, h, w) = 0 if skip is None else skip.shape[1], x.shape[1:]
    expected = (x.shape[0], weight.shape[0], h + 2 * pad - 2, w + 2 * pad - 2)
    if dz.shape != expected or weight.shape[1:] != (c_skip + c_x, 3, 3):
        raise ValueError(
            f"conv_relu data gradient: dz {tuple(dz.shape)} and weight {tuple(weight.shape)} do not fit x "
            f"{tuple(x.shape)}, {c_skip} skip channels and padding {pad}"
        )
    dz, exchanged, flipped = _launch.channels_last(dz), weight.permute(1, 2, 3, 0), _read_in_place(weight, c_skip)
    if not flipped:
        exchanged = conv_taps(exchanged, True).unflatten(1, (3, 3))
    run = functools.partial(convolve, dz, flipped=flipped, config=config)
    offset = 2 - pad
    if skip is not None and skip.shape[2:] == (h, w):
        masks = skip if mask_skip else None, x if mask_x else None
        both = convolve_two(dz, exchanged, c_skip, (h, w), offset, masks=masks, flipped=flipped, config=config)
        if both is not None:
            return both[::-1]
    dx = run(exchanged[c_skip:], (h, w), offset, offset, mask=x if mask_x else None)
    if skip is None:
        return dx, _launch.empty((0,), x.dtype, x.device)
    return dx, _skip_grad(run, exchanged[:c_skip], skip, (h, w), offset, mask_skip)


def _read_in_place(weight: torch.Tensor, c_skip: int) -> bool:
    """Whether bulk copies can read what the forward pass read, which a product of 16 bits takes transposed."""
    if _launch.architecture() < 90 or weight.element_size() != 2 or weight.shape[1] % 8 or c_skip % 8:
        return False
    aligned = weight.is_meta or weight.data_ptr() % 16 == 0
    return aligned and weight.permute(0, 2, 3, 1).is_contiguous()


def _skip_grad(
    run: Callable[..., torch.Tensor],
    weight: torch.Tensor,
    skip: torch.Tensor,
    size: tuple[int, int],
    offset: int,
    mask_skip: bool,
) -> torch.Tensor:
    """The gradient of the whole skip, of which the centre of ``size`` was convolved: zero outside of that."""
    (skip_h, skip_w), (h, w) = skip.shape[2:], size
    top, left = (skip_h - h) // 2, (skip_w - w) // 2
    if offset == 2 or (skip_h, skip_w) == size:  # "valid": no tap reaches the pixels around the centre
        mask = skip if mask_skip else None
        return run(weight, (skip_h, skip_w), offset + top, offset + left, mask=mask)
    centre = slice(top, top + h), slice(left, left + w)
    mask = skip[(..., *centre)] if mask_skip else None
    dskip = _launch.empty_image(tuple(skip.shape), skip.dtype, skip.device).zero_()
    dskip[(..., *centre)] = run(weight, size, offset, offset, mask=mask)
    return dskip
