"""3×3 convolution + bias + ReLU, forward: "same" and "valid", one or two sources, fused max-pool, fused 1×1 head.

Every function here is one formula with other operands:

    y[n, k, i, j] = epilogue( sum over sources, r, s, c of  w[k, c, r, s] · x[n, c, i + r - off_h, j + s - off_w] )

with x zero outside of the image: off = 1 is "same", off = 0 is "valid". :func:`convolve` is the bare formula for any
offset and output size, which the data gradient calls with flipped weights.
"""

from __future__ import annotations

import torch

from .. import _launch
from .box import launch_box, launch_box_head
from .config import choose_config, why_not
from .convolution import ConvConfig, Convolution, Head
from .cost import pixel_tiles
from .first import launch_first
from .pointer import launch_pointer, launch_pointer_head
from .rows import launch_rows, launch_rows_head
from .split import JOINED_PIXELS, launch_box_split

_LAUNCH = {"pointer": launch_pointer, "first": launch_first, "box": launch_box, "rows": launch_rows}
_LAUNCH_HEAD = {"pointer": launch_pointer_head, "box": launch_box_head, "rows": launch_rows_head}


def forward(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, pad: int,
            slope: float, config: ConvConfig | None = None) -> torch.Tensor:
    """``relu(conv3x3(concat([centre_crop(skip), x], 1), weight) + bias)`` without building the concatenation.

    x (N, C_x, H, W), skip (N, C_skip, ≥ H, ≥ W) or None, weight (C_out, C_skip + C_x, 3, 3), bias (C_out,) or None;
    ``pad`` 1 gives (N, C_out, H, W), 0 gives (N, C_out, H - 2, W - 2).
    """
    conv = _forward_convolution(x, skip, weight, bias, pad, slope)
    y = _launch.empty_image((conv.batch, conv.c_out, *conv.out_size), x.dtype, x.device)
    return _run(conv, y, None, config)


def forward_statistics(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None,
                       pad: int, per_sample: bool, config: ConvConfig | None = None
                       ) -> tuple[torch.Tensor, torch.Tensor | None]:
    """:func:`forward` without an activation, and what a norm needs of it, written by the same kernel.

    That is (tiles, 4, C_out) fp32, image by image: see :func:`epilogue.store_statistics`. None of an empty result, and
    where a tile would join pixels of several images though ``per_sample``.
    """
    conv = _forward_convolution(x, skip, weight, bias, pad, 1.0)
    y = _launch.empty_image((conv.batch, conv.c_out, *conv.out_size), x.dtype, x.device)
    if not y.numel():
        return y, None
    config = config or choose_config(conv)
    (h, w), n = conv.out_size, conv.batch
    if config.splits > 1:
        tiles, separate = n * _launch.cdiv(h * w, JOINED_PIXELS), True
    else:
        tiles = config.stack * pixel_tiles(conv, config)  # of stacked columns each
        separate = config.block_n == 1 and (config.variant not in ("pointer", "first") or h * w % config.pixels == 0)
    statistics = None
    if separate or n == 1 or not per_sample:
        statistics = _launch.empty((tiles, 4, conv.c_out), torch.float32, x.device)
    return _run(conv, y, None, config, statistics), statistics


