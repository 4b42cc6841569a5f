"""The U-Net's blocks as autograd units, so that ReLU masks, pool gradients and skip sums need no pass of their own.

What is kept for backward, besides the parameters: an encoder block keeps its input, y1 and y2; the convolution block
the same; a decoder block its input, the skip, the upsampled u, y1 and y2, and the weights that its forward pass packed
for the data gradient of x. Pooled maps, pre-activations, index tensors, concatenations and upsampled inputs are never
kept.

Masking is idempotent: if every consumer of a ReLU's output y returns ``dy * (y > 0)``, their sum needs no mask. A
block that is given ``grad_masked=True`` trusts its consumers to do so and skips that pass; ``mask_input=True`` makes a
block such a consumer of its own input.

The single operators of a block, each with its own derivative, run in its place under ``torch.func``, and are computed
again where a backward pass is itself to be differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastunet import autograd
from fastunet.autograd import Context, Function, Gradients
from fastunet.dispatch import autocast_operands, select_backend
from fastunet.functional import block_weight_grads  # noqa: F401  (registers the operator)
from fastunet.functional.conv_relu import check_conv, check_conv_dtypes, conv_relu
from fastunet.functional.conv_transpose import conv_transpose2d
from fastunet.functional.segmentation_head import segmentation_head, too_many_classes
from fastunet.functional.upsample_conv import upsample_conv_relu

_OPS = torch.ops.fastunet


def _encoder(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, pad: int, backend: str
) -> tuple[Tensor, Tensor]:
    return _OPS.conv_relu_pool(_OPS.conv_relu(x, None, w1, b1, pad, 0.0, backend), w2, b2, pad, 0.0, backend)


def _conv(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, pad: int, grad_masked: bool, backend: str
) -> Tensor:
    return _OPS.conv_relu(_OPS.conv_relu(x, None, w1, b1, pad, 0.0, backend), None, w2, b2, pad, 0.0, backend)


def _up(x: Tensor, wu: Tensor, bu: Tensor, transpose: bool, backend: str) -> Tensor:
    if transpose:
        return _OPS.conv_transpose2d(x, wu, bu, backend)
    return _OPS.upsample_conv_relu(x, wu, bu, 0.0, backend)


def _decoder(
    x: Tensor, skip: Tensor, wu: Tensor, bu: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, pad: int,
    transpose: bool, mask_input: bool, grad_masked: bool, backend: str,
) -> Tensor:
    x = x.relu() if mask_input else x  # which it is already; but all gradients of x, second ones too, come masked
    y1 = _OPS.conv_relu(_up(x, wu, bu, transpose, backend), skip, w1, b1, pad, 0.0, backend)
    return _OPS.conv_relu(y1, None, w2, b2, pad, 0.0, backend)


def _again(operators: Function, ctx: Context, tensors: list[Any], grads: list[Tensor]) -> Gradients:
    """A block's gradients that can be differentiated: those of the ``operators`` that it is made of."""
    return tuple(autograd.vjp(operators, [*tensors, *ctx.options], ctx.needs_input_grad, grads))


def _two_conv_gradients(
    needed: Sequence[bool], dz2: Tensor, x: Tensor, skip: Tensor | None, y1: Tensor, w1: Tensor, w2: Tensor, pad: int,
    mask_x: bool, backend: str, low: Tensor | None = None, transpose: bool = False,
) -> Gradients:
    """Gradients (dx, dskip, dw1, db1, dw2, db2, dwu, dbu) of conv2(relu(conv1([skip, x]))) from dz2, None where none is
    needed.

    ``needed`` tells of them; that of dx also stands for what comes before x, the last two of ``low`` being made into x.
    """
    need_x, need_skip, *need_weights = needed
    dz1 = dx = dskip = None
    if need_x or need_skip or any(need_weights[:2]):
        dz1, _ = _OPS.conv_relu_data_grad(dz2, w2, y1, None, pad, True, False, backend)
    if need_x or need_skip:
        dx, dskip = _OPS.conv_relu_data_grad(dz1, w1, x, skip, pad, mask_x, False, backend)
    if all(need_weights):
        du = None if low is None else dx
        found = _OPS.block_weight_grads(dz1, x, skip, dz2, y1, du, low, pad, transpose, backend)
        return dx, dskip if skip is not None else None, *found[: len(need_weights)]
    found = [None] * len(need_weights)
    if any(need_weights[:2]):
        found[:2] = _OPS.conv_relu_weight_grad(dz1, x, skip, pad, True, backend)
    if any(need_weights[2:4]):
        found[2:4] = _OPS.conv_relu_weight_grad(dz2, y1, None, pad, True, backend)
    if any(need_weights[4:]):
        operator = _OPS.conv_transpose2d_weight_grad if transpose else _OPS.upsample_conv_relu_weight_grad
        found[4:] = operator(dx, low, True, backend)
    return dx, dskip if skip is not None else None, *found


