"""The last layer: a 1×1 convolution to class logits, and from them probabilities or labels without a detour."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from fastunet import autograd
from fastunet.arguments import checked
from fastunet.autograd import Context, Function, Gradients, Inputs
from fastunet.dispatch import define, select_backend
from fastunet.functional._checks import checked_operands
from fastunet.functional._gradients import gradients
from fastunet.functional._layout import empty_nhwc, nhwc
from fastunet.functional.conv_relu import fake_forward as fake_conv_relu
from fastunet.functional.conv_relu import torch_forward as torch_conv_relu
from fastunet.functional.relu import masked

_OPS = torch.ops.fastunet
OUTPUTS = ("logits", "probabilities", "labels", "regions")


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, output: str) -> Tensor:
    y = finish(F.conv2d(nhwc(x), weight, bias), output)
    return nhwc(y) if y.dim() == 4 else y


def finish(logits: torch.Tensor, output: str) -> torch.Tensor:
    """Logits turned into ``output``; the softmax is computed in at least float32, where the kernels compute it."""
    if output == "labels":
        return logits.argmax(dim=1).to(torch.uint8)
    if output == "regions":
        numbers = torch.arange(1, logits.shape[1] + 1, dtype=torch.uint8, device=logits.device)
        return ((logits > 0) * numbers.view(-1, *[1] * (logits.ndim - 2))).amax(dim=1)
    return logits if output == "logits" else logits.softmax(dim=1)


def fake_finish(x: torch.Tensor, classes: int, size: Sequence[int], output: str) -> torch.Tensor:
    """The shape, dtype and strides of :func:`_forward`'s result."""
    if output in ("labels", "regions"):
        return x.new_empty((x.shape[0], *size), dtype=torch.uint8)
    height, width = size
    return empty_nhwc(x, classes, height, width)


def _backward(
    d_logits: Tensor, x: Tensor, weight: Tensor, mask_x: bool, has_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    x = nhwc(x)
    dx, dw, db = gradients(nhwc(d_logits), x, weight, 1, 0, (True, True, has_bias))
    dx = nhwc(dx)
    return masked(dx, x) if mask_x else dx, nhwc(dw), x.new_empty(0) if db is None else db


def _setup(ctx: Context, inputs: Inputs, y: Tensor) -> None:
    x, weight, bias, output, backend = inputs
    ctx.save_for_backward(x, weight, y if output == "probabilities" else None)
    ctx.options = bias is not None, backend


def _differentiate(ctx: Context, dy: Tensor) -> Gradients:
    x, weight, p = ctx.saved_tensors
    if p is not None:
        dy = torch.ops.aten._softmax_backward_data(dy, p, 1, p.dtype)
    dx, dw, db = _OPS.segmentation_head_backward(dy, x, weight, False, *ctx.options)
    return dx, dw, db if ctx.options[0] else None, None, None


define(
    "segmentation_head(Tensor x, Tensor weight, Tensor? bias, str output, str backend) -> Tensor",
    torch_impl=_forward,
    triton_impl="segmentation_head:forward",
    fake=lambda x, weight, bias, output: fake_finish(x, weight.shape[0], x.shape[2:], output),
    setup=_setup,
    backward=_differentiate,
)
define(
    "conv_relu_head(Tensor x, Tensor? skip, Tensor weight, Tensor? bias, int pad, Tensor head_weight, "
    "Tensor? head_bias, str output, str backend) -> Tensor",
    torch_impl=lambda x, skip, weight, bias, pad, head_weight, head_bias, output: _forward(
        torch_conv_relu(x, skip, weight, bias, pad, 0.0), head_weight, head_bias, output
    ),
    triton_impl="conv.forward:forward_head",
    fake=lambda x, skip, weight, bias, pad, head_weight, head_bias, output: fake_finish(
        x, head_weight.shape[0], fake_conv_relu(x, skip, weight, bias, pad, 0.0).shape[2:], output
    ),
)
define(
    "segmentation_head_backward(Tensor d_logits, Tensor x, Tensor weight, bool mask_x, bool has_bias, str backend) "
    "-> (Tensor, Tensor, Tensor)",
    torch_impl=_backward,
    triton_impl="segmentation_head:backward",
    fake=lambda d_logits, x, weight, mask_x, has_bias: (
        empty_nhwc(x, *x.shape[1:]),
        empty_nhwc(weight, *weight.shape[1:]),
        x.new_empty(weight.shape[0] if has_bias else 0),
    ),
)


class _MaskingHead(torch.autograd.Function):
    """Logits of a ReLU's output, whose gradient comes masked by it."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, bias: Tensor | None, backend: str) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.backend = backend
        return _OPS.segmentation_head(x, weight, bias, "logits", backend)

    @staticmethod
    def backward(ctx: Context, d_logits: Tensor) -> Gradients:
        x, weight, bias = ctx.saved_tensors
        if autograd.differentiated_again():
            head = functools.partial(_OPS.segmentation_head, output="logits", backend=ctx.backend)
            masking = lambda x, *parameters: head(x.relu(), *parameters)  # noqa: E731 - second derivatives of x, too
            return *autograd.vjp(masking, (x, weight, bias), ctx.needs_input_grad, [d_logits]), None
        dx, dw, db = _OPS.segmentation_head_backward(d_logits, x, weight, True, bias is not None, ctx.backend)
        return dx, dw, db if bias is not None else None, None


@checked
def segmentation_head(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    output: str = "logits",
    backend: str = "auto",
) -> torch.Tensor:
    """1×1 convolution over the channels, then nothing, the softmax over the classes, their argmax, or what is painted.

    Args:
        x: (N, C_in, H, W).
        weight: (classes, C_in, 1, 1); at most 256 classes for "labels", 255 for "regions".
        bias: (classes,) or None.
        output: "logits" and "probabilities" give (N, classes, H, W) in x's dtype, "labels" (N, H, W) uint8, the
            first class of several equal ones. "regions" takes the channels for the logits of overlapping regions and
            gives (N, H, W) uint8: 0 where none is positive, else one more than the last that is, which is painted over
            the others. Labels and regions have no gradient.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: an unknown output, or shapes, dtypes or devices that do not fit; the message shows them.
    """
    return _head(x, weight, bias, output, False, backend)


def head_of_network(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, *, output: str, backend: str
) -> torch.Tensor:
    """:func:`segmentation_head` of a ReLU's output ``x``, whose gradient it masks by ``x > 0`` (see ``blocks``)."""
    return _head(x, weight, bias, output, True, backend)


def too_many_classes(weight: torch.Tensor) -> str | None:
    """Why the kernels cannot take this head, or None; they hold one tile of at most 32 classes."""
    return f"the head has {weight.shape[0]} classes, more than 32" if weight.shape[0] > 32 else None


def _head(x: Tensor, weight: Tensor, bias: Tensor | None, output: str, mask_x: bool, backend: str) -> Tensor:
    if output not in OUTPUTS:
        raise ValueError(f"segmentation_head: output is {output!r}; expected one of {', '.join(OUTPUTS)}")
    x, weight, bias = checked_operands("segmentation_head", x, weight, bias, 1)
    if weight.shape[0] > {"labels": 256, "regions": 255}.get(output, weight.shape[0]):
        raise ValueError(f"segmentation_head: {weight.shape[0]} classes do not fit uint8 {output}")
    backend = select_backend(backend, "segmentation_head", x, too_many_classes(weight))
    if mask_x and output == "logits" and not autograd.transformed():
        masking: Function = _MaskingHead.apply
        return masking(x, weight, bias, backend)
    return _OPS.segmentation_head(x, weight, bias, output, backend)
