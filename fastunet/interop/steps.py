"""What a fused forward pass calls: chains of a module's layers as operators, and the layers themselves where it must.

The layers are looked at in each call, so that modes, settings, hooks and swapped parameters count as they do in the
module itself. A chain whose layers are touched, or whose operands the operator refuses, runs through its layers.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastunet import functional, reference
from fastunet.chains import NORMS, layers_are_faster, why_not_norm, with_norm
from fastunet.touched import attached

DROPOUTS = nn.Dropout, nn.Dropout2d


def fits_conv3(conv: nn.Conv2d, skip: bool = False) -> str | None:
    """Why no operator takes a convolution as a 3×3 one, of two maps if ``skip``, or None."""
    if conv.kernel_size != (3, 3):
        return f"it is {conv.kernel_size[0]}×{conv.kernel_size[1]}, not 3×3"
    if conv.padding not in ("same", "valid", (1, 1), (0, 0)):
        return f"it is padded by {conv.padding}"
    strided = conv.stride == (2, 2) and not skip and conv.padding != "same"
    return _usual(conv, (2, 2) if strided else (1, 1))


def _usual(conv: nn.Conv2d | nn.ConvTranspose2d, stride: tuple[int, int]) -> str | None:
    if conv.stride != stride:
        return f"its stride is {conv.stride}"
    if conv.dilation != (1, 1):
        return f"it is dilated by {conv.dilation}"
    if conv.groups != 1:
        return f"it has {conv.groups} groups"
    if conv.padding_mode != "zeros":
        return f"its borders are {conv.padding_mode!r}"
    return None


def fits_up(conv: nn.Conv2d) -> str | None:
    """Why no operator takes a 2×2 convolution behind an upsampling, or None."""
    return f"it is {conv.kernel_size}, not 2×2" if conv.kernel_size != (2, 2) else _usual(conv, (1, 1))


def fits_transpose(conv: nn.ConvTranspose2d) -> str | None:
    """Why no operator takes a transposed convolution, or None."""
    if conv.kernel_size != (2, 2) or conv.padding != (0, 0) or conv.output_padding != (0, 0):
        return f"its kernel is {conv.kernel_size}, its padding {conv.padding}; the operator takes 2×2 without"
    return _usual(conv, (2, 2))


def fits_head(conv: nn.Conv2d) -> str | None:
    """Why no operator takes a convolution as the 1×1 head, or None."""
    if conv.kernel_size != (1, 1) or conv.padding not in ("same", "valid", (0, 0)):
        return "it is no 1×1 convolution"
    return f"it has {conv.out_channels} channels, a head at most 32" if conv.out_channels > 32 else _usual(conv, (1, 1))


def fits_pool(pool: nn.MaxPool2d) -> str | None:
    """Why no operator takes a max-pool, or None."""
    return pool_arguments(pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.return_indices,
                          pool.ceil_mode)  # fmt: skip


def pool_arguments(kernel_size: Any, stride: Any = None, padding: Any = 0, dilation: Any = 1,
                   return_indices: bool = False, ceil_mode: bool = False) -> str | None:
    """The same of the arguments of ``F.max_pool2d``."""
    if kernel_size not in (2, (2, 2)) or stride not in (None, 2, (2, 2)) or padding not in (0, (0, 0)):
        return f"its window is {kernel_size}, stride {stride}, padding {padding}; the operator takes 2×2, stride 2"
    if dilation not in (1, (1, 1)) or return_indices or ceil_mode:
        return "it is dilated, gives indices or rounds sizes up"
    return None


def touched(layer: nn.Module) -> str | None:
    """Why the parameters and settings of a layer do not say all that calling it would do, or None."""
    if reason := attached(layer):
        return reason
    for name in ("weight", "bias"):
        tensor = layer._parameters.get(name)
        if tensor is not None and type(tensor) is not nn.Parameter:
            return f"has a {name} of class {type(tensor).__name__}"
        if tensor is None and name in layer.__dict__ and type(layer.__dict__[name]) is not torch.Tensor:
            return f"has a {name} of class {type(layer.__dict__[name]).__name__}"
    return None


def convolution(x: torch.Tensor, skip: torch.Tensor | None, layers: list[Any], name: str,
                slope: float | None = None, pool: bool = False, plain: bool = False) -> Any:
    """A 3×3 convolution of ``cat([skip, x], 1)`` and what ``layers`` has behind it; with a pooling (y, pooled).

    Dropout among the layers makes them run one by one while it drops, in the order of ``plain`` memory or not, and so
    do norms on a CPU. ``slope`` and ``pool`` stand for an activation, or pooling, that is a function and no layer.
    """
    drops = any(isinstance(layer, DROPOUTS) and layer.training and layer.p for layer in layers)
    norm = any(isinstance(layer, NORMS) for layer in layers)
    if not drops and not (norm and layers_are_faster(x)):
        reason = _why_plain(layers, skip is not None)
        if reason is None and skip is not None and skip.shape[2:] != x.shape[2:]:
            reason = "its inputs differ in size"
        if reason is None:
            try:
                return _convolution(x, skip, layers, slope, pool)
            except ValueError as error:
                reason = str(error)
        say_plain(name, reason)
    y = as_layers_leave_it(x if skip is None else torch.cat([skip, x], 1), drops and plain)
    pooling = layers[-1] if isinstance(layers[-1], nn.MaxPool2d) else None
    for layer in layers if pooling is None else layers[:-1]:
        y = layer(y)
    y = y if slope is None else reference.activation(y, slope)
    if pooling is not None:
        return y, pooling(y)
    return (y, F.max_pool2d(y, 2)) if pool else y


def is_plain(x: torch.Tensor, conv: nn.Conv2d | nn.ConvTranspose2d) -> bool:
    """Whether a module's layers would leave their results in NCHW memory, as its image and weights say."""
    weight = conv._parameters.get("weight")  # a parametrisation may act when it is read
    return all(t is None or t.dim() != 4 or t.stride()[1] >= t.stride()[2] for t in (x, weight))