class _EncoderBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, pad: int, backend: str
    ) -> tuple[Tensor, Tensor]:
        y1 = _OPS.conv_relu(x, None, w1, b1, pad, 0.0, backend)
        y2, pooled = _OPS.conv_relu_pool(y1, w2, b2, pad, 0.0, backend)
        ctx.save_for_backward(x, w1, b1, w2, b2, y1, y2)
        ctx.options = pad, backend
        return y2, pooled

    @staticmethod
    def backward(ctx: Context, d_skip: Tensor, d_pooled: Tensor) -> Gradients:
        *operands, y1, y2 = ctx.saved_tensors
        if autograd.differentiated_again():
            return _again(_encoder, ctx, operands, [d_skip, d_pooled])
        (x, w1, _, w2, _), (pad, backend), (need_x, *needed) = operands, ctx.options, ctx.needs_input_grad[:5]
        dz2 = _OPS.max_pool2d_backward(d_pooled, d_skip, y2, 0.0, backend)
        needed = [need_x, False, *needed]
        dx, _, *d_parameters = _two_conv_gradients(needed, dz2, x, None, y1, w1, w2, pad, False, backend)
        return dx, *d_parameters, None, None


class _ConvBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, pad: int, grad_masked: bool,
        backend: str,
    ) -> Tensor:
        y1 = _OPS.conv_relu(x, None, w1, b1, pad, 0.0, backend)
        y2 = _OPS.conv_relu(y1, None, w2, b2, pad, 0.0, backend)
        ctx.save_for_backward(x, w1, b1, w2, b2, y1, None if grad_masked else y2)
        ctx.options = pad, grad_masked, backend
        return y2

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> Gradients:
        *operands, y1, y2 = ctx.saved_tensors
        if autograd.differentiated_again():
            return _again(_conv, ctx, operands, [dy])
        (x, w1, _, w2, _), (pad, _, backend), (need_x, *needed) = operands, ctx.options, ctx.needs_input_grad[:5]
        dz2 = dy if y2 is None else _OPS.relu_backward(dy, y2, 0.0, backend)
        needed = [need_x, False, *needed]
        dx, _, *d_parameters = _two_conv_gradients(needed, dz2, x, None, y1, w1, w2, pad, False, backend)
        return dx, *d_parameters, None, None, None


class _DecoderBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Context, x: Tensor, skip: Tensor, wu: Tensor, bu: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        pad: int, transpose: bool, mask_input: bool, grad_masked: bool, backend: str,
    ) -> Tensor:
        packed = None
        if transpose or backend == "torch" or not ctx.needs_input_grad[0]:
            u = _up(x, wu, bu, transpose, backend)
        else:
            u, packed = _OPS.upsample_conv_relu_packing(x, wu, bu, 0.0, backend)
        y1 = _OPS.conv_relu(u, skip, w1, b1, pad, 0.0, backend)
        y2 = _OPS.conv_relu(y1, None, w2, b2, pad, 0.0, backend)
        ctx.save_for_backward(x, skip, wu, bu, w1, b1, w2, b2, u, packed, y1, None if grad_masked else y2)
        ctx.options = pad, transpose, mask_input, grad_masked, backend
        return y2

    @staticmethod
    def backward(ctx: Context, dy: Tensor) -> Gradients:
        *operands, u, packed, y1, y2 = ctx.saved_tensors
        if autograd.differentiated_again():
            return _again(_decoder, ctx, operands, [dy])
        x, skip, wu, _, w1, _, w2, _ = operands
        pad, transpose, mask_input, _, backend = ctx.options
        need_x, need_skip, need_wu, need_bu, *needed = ctx.needs_input_grad[:8]
        dz2 = dy if y2 is None else _OPS.relu_backward(dy, y2, 0.0, backend)
        needed = [need_x or need_wu or need_bu, need_skip, *needed, need_wu, need_bu]
        du, dskip, *d_convs, dwu, dbu = _two_conv_gradients(
            needed, dz2, u, skip, y1, w1, w2, pad, not transpose, backend, x, transpose
        )
        dx = None
        if need_x:
            operator = _OPS.conv_transpose2d_data_grad if transpose else _OPS.upsample_conv_relu_data_grad
            options = [mask_input] if transpose else [mask_input, packed]
            dx = operator(du, wu, x, *options, backend)
        return dx, dskip, dwu, dbu, *d_convs, None, None, None, None, None


