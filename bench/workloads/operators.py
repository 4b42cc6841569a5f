"""Workloads of single operators at the layers' shapes, with the plain PyTorch code that each replaces."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F

from bench.measuring import floors
from bench.measuring.precision import DTYPES
from bench.workloads.variants import OPERATOR_VARIANTS, Variant
from bench.workloads.workload import Workload, forward_and_backward, random_like_activations
from fastunet import functional
from fastunet.architecture import Architecture
from fastunet.inspection.layers import Call, Tensor, network_calls, standalone_calls
from fastunet.inspection.repeats import Function
from fastunet.reference import centre_crop

SUBJECTS = ("conv_relu", "conv_relu_pool", "max_pool2d", "upsample_conv_relu", "conv_transpose2d", "segmentation_head")
FORWARD, BOTH = "forward", "forward + backward"
_FIRST_LAYER = "encoders.0.conv1"
_MARGIN = {"fp32": 1e-5, "tf32": 4e-3, "fp16": 2e-3, "bf16": 1.6e-2}
"""Share of the largest pre-activation that rounding may amount to."""


def _plain_conv_relu(x, skip, weight, bias, pad, slope):
    if skip is not None:
        x = torch.cat([centre_crop(skip, *x.shape[2:]), x], dim=1)
    y = F.conv2d(x, weight, bias, padding=pad)
    return (y if slope == 1 else F.relu(y),)


def _plain_conv_relu_pool(x, weight, bias, pad, slope):
    y = F.conv2d(x, weight, bias, padding=pad)
    y = y if slope == 1 else F.relu(y)
    return y, F.max_pool2d(y, 2)


def _plain_upsample_conv_relu(x, weight, bias, slope):
    upsampled = F.interpolate(x, scale_factor=2, mode="nearest")
    y = F.conv2d(F.pad(upsampled, (0, 1, 0, 1)), weight, bias)
    return (y if slope == 1 else F.relu(y),)


def _padding(pad: int) -> str:
    return "same" if pad else "valid"


PLAIN = {
    "conv_relu": _plain_conv_relu,
    "conv_relu_pool": _plain_conv_relu_pool,
    "max_pool2d": lambda x: (F.max_pool2d(x, 2),),
    "upsample_conv_relu": _plain_upsample_conv_relu,
    "conv_transpose2d": lambda x, weight, bias: (F.conv_transpose2d(x, weight, bias, stride=2),),
    "segmentation_head": lambda x, weight, bias, output: (F.conv2d(x, weight, bias),),
}
"""What a plain network does in place of each operator; the arguments are those of the operator's schema."""

FUSED = {
    "conv_relu": lambda x, skip, weight, bias, pad, slope: (
        functional.conv_relu(x, weight, bias, skip=skip, padding=_padding(pad)),
    ),
    "conv_relu_pool": lambda x, weight, bias, pad, slope: functional.conv_relu_pool(
        x, weight, bias, padding=_padding(pad)
    ),
    "max_pool2d": lambda x: (functional.max_pool2d(x),),
    "upsample_conv_relu": lambda x, weight, bias, slope: (functional.upsample_conv_relu(x, weight, bias),),
    "conv_transpose2d": lambda x, weight, bias: (functional.conv_transpose2d(x, weight, bias),),
    "segmentation_head": lambda x, weight, bias, output: (functional.segmentation_head(x, weight, bias),),
}


def operator_workloads(architecture: Architecture, batch: int, side: int, precision: str, *,
                       subjects: Iterable[str] = SUBJECTS, layers: Iterable[str] | None = None,
                       without: tuple[tuple[str, str], ...] = ()) -> list[Workload]:
    """Forward, and forward with backward, of a network's operators on square images; equal shapes once.

    ``layers`` keeps only the named ones.
    """
    network = [_single(call) for call in network_calls(architecture, batch, side, side, loss=False)]
    alone = [call for call in standalone_calls(architecture, batch, side, side)
             if call.operator.startswith("max_pool2d")]  # fmt: skip
    first: dict[str, Call] = {}
    for call in (*network, *alone):
        if call.operator in subjects and (layers is None or call.layer in layers):
            first.setdefault(f"{call.operator} {call.arguments}", call)
    found = []
    for call in first.values():
        source = alone if call.operator == "max_pool2d" else network
        backward = [c for c in source if c.layer == call.layer and c.operator not in SUBJECTS]
        found += [_workload(call, [], FORWARD, precision, without), _workload(call, backward, BOTH, precision, without)]
    return found