def as_layers_leave_it(y: Any, plain: bool) -> Any:
    """A result in the memory format that code may count on (``view``); what is no tensor stays."""
    return y.contiguous() if plain and isinstance(y, torch.Tensor) else y


def _why_plain(layers: list[Any], skip: bool) -> str | None:
    for layer in layers:
        if reason := touched(layer):
            return reason
    for layer in layers[1:]:
        reason = None
        if isinstance(layer, NORMS):
            reason = why_not_norm(layer, layers[0].out_channels)
        elif isinstance(layer, nn.MaxPool2d):
            reason = fits_pool(layer)
        if reason is not None:
            return reason
    return fits_conv3(layers[0], skip)


def _convolution(x: torch.Tensor, skip: torch.Tensor | None, layers: list[Any], slope: float | None, pool: bool) -> Any:
    conv, slope = layers[0], _slope(layers, slope)
    norm = next((layer for layer in layers if isinstance(layer, NORMS)), None)
    pool = pool or isinstance(layers[-1], nn.MaxPool2d)
    operands = x, conv.weight, conv.bias
    options: dict[str, Any] = dict(padding="same" if conv.padding in ("same", (1, 1)) else "valid", slope=slope)
    if norm is None and pool and skip is None and conv.stride == (1, 1):
        return functional.conv_relu_pool(*operands, **options)
    options |= dict(skip=skip, stride=conv.stride[0])
    if norm is not None:
        return with_norm(operands, norm, pool=pool, **options)
    y = functional.conv_relu(*operands, **options)
    return (y, functional.max_pool2d(y)) if pool else y


def _slope(layers: list[nn.Module], slope: float | None) -> float:
    """What negative values are multiplied by: as the layers say, or a function in their place; 1 by nothing."""
    for layer in layers:
        if isinstance(layer, nn.ReLU):
            return 0.0
        if isinstance(layer, nn.LeakyReLU):
            return float(layer.negative_slope)  # some give True, meaning to write in place
    return 1.0 if slope is None else slope


def fits_doubling(up: nn.Module) -> str | None:
    """Why a layer is no nearest ×2 upsampling, or None."""
    if type(up) not in (nn.Upsample, nn.UpsamplingNearest2d):
        return "is no upsampling"
    if up.mode != "nearest" or up.size is not None or up.scale_factor not in (2, (2, 2)):
        return "upsamples in another way than nearest ×2"
    return touched(up)


def fits_padding(pad: nn.Module) -> str | None:
    """Why a layer does not put one row and one column of zeros behind the last, or None."""
    if type(pad) is not nn.ZeroPad2d or tuple(pad.padding) != (0, 1, 0, 1):
        return "pads in another way than by zeros at the bottom and right"
    return touched(pad)


def upsampled_convolution(x: torch.Tensor, before: list[Any], layers: list[Any], name: str,
                          slope: float | None = None) -> torch.Tensor:
    """Nearest ×2, a 2×2 convolution that sees zeros at the bottom and right, activation; ``layers``: the last two.

    ``before`` are the layers that upsample and, unless the convolution does it, pad; None for a function.
    """
    conv, reasons = layers[0], [fit(layer) for fit, layer in zip((fits_doubling, fits_padding), before) if layer]
    reason = fits_up(conv) or next(filter(None, [*map(touched, layers), *reasons]), None)
    if conv.padding not in (("same",) if len(before) == 1 else ("valid", (0, 0))):
        reason = "has another padding than it was fused with"
    if reason is None:
        try:
            return functional.upsample_conv_relu(x, conv.weight, conv.bias, slope=_slope(layers, slope))
        except ValueError as error:
            reason = str(error)
    say_plain(name, reason)
    y = before[0](x) if before[0] else F.interpolate(x, scale_factor=2.0, mode="nearest")
    for pad in before[1:]:
        y = pad(y) if pad else F.pad(y, (0, 1, 0, 1))
    for layer in layers:
        y = layer(y)
    return y if slope is None else reference.activation(y, slope)


def transposed_convolution(x: torch.Tensor, conv: nn.ConvTranspose2d, name: str) -> torch.Tensor:
    """A 2×2 transposed convolution with stride 2."""
    return _single(x, conv, name, fits_transpose, functional.conv_transpose2d)


def head(x: torch.Tensor, conv: nn.Conv2d, name: str) -> torch.Tensor:
    """A 1×1 convolution to few channels."""
    return _single(x, conv, name, fits_head, functional.segmentation_head)


def _single(x: torch.Tensor, conv: Any, name: str, fits: Any, operator: Any) -> torch.Tensor:
    if x.device.type == "cpu" and is_plain(x, conv):  # for the operator, both would be reordered
        y: torch.Tensor = conv(x)
        return y
    reason = fits(conv) or touched(conv)
    if reason is None:
        try:
            y = operator(x, conv.weight, conv.bias)
            return y
        except ValueError as error:
            reason = str(error)
    say_plain(name, reason)
    y = conv(x)
    return y


@functools.cache
def _warn_once(name: str, reason: str) -> None:
    warnings.warn(f"{name} runs through its modules, not fused: {reason}", stacklevel=4)


def say_plain(name: str, reason: str) -> None:
    """Warns once that a part of a fused module runs as it did before."""
    if not torch.compiler.is_compiling():
        _warn_once(name, reason)
