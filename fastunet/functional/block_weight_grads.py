"""All weight and bias gradients of a U-Net block as one operator, which shares launches between them on a GPU."""

from __future__ import annotations

from torch import Tensor

from fastunet.dispatch import define
from fastunet.functional import conv_transpose, upsample_conv
from fastunet.functional._gradients import fake_weight_gradient
from fastunet.functional.conv_relu import fake_weight_grad, torch_weight_grad


def _weight_grads(
    dz1: Tensor, x: Tensor, skip: Tensor | None, dz2: Tensor, y1: Tensor, du: Tensor | None, low: Tensor | None,
    pad: int, transpose: bool,
) -> tuple[Tensor, ...]:
    found = *torch_weight_grad(dz1, x, skip, pad, True), *torch_weight_grad(dz2, y1, None, pad, True)
    if du is None or low is None:
        return *found, x.new_empty(0), x.new_empty(0)
    return *found, *(conv_transpose.torch_weight_grad if transpose else upsample_conv.torch_weight_grad)(du, low, True)


def _fake_weight_grads(
    dz1: Tensor, x: Tensor, skip: Tensor | None, dz2: Tensor, y1: Tensor, du: Tensor | None, low: Tensor | None,
    pad: int, transpose: bool,
) -> tuple[Tensor, ...]:
    found = *fake_weight_grad(dz1, x, skip, pad, True), *fake_weight_grad(dz2, y1, None, pad, True)
    if du is None or low is None:
        return *found, x.new_empty(0), x.new_empty(0)
    c_out, c_in = du.shape[1], low.shape[1]
    return *found, *fake_weight_gradient(du, (c_in, c_out, 2, 2) if transpose else (c_out, c_in, 2, 2), True)


define(
    "block_weight_grads(Tensor dz1, Tensor x, Tensor? skip, Tensor dz2, Tensor y1, Tensor? du, Tensor? low, int pad, "
    "bool transpose, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    torch_impl=_weight_grads,
    triton_impl="block_weight_grads:weight_grads",
    fake=_fake_weight_grads,
)