def forward_pool(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, pad: int, slope: float,
                 config: ConvConfig | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`forward` of one source and its 2×2, stride-2 max-pool (odd sizes floor), both written by one kernel."""
    conv = _forward_convolution(x, None, weight, bias, pad, slope)
    h, w = conv.out_size
    y = _launch.empty_image((conv.batch, conv.c_out, h, w), x.dtype, x.device)
    pooled = _launch.empty_image((conv.batch, conv.c_out, h // 2, w // 2), x.dtype, x.device)
    return _run(conv, y, pooled if pooled.numel() else None, config), pooled


def forward_head(x: torch.Tensor, skip: torch.Tensor | None, weight: torch.Tensor, bias: torch.Tensor | None, pad: int,
                 head_weight: torch.Tensor, head_bias: torch.Tensor | None, output: str,
                 config: ConvConfig | None = None) -> torch.Tensor:
    """:func:`forward` with ReLU and the 1×1 head on its result, which is never written. For inference.

    head_weight (classes, C_out, 1, 1) with at most 32 classes and C_out <= 128; ``output`` "logits" or
    "probabilities" gives (N, classes, H, W) in x's dtype, "labels" uint8 (N, H, W), the first maximum,
    "regions" the same of one more than the last positive logit, or 0.
    """
    conv = _forward_convolution(x, skip, weight, bias, pad, 0.0)
    head = Head(head_weight.reshape(head_weight.shape[:2]).contiguous(), head_bias, output)
    if conv.c_out > 128:
        raise ValueError(f"the fused head takes at most 128 features, not {conv.c_out}")
    if output in ("labels", "regions"):
        out = _launch.empty((conv.batch, *conv.out_size), torch.uint8, x.device)
    else:
        out = _launch.empty_image((conv.batch, head.classes, *conv.out_size), x.dtype, x.device)
    if out.numel():
        config = _checked(config, conv, head.classes) if config else choose_config(conv, classes=head.classes)
        _LAUNCH_HEAD[config.variant](conv, head, out, config)
    return out


def convolve(x: torch.Tensor, weight: torch.Tensor, out_size: tuple[int, int], offset_h: int, offset_w: int, *,
             mask: torch.Tensor | None = None, flipped: bool = False, config: ConvConfig | None = None) -> torch.Tensor:
    """``y[n,k,i,j] = (sum_{r,s,c} weight[k,r,s,c] · x[n,c,i+r-offset_h,j+s-offset_w]) · (mask[n,k,i,j] > 0)``.

    x (N, C_in, H, W); weight (C_out, 3, 3, C_in) of any strides, with weight[k,2-r,2-s,c] in the formula if
    ``flipped``, for which bulk copies need the unit stride in C_out and 16 bits; ``out_size`` any (H, W), elements that
    no tap reaches are 0; mask None or (N, C_out, \\*out_size). No bias, no ReLU.
    """
    x = _launch.channels_last(x)
    mask = None if mask is None else _launch.channels_last(mask)
    conv = Convolution(x, None, weight, (offset_h, offset_w), tuple(out_size), mask=mask, flipped=flipped)
    y = _launch.empty_image((conv.batch, conv.c_out, *conv.out_size), x.dtype, x.device)
    return _run(conv, y, None, config)


def convolve_two(x: torch.Tensor, weight: torch.Tensor, c_first: int, out_size: tuple[int, int], offset: int, *,
                 masks: tuple[torch.Tensor | None, torch.Tensor | None], flipped: bool = False,
                 config: ConvConfig | None = None) -> tuple[torch.Tensor, torch.Tensor] | None:
    """:func:`convolve` to two images, of the first ``c_first`` output channels and of the others, by one launch.

    None where another tile, of one image, should take less time, or where ``config`` is one.
    """
    masks = tuple(None if mask is None else _launch.channels_last(mask) for mask in masks)
    conv = Convolution(_launch.channels_last(x), None, weight, (offset, offset), tuple(out_size), mask=masks[0],
                       flipped=flipped, c_first=c_first, second_mask=masks[1])
    config = config or choose_config(conv)
    if not config.writes_two or why_not(config, conv) is not None:
        return None
    sizes = ((conv.batch, c, *conv.out_size) for c in (c_first, conv.c_out - c_first))
    first, second = (_launch.empty_image(size, x.dtype, x.device) for size in sizes)
    if first.numel():
        _LAUNCH[config.variant](conv, first, None, None, config, second)
    return first, second


def _forward_convolution(x, skip, weight, bias, pad: int, slope: float) -> Convolution:
    x = _launch.channels_last(x)
    h, w = x.shape[2:]
    if skip is not None:
        top, left = (skip.shape[2] - h) // 2, (skip.shape[3] - w) // 2
        skip = _launch.channels_last(skip)[:, :, top : top + h, left : left + w]
    return Convolution(x, skip, weight.permute(0, 2, 3, 1), (pad, pad), (h + 2 * pad - 2, w + 2 * pad - 2), bias, None,
                       slope)


def _run(conv: Convolution, y: torch.Tensor, pooled: torch.Tensor | None, config: ConvConfig | None,
         statistics: torch.Tensor | None = None) -> torch.Tensor:
    if y.numel():
        config = _checked(config, conv, 0) if config else choose_config(conv, pool=pooled is not None)
        run = launch_box_split if config.splits > 1 else _LAUNCH[config.variant]
        run(conv, y, pooled, statistics, config)
    return y


def _checked(config: ConvConfig, conv: Convolution, classes: int) -> ConvConfig:
    reason = why_not(config, conv, classes=classes)
    if reason is not None:
        raise ValueError(f"convolution variant {config.variant!r} cannot run here: {reason}")
    return config
