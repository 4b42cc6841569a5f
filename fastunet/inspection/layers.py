"""Every operator call of a U-Net, forward and backward, with the shapes of its arguments: nothing is run.

The list follows from the architecture's parameters alone and is the one source for ahead-of-time compilation, counted
traffic, tuning and benchmarks. It mirrors ``fastunet.UNet`` and ``fastunet.functional.blocks``, which a test compares.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from fastunet.architecture import Architecture
from fastunet.dispatch import OPERATORS
from fastunet.functional import blocks, dice  # noqa: F401  (their imports define every operator)
from fastunet.functional._layout import nhwc_strides

Shape = tuple[int, ...]
Step = Callable[[], None]

CASES: dict[str, tuple[Architecture, tuple[int, int]]] = {
    "brats 128": (Architecture.from_preset("brats"), (128, 128)),
    "brats 240": (Architecture.from_preset("brats"), (240, 240)),
    "isbi 572": (Architecture.from_preset("isbi"), (572, 572)),
}
"""The reference networks at the image sizes for which kernels are checked, tuned and measured."""


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
        """The arguments with random contents: normal values, weights scaled to keep their outputs' variance, labels."""
        generator = torch.Generator(device).manual_seed(seed)
        operands = self.allocate(dtype, device)
        for (name, spec), tensor in zip(self.arguments.items(), operands):
            if not isinstance(tensor, torch.Tensor):
                continue
            if tensor.dtype.is_floating_point:
                fan_in = math.prod(spec.shape[1:]) if name.endswith("weight") else 1
                tensor.normal_(std=fan_in**-0.5, generator=generator)
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
    the loss.

    Raises:
        ValueError: the image size does not fit the architecture, or it has norms or the like.
    """
    if not architecture.is_classic:
        raise ValueError("operator calls are listed of networks of convolutions, ReLU and pooling alone")
    out_height, out_width = architecture.output_size(height, width)
    walk = _Walk(architecture, batch)
    backward = walk.forward(height, width, output, training)
    if not training:
        return walk.calls
    if loss:
        walk.loss(out_height * out_width)
    for step in reversed(backward):
        step()
    return walk.calls


def standalone_calls(architecture: Architecture, batch: int, height: int, width: int) -> list[Call]:
    """Calls that a training step does not make: ReLU's gradient, pooling alone, gradients with the other mask, the
    confusion matrix of logits or labels, and the loss of regions."""
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
            variants = [(name, arguments | flipped)]
        else:
            continue
        found |= {(operator, repr(a)): Call(call.layer, operator, a, call.macs if operator == name else 0)
                  for operator, a in variants}  # fmt: skip
    return list(found.values())


def _convolved(x: Shape, weight: Shape, pad: int) -> Shape:
    return x[0], weight[0], x[2] + 2 * pad - 2, x[3] + 2 * pad - 2


class _Walk:
    """Appends the calls of each block going down and up; :meth:`forward` returns the way back as steps."""

    def __init__(self, architecture: Architecture, batch: int):
        self.architecture, self.batch = architecture, batch
        self.pad = 1 if architecture.padding == "same" else 0
        self.calls: list[Call] = []

    def add(self, layer: str, operator: str, macs: int, **arguments: Any) -> None:
        self.calls.append(Call(layer, operator, arguments, macs))

    def forward(self, height: int, width: int, output: str, training: bool) -> list[Step]:
        a = self.architecture
        if a.padding == "same":
            height, width = a.padded_size(height, width)
        x: Shape = self.batch, a.in_channels, height, width
        skips: list[Shape] = []
        backward: list[Step] = []
        for level, channels in enumerate(a.widths[:-1]):
            y1, step1 = self.conv(f"encoders.{level}.conv1", x, None, channels, input_grad=level > 0, mask=False)
            y2, step2 = self.conv(f"encoders.{level}.conv2", y1, None, channels, mask=True, pool=True)
            x = (*y2[:2], y2[2] // 2, y2[3] // 2)
            skips.append(y2)
            backward += [step1, step2, self.pool_step(f"encoders.{level}.conv2", y2, x)]
        x, step1 = self.conv("bottleneck.conv1", x, None, a.widths[-1], input_grad=a.depth > 0, mask=False)
        x, step2 = self.conv("bottleneck.conv2", x, None, a.widths[-1], mask=True)
        backward += [step1, step2]
        for index, channels in enumerate(reversed(a.widths[:-1])):
            u, step0 = self.up(f"decoders.{index}.up", x, channels)
            mask = a.up == "upsample"
            y1, step1 = self.conv(f"decoders.{index}.conv1", u, skips.pop(), channels, mask=mask)
            if index == a.depth - 1 and not training and channels <= 128 and a.num_classes <= 32:
                self.fused_head(f"decoders.{index}.conv2", y1, channels, output)
                return []
            x, step2 = self.conv(f"decoders.{index}.conv2", y1, None, channels, mask=True)
            backward += [step0, step1, step2]
        return [*backward, self.head(x, output)]

    def conv(
        self, layer: str, x: Shape, skip: Shape | None, channels: int, *, mask: bool, input_grad: bool = True,
        pool: bool = False,
    ) -> tuple[Shape, Step]:  # fmt: skip
        c_in = x[1] + (skip[1] if skip else 0)
        weight, pad = Tensor((channels, c_in, 3, 3)), self.pad
        y = _convolved(x, weight.shape, pad)
        macs = 9 * c_in * math.prod(y)
        bias = Tensor((channels,))
        crop = skip and Tensor(skip)
        if pool:
            self.add(layer, "conv_relu_pool", macs, x=Tensor(x), weight=weight, bias=bias, pad=pad, slope=0.0)
        else:
            self.add(layer, "conv_relu", macs, x=Tensor(x), skip=crop, weight=weight, bias=bias, pad=pad, slope=0.0)

        def step() -> None:
            dz = Tensor(y)
            self.add(layer, "conv_relu_weight_grad", macs, dz=dz, x=Tensor(x), skip=crop, pad=pad, has_bias=True)
            if input_grad:
                self.add(layer, "conv_relu_data_grad", macs, dz=dz, weight=weight, x=Tensor(x, is_read=mask),
                         skip=skip and Tensor(skip, is_read=False), pad=pad, mask_x=mask, mask_skip=False)

        return y, step

    def pool_step(self, layer: str, y: Shape, pooled: Shape) -> Step:
        return lambda: self.add(layer, "max_pool2d_backward", 0, d_pooled=Tensor(pooled), d_skip=Tensor(y),
                                y=Tensor(y), slope=0.0)

    def up(self, layer: str, x: Shape, channels: int) -> tuple[Shape, Step]:
        n, c_in, height, width = x
        u = (n, channels, 2 * height, 2 * width)
        transpose = self.architecture.up == "transpose"
        operator = "conv_transpose2d" if transpose else "upsample_conv_relu"
        weight = Tensor((c_in, channels, 2, 2) if transpose else (channels, c_in, 2, 2))
        macs = (4 if transpose else 9) * channels * math.prod(x)
        options: dict[str, Any] = {} if transpose else dict(slope=0.0)
        self.add(layer, operator, macs, x=Tensor(x), weight=weight, bias=Tensor((channels,)), **options)

        def step() -> None:
            gradient = {"dy" if transpose else "dz": Tensor(u)}
            self.add(layer, f"{operator}_weight_grad", macs, **gradient, x=Tensor(x), has_bias=True)
            self.add(layer, f"{operator}_data_grad", macs, **gradient, weight=weight, x=Tensor(x), mask_x=True)

        return u, step

    def head(self, x: Shape, output: str) -> Step:
        classes = self.architecture.num_classes
        weight = Tensor((classes, x[1], 1, 1))
        macs = classes * math.prod(x)
        self.add("head", "segmentation_head", macs, x=Tensor(x), weight=weight, bias=Tensor((classes,)), output=output)
        logits = Tensor((x[0], classes, *x[2:]))
        return lambda: self.add("head", "segmentation_head_backward", 2 * macs, d_logits=logits, x=Tensor(x),
                                weight=weight, mask_x=True, has_bias=True)

    def fused_head(self, layer: str, x: Shape, channels: int, output: str) -> None:
        weight, classes = Tensor((channels, x[1], 3, 3)), self.architecture.num_classes
        features = _convolved(x, weight.shape, self.pad)
        macs = 9 * x[1] * math.prod(features) + classes * math.prod(features)
        self.add(layer, "conv_relu_head", macs, x=Tensor(x), skip=None, weight=weight, bias=Tensor((channels,)),
                 pad=self.pad, head_weight=Tensor((classes, channels, 1, 1)), head_bias=Tensor((classes,)),
                 output=output)

    def loss(self, pixels: int) -> None:
        classes = self.architecture.num_classes
        logits = Tensor((self.batch, classes, pixels), pixel_major=True)
        targets = Tensor((self.batch, pixels), torch.uint8, classes=classes)
        read = dict(logits=logits, targets=targets, class_weights=None, ignore_index=None, cross_entropy=True)
        sums, grad = Tensor((1, 3 * classes + 3), torch.float32), Tensor((), torch.float32)
        self.add("loss", "dice_sums", 0, **read, per_sample=False, label_smoothing=0.0)
        self.add("loss", "dice_rule", 0, sums=sums, class_weights=None, smooth=1.0, empty="smooth",
                 include_background=True, dice_weight=1.0, ce_weight=1.0, nan_if_wrong=False, alpha=0.5,
                 beta=0.5)
        self.add("loss", "dice_sums_grad", 0, grad=grad, slopes=sums, **read, label_smoothing=0.0)