def _single(call: Call) -> Call:
    """``call`` as it is of the operator by itself, which packs the weights of each direction on its own."""
    arguments = call.arguments
    if arguments.get("packed") is not None:
        arguments = arguments | dict(weight=Tensor(arguments["weight"].shape), packed=None)
    return replace(call, operator=call.operator.removesuffix("_packing"), arguments=arguments)


def _workload(call: Call, backward: list[Call], step: str, precision: str, without) -> Workload:
    dtype = DTYPES[precision]
    names = [name for name, value in call.arguments.items() if isinstance(value, Tensor)]
    shapes = [call.arguments[name].shape for name in names]
    options = {name: value for name, value in call.arguments.items() if name not in names}
    needs_grad = [not (name == "x" and call.layer == _FIRST_LAYER) for name in names]
    outputs = _output_shapes(call)

    def operands(device: torch.device, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        drawn = [_draw(name, shape, dtype, device, generator, call.layer) for name, shape in zip(names, shapes)]
        if step == BOTH:
            cotangents = [random_like_activations(s, dtype, device, generator, relu=False) for s in outputs]
            if options.get("slope") == 0:
                with torch.no_grad():
                    linear = PLAIN[call.operator](**options | dict(slope=1.0), **dict(zip(names, drawn)))
                _forget_undecided(cotangents, linear[0].float(), _MARGIN[precision])
            drawn += cotangents
        return drawn

    def complete(forward, wrap=lambda f: f) -> Function:
        wrapped = wrap(lambda *tensors: forward(**options, **dict(zip(names, tensors))))
        if step == BOTH:
            return lambda *t: forward_and_backward(wrapped, t[: len(names)], list(t[len(names) :]), needs_grad)
        return torch.no_grad()(wrapped)

    def build(variant: Variant, device: torch.device) -> Function:
        return complete((FUSED if variant.form == "fastunet" else PLAIN)[call.operator], variant.wrap)

    def exact(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return complete(PLAIN[call.operator])(*(t.double() for t in tensors))

    return Workload(call.operator, step, _shape(call, outputs), shapes[0][0], precision,
                    floors.of_calls([call, *backward], dtype), _roundings(call, precision), OPERATOR_VARIANTS,
                    operands, build, exact, without)  # fmt: skip


def _roundings(call: Call, precision: str) -> int:
    """1, but 6 for sub-pixel upsampling in float32: the gradient of x adds 9 products of summed weights in one
    accumulator where the plain form adds 4 and then their sums; measured are 12 eps beside 3."""
    return 6 if call.operator == "upsample_conv_relu" and precision in ("fp32", "tf32") else 1


def _forget_undecided(cotangents: list[torch.Tensor], linear: torch.Tensor, margin: float) -> None:
    """Zeroes the few cotangents behind which rounding alone decides which way a ReLU or a 2×2 maximum (the second
    cotangent) goes: there right results differ by whole gradients. ``linear`` is the pre-activation."""
    near = margin * linear.abs().max()
    cotangents[0].masked_fill_(linear.abs() <= near, 0)
    if len(cotangents) > 1:
        height, width = (2 * side for side in cotangents[1].shape[2:])
        windows = linear[..., :height, :width].unfold(2, 2, 2).unfold(3, 2, 2).flatten(4)
        second, first = windows.topk(2).values.flip(-1).unbind(-1)
        cotangents[1].masked_fill_((first.abs() <= near) | (first - second.clamp(min=0) <= near), 0)


def _output_shapes(call: Call) -> list[tuple[int, ...]]:
    meta = dict(zip(call.arguments, call.allocate(torch.float32)))
    return [tuple(result.shape) for result in PLAIN[call.operator](**meta)]


def _draw(name, shape, dtype, device, generator, layer) -> torch.Tensor:
    if name == "weight":
        std = math.sqrt(2 / math.prod(shape[1:]))
        return (torch.randn(shape, generator=generator, device=device) * std).to(dtype)
    if name == "bias":
        return (torch.randn(shape, generator=generator, device=device) * 0.1).to(dtype)
    return random_like_activations(shape, dtype, device, generator, relu=layer != _FIRST_LAYER)


def _shape(call: Call, outputs: list[tuple[int, ...]]) -> str:
    """"16×(32+32)×128×128 → 32": batch, channels (skip + x), pixels, and the channels out."""
    x, skip = call.arguments["x"].shape, call.arguments.get("skip")
    channels = f"({skip.shape[1]}+{x[1]})" if isinstance(skip, Tensor) else str(x[1])
    return f"{x[0]}×{channels}×{x[2]}×{x[3]} → {outputs[0][1]}"