def encoder_block(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, padding: str = "same", backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """``(y2, max_pool(y2))`` with ``y2 = conv_relu(conv_relu(x, w1, b1), w2, b2)``; biases are required.

    Raises:
        ValueError: shapes, dtypes or devices that do not fit; the message shows them.
    """
    pad, (x, _, w1, b1, w2, b2) = _prepare("encoder_block", x, None, [w1, b1, w2, b2], padding)
    if min(x.shape[2:]) + 4 * pad - 4 < 2:
        raise ValueError(f"encoder_block: x has shape {tuple(x.shape)}; its convolutions are too small to pool")
    run: Function = _encoder if autograd.transformed() else _EncoderBlock.apply
    return run(x, w1, b1, w2, b2, pad, select_backend(backend, "encoder_block", x))


def conv_block(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, padding: str = "same", grad_masked: bool = False,
    backend: str = "auto",
) -> Tensor:
    """``conv_relu(conv_relu(x, w1, b1), w2, b2)``; biases are required. ``grad_masked``: see this module's text."""
    pad, (x, _, w1, b1, w2, b2) = _prepare("conv_block", x, None, [w1, b1, w2, b2], padding)
    run: Function = _conv if autograd.transformed() else _ConvBlock.apply
    return run(x, w1, b1, w2, b2, pad, grad_masked, select_backend(backend, "conv_block", x))


def decoder_block(
    x: Tensor, skip: Tensor, wu: Tensor, bu: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, *, up: str,
    padding: str = "same", mask_input: bool = False, grad_masked: bool = False, backend: str = "auto",
) -> Tensor:
    """``conv_relu(conv_relu(up(x), w1, b1, skip=skip), w2, b2)``; biases are required.

    ``up`` is "upsample" (:func:`upsample_conv_relu` with wu (C_out, C_in, 2, 2)) or "transpose"
    (:func:`conv_transpose2d` with wu (C_in, C_out, 2, 2)). ``mask_input`` and ``grad_masked``: see this module's text.
    """
    transpose = up == "transpose"
    channels = (x.shape[1], wu.shape[1]) if transpose else (wu.shape[0], x.shape[1])
    if tuple(wu.shape) != (*channels, 2, 2):
        raise ValueError(f"decoder_block: the weight of {up!r} has shape {tuple(wu.shape)} for x of {tuple(x.shape)}")
    u = x.new_empty(()).expand(x.shape[0], wu.shape[1] if transpose else wu.shape[0], 2 * x.shape[2], 2 * x.shape[3])
    pad, (x, wu, bu, skip, w1, b1, w2, b2) = _prepare("decoder_block", u, skip, [w1, b1, w2, b2], padding, [x, wu, bu])
    backend = select_backend(backend, "decoder_block", x)
    run: Function = _decoder if autograd.transformed() else _DecoderBlock.apply
    return run(x, skip, wu, bu, w1, b1, w2, b2, pad, transpose, mask_input, grad_masked, backend)


def decoder_block_head(
    x: Tensor, skip: Tensor, wu: Tensor, bu: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
    head_weight: Tensor, head_bias: Tensor, *, up: str, output: str, padding: str = "same", backend: str = "auto",
) -> Tensor:
    """The head of :func:`decoder_block` for inference: its last feature map goes into ``output`` and is never written.

    The fused kernel holds all features of a pixel: above 128 of them, or 32 classes, the head is a pass of its own.
    ``output`` is that of :func:`fastunet.functional.segmentation_head`. The result carries no gradient.
    """
    with torch.no_grad():
        upsample = conv_transpose2d if up == "transpose" else upsample_conv_relu
        u = upsample(x, wu, bu, backend=backend)
        y1 = conv_relu(u, w1, b1, skip=skip, padding=padding, backend=backend)
        if w2.shape[0] > 128 or too_many_classes(head_weight):
            y2 = conv_relu(y1, w2, b2, padding=padding, backend=backend)
            return segmentation_head(y2, head_weight, head_bias, output=output, backend=backend)
        pad = check_conv("decoder_block_head", y1, None, w2, b2, padding)
        y1, w2, b2, head_weight, head_bias = autocast_operands(y1, w2, b2, head_weight, head_bias)
        check_conv_dtypes("decoder_block_head", y1, None, w2, b2)
        backend = select_backend(backend, "decoder_block_head", y1)
        return _OPS.conv_relu_head(y1, None, w2, b2, pad, head_weight, head_bias, output, backend)


def _prepare(
    operator: str, x: Tensor, skip: Tensor | None, parameters: list[Tensor], padding: str,
    before: Sequence[Tensor] = (),
) -> tuple[int, list[Any]]:
    """Validates both convolutions of a block; returns the padding and the operands in the autocast dtype.

    Of ``x`` only the shape counts where it will be made of ``before``, which is cast in its place.
    """
    w1, b1, w2, b2 = parameters
    pad = check_conv(operator, x, skip, w1, b1, padding)
    shrink = 2 - 2 * pad
    y1 = w1.new_empty(()).expand(x.shape[0], w1.shape[0], x.shape[2] - shrink, x.shape[3] - shrink)
    check_conv(operator, y1, None, w2, b2, padding)
    operands = autocast_operands(*(before or [x]), skip, *parameters)
    x, skip, w1, b1, w2, b2 = operands[0], *operands[-5:]
    check_conv_dtypes(operator, x, skip, w1, b1)
    check_conv_dtypes(operator, x, None, w2, b2)
    return pad, operands
