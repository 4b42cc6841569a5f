"""Every operator call of a U-Net, forward and backward, with the shapes of its arguments.

The network itself runs, on PyTorch's meta device, where tensors have shapes and nothing is computed. The list is the
one source for ahead-of-time compilation, counted traffic, tuning and benchmarks.
"""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet.architecture import Architecture
from fastunet.dispatch import OPERATORS
from fastunet.functional import dice  # noqa: F401  (its import defines the operators of losses and metrics)
from fastunet.functional._layout import nhwc_strides
from fastunet.unet import UNet

Shape = tuple[int, ...]

CASES: dict[str, tuple[Architecture, tuple[int, int]]] = {
    "brats 128": (Architecture.from_preset("brats"), (128, 128)),
    "brats 240": (Architecture.from_preset("brats"), (240, 240)),
    "isbi 572": (Architecture.from_preset("isbi"), (572, 572)),
}
"""The reference networks at the image sizes for which kernels are checked, tuned and measured."""

NORM_CASES = {f"{preset} 256": (Architecture.from_preset(preset), (256, 256))
              for preset in ("milesial", "monai_basic", "nnunet2d")}  # fmt: skip
"""The presets with norms, whose kernels are checked on a GPU, and listed on request."""


@dataclass(frozen=True)
class Tensor:
    """An argument's shape; ``dtype`` None is that of the computation. 4-D tensors of it are in NHWC memory.

    ``pixel_major`` says so of (N, C, pixels) tensors. ``is_read`` is False where only the shape matters. Integer
    tensors hold values below ``classes``.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype | None = None
    pixel_major: bool = False
    is_read: bool = True
    classes: int = 0

    def allocate(self, dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
        """An uninitialised tensor of this shape and memory layout."""
        if len(self.shape) == 4:
            strides: Shape = nhwc_strides(self.shape)
        elif self.pixel_major:
            _, channels, pixels = self.shape
            strides = (channels * pixels, 1, channels)
        else:
            return torch.empty(self.shape, dtype=self.dtype or dtype, device=device)
        return torch.empty_strided(self.shape, strides, dtype=self.dtype or dtype, device=device)


@dataclass(frozen=True)
class Call:
    """One call of operator ``fastunet::<operator>`` by a layer.

    ``arguments`` are those of the operator's schema but ``backend``, in order, with a :class:`Tensor` for each tensor.
    ``macs`` counts the multiply-adds that the layer needs, after sub-pixel upsampling has saved its share.
    """

    layer: str
    operator: str
    arguments: dict[str, Any]
    macs: int

    def allocate(self, dtype: torch.dtype, device: torch.device | str = "meta") -> list[Any]:
        """The arguments with every :class:`Tensor` as an uninitialised tensor of ``dtype``."""
        return [a.allocate(dtype, device) if isinstance(a, Tensor) else a for a in self.arguments.values()]

    def random(self, dtype: torch.dtype, device: torch.device | str, seed: int = 0) -> list[Any]:
        """The arguments with random contents: normal values, weights scaled to keep their outputs' variance, variances,
        labels."""
        generator = torch.Generator(device).manual_seed(seed)
        operands = self.allocate(dtype, device)
        for (name, spec), tensor in zip(self.arguments.items(), operands):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.dtype.is_floating_point:
                fan_in = math.prod(spec.shape[1:]) if name.endswith("weight") else 1
                tensor.normal_(std=fan_in**-0.5, generator=generator)
                if name == "var":
                    tensor.abs_()
            else:
                tensor.random_(spec.classes, generator=generator)
        return operands

    def launcher(self) -> Callable[..., Any]:
        """The Triton launcher, to be called with the tensors of :meth:`allocate` or :meth:`random`."""
        return OPERATORS[self.operator].launcher()

    def reference(self, operands: list[Any], dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        """PyTorch's results of the operator for ``operands``, whose floating tensors are first cast to ``dtype``."""
        cast = [o.to(dtype) if isinstance(o, torch.Tensor) and o.dtype.is_floating_point else o for o in operands]
        results = OPERATORS[self.operator].torch_impl(*(cast if dtype else operands))
        return results if isinstance(results, tuple) else (results,)

    def floor_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the arguments that must be read and of the results that must be written, each once."""
        read = sum(
            math.prod(a.shape) * (a.dtype or dtype).itemsize
            for a in self.arguments.values()
            if isinstance(a, Tensor) and a.is_read
        )
        results = OPERATORS[self.operator].fake(*self.allocate(dtype))
        results = results if isinstance(results, tuple) else (results,)
        return read + sum(int(r.numel() * r.element_size()) for r in results)


def network_calls(architecture: Architecture, batch: int, height: int, width: int, *, training: bool = True,
                  output: str = "logits", loss: bool = True) -> list[Call]:
    """The operator calls of one forward pass and, if ``training``, of the loss and the backward pass, in order.

    ``output`` is "logits", "probabilities", "labels" or "regions". Inputs need no gradient. ``loss`` False leaves out
    the loss. Parameters of norms are in float32, as under autocast.

    Raises:
        ValueError: the image size does not fit the architecture.
    """
    with torch.device("meta"):
        model = UNet(**architecture.as_dict()).to(_COMPUTED).train(training)
        x = torch.empty(batch, architecture.in_channels, height, width, dtype=_COMPUTED)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.GroupNorm):
            module.float()
    recorder = _Recorder(model)
    with recorder, torch.set_grad_enabled(training):
        if not training:
            _OUTPUTS[output](model, x)
            return recorder.calls
        logits = model(x)
        recorder.calls += loss_calls(batch, logits.shape[1], math.prod(logits.shape[2:])) if loss else []
        logits.backward(torch.empty_like(logits))
    return recorder.calls


def standalone_calls(architecture: Architecture, batch: int, height: int, width: int) -> list[Call]:
    """Calls that a training step does not make: ReLU's gradient, pooling alone, gradients with the other mask and of
    weights not yet packed, the confusion matrix of logits or labels, and the loss of regions."""
    out_height, out_width = architecture.output_size(height, width)
    pixels, classes = out_height * out_width, architecture.num_classes
    labels = Tensor((batch, pixels), torch.uint8, classes=classes)
    logits = Tensor((batch, classes, pixels), pixel_major=True)
    found: dict[Any, Call] = {
        predictions: Call("metrics", "confusion_counts",
                          dict(predictions=predictions, labels=labels, classes=classes, ignore_index=None), 0)
        for predictions in (logits, labels)
    }  # fmt: skip
    read = dict(logits=logits, labels=labels, region_weights=None, members=Tensor((classes,), torch.int32, classes=8),
                ignore_index=None, cross_entropy=True)  # fmt: skip
    sums, grad = Tensor((1, 3 * classes + 3), torch.float32), Tensor((), torch.float32)
    found["region sums"] = Call("loss", "dice_region_sums", read | dict(per_sample=False), 0)
    found["their gradient"] = Call("loss", "dice_region_sums_grad", dict(grad=grad, slopes=sums) | read, 0)
    for call in network_calls(architecture, batch, height, width, loss=False):
        name, arguments = call.operator, call.arguments
        if name == "block_weight_grads":
            found |= {(operator, repr(a)): Call(f"{call.layer}.{part}", operator, a, 0)
                      for part, operator, a in _single_gradients(arguments)}  # fmt: skip
            continue
        if name == "conv_relu_pool":
            y = Tensor(_convolved(arguments["x"].shape, arguments["weight"].shape, arguments["pad"]))
            pooled = Tensor((*y.shape[:2], y.shape[2] // 2, y.shape[3] // 2))
            variants: list[tuple[str, dict[str, Any]]] = [
                ("relu_backward", dict(dy=y, y=y, slope=0.0)),
                ("max_pool2d", dict(x=y)),
                ("max_pool2d_backward", dict(d_pooled=pooled, d_skip=None, y=y, slope=1.0)),
            ]
        elif "mask_x" in arguments:
            x = arguments["x"]
            # the head's weight gradient reads x whether or not it masks
            flipped = dict(mask_x=not arguments["mask_x"], x=Tensor(x.shape, is_read="head" in name or not x.is_read))
            if "packed" in arguments:
                flipped |= dict(packed=None, weight=Tensor(arguments["weight"].shape))
            variants = [(name, arguments | flipped)]
        else:
            continue
        found |= {(operator, repr(a)): Call(call.layer, operator, a, call.macs if operator == name else 0)
                  for operator, a in variants}  # fmt: skip
    return list(found.values())


def _convolved(x: Shape, weight: Shape, pad: int) -> Shape:
    return x[0], weight[0], x[2] + 2 * pad - 2, x[3] + 2 * pad - 2


def loss_calls(batch: int, classes: int, pixels: int) -> list[Call]:
    """The operator calls of :func:`fastunet.functional.dice.dice_cross_entropy`, forward and backward."""
    logits = Tensor((batch, classes, pixels), pixel_major=True)
    targets = Tensor((batch, pixels), torch.uint8, classes=classes)
    read = dict(logits=logits, targets=targets, class_weights=None, ignore_index=None, cross_entropy=True)
    sums, grad = Tensor((1, 3 * classes + 3), torch.float32), Tensor((), torch.float32)
    rule = dict(sums=sums, class_weights=None, smooth=1.0, empty="smooth", include_background=True, dice_weight=1.0,
                ce_weight=1.0, nan_if_wrong=False, alpha=0.5, beta=0.5)  # fmt: skip
    return [
        Call("loss", "dice_sums", read | dict(per_sample=False, label_smoothing=0.0), 0),
        Call("loss", "dice_rule", rule, 0),
        Call("loss", "dice_sums_grad", dict(grad=grad, slopes=sums) | read | dict(label_smoothing=0.0), 0),
    ]


_COMPUTED = torch.bfloat16
"""The dtype in which the network is recorded, for that of the computation: no argument has it of its own."""

_OUTPUTS: dict[str, Callable[[UNet, torch.Tensor], torch.Tensor]] = {
    "logits": UNet.forward,
    "probabilities": UNet.predict_proba,
    "labels": UNet.predict,
    "regions": UNet.predict_regions,
}


class _Recorder(TorchDispatchMode):
    """Keeps the operators that run, each with the layer that it belongs to, which the storages of its tensors tell."""

    def __init__(self, model: nn.Module):
        super().__init__()  # type: ignore[no-untyped-call]
        self.calls: list[Call] = []
        self.weights = {
            _storage(tensor): name.rpartition(".")[0] for name, tensor in model.named_parameters() if tensor.dim() == 4
        }
        self.readers: dict[int, str] = {}
        self.makers: dict[int, str] = {}
        self.kept: list[Any] = []  # a freed storage's address is given to another

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        results = function(*args, **(kwargs or {}))
        made = results if isinstance(results, tuple | list) else (results,)
        self.kept += [args, made]
        if function.namespace == "fastunet":
            names = [argument.name for argument in function._schema.arguments[:-1]]
            self.note(function._schema.name.removeprefix("fastunet::"), dict(zip(names, args)), made)
        else:  # a folded norm makes another weight of the layer's
            layer = next((self.weights[_storage(a)] for a in args if _storage(a) in self.weights), None)
            self.weights |= {_storage(result): layer for result in made if layer is not None}
        return results

    def note(self, operator: str, operands: dict[str, Any], results: Sequence[torch.Tensor]) -> None:
        """Adds a call."""
        found = ((self.weights, "weight"), (self.makers, "z"), (self.makers, "y"), (self.readers, "x"))
        layer = next(known[key] for known, name in found if (key := _storage(operands.get(name))) in known)
        layer = layer.rpartition(".")[0] if operator.startswith("block") else layer
        self.readers.setdefault(_storage(operands.get("x")), layer)
        self.makers |= {key: layer for result in results if (key := _storage(result)) not in self.makers}
        arguments = dict(operands)
        for name, tensor in operands.items():
            if isinstance(tensor, torch.Tensor):
                dtype = None if tensor.dtype == _COMPUTED else tensor.dtype
                is_read = not operator.endswith("_data_grad") or operands.get(f"mask_{name}", name not in ("x", "skip"))
                is_read &= name != "weight" or operands.get("packed") is None
                arguments[name] = Tensor(tuple(tensor.shape), dtype, is_read=is_read)
        self.calls.append(Call(layer, operator, arguments, _macs(operator, operands, results)))


def _single_gradients(arguments: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    """Layer of the block, operator and arguments of the calls that do what one of ``block_weight_grads`` does."""
    common = dict(pad=arguments["pad"], has_bias=True)
    first = dict(dz=arguments["dz1"], x=arguments["x"], skip=arguments["skip"])
    second = dict(dz=arguments["dz2"], x=arguments["y1"], skip=None)
    found: list[tuple[str, str, dict[str, Any]]] = [
        ("conv1", "conv_relu_weight_grad", first | common),
        ("conv2", "conv_relu_weight_grad", second | common),
    ]
    if arguments["du"] is not None:
        operator, name = ("conv_transpose2d", "dy") if arguments["transpose"] else ("upsample_conv_relu", "dz")
        operands = {name: arguments["du"], "x": arguments["low"], "has_bias": True}
        found.append(("up", f"{operator}_weight_grad", operands))
    return found


def _storage(value: Any) -> int:
    return int(value.untyped_storage()._cdata) if isinstance(value, torch.Tensor) else 0


def _macs(operator: str, operands: dict[str, Any], results: Sequence[torch.Tensor]) -> int:
    """Multiply-adds of an operator's layer, from its input x and its result, or the gradient of that."""
    if operator == "block_weight_grads":
        return sum(_macs(name, arguments, results) for _, name, arguments in _single_gradients(operands))
    values: Any = collections.defaultdict(lambda: None, operands)
    x, skip, weight, head = (values[name] for name in ("x", "skip", "weight", "head_weight"))
    large = next((values[name] for name in ("dz", "dy") if name in operands), results[0])
    macs = 0
    if operator.startswith("segmentation_head"):
        macs = (2 if "d_logits" in operands else 1) * weight.shape[0] * x.numel()
    elif operator.startswith("conv_transpose2d"):
        macs = 4 * large.shape[1] * x.numel()
    elif operator.startswith("upsample_conv_relu"):
        macs = 9 * large.shape[1] * x.numel()
    elif operator.startswith("conv"):
        channels = x.shape[1] + (0 if skip is None else skip.shape[1])
        y = tuple(large.shape) if head is None else _convolved(x.shape, weight.shape, values["pad"])
        macs = (9 * channels + (0 if head is None else head.shape[0])) * math.prod(y)
    return macs
