"""Every operator on the device at hand against plain PyTorch in float64 on the CPU: values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as plain

from fastunet import functional
from fastunet.dispatch import GIVEN_UP
from fastunet.functional._norm import wide

_CLASSES, _SIDE = 4, 20
_SLACK = 2.0  # times the error of plain PyTorch in the same dtype, which is judged by the same reference


@dataclass(frozen=True)
class Check:
    """One operator: the largest error of its results and gradients, what is allowed, and what went wrong, if it did."""

    operator: str
    dtype: str
    error: float
    allowed: float
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the error is allowed; NaN is not."""
        return not self.problem and self.error <= self.allowed


def check_operators(device: torch.device, dtype: torch.dtype) -> list[Check]:
    """A check of each public operator on small inputs that no tile divides."""
    return [_check(name, shapes, device, dtype) for name, shapes in _SHAPES.items()]


_LAYERS = ("conv_relu", "conv_relu_pool", "conv_norm", "max_pool2d", "upsample_bilinear2d", "upsample_conv_relu",
           "conv_transpose2d", "segmentation_head")  # fmt: skip
_X = (2, 5, _SIDE + 1, _SIDE + 3)
_REGIONS = [(1, 2, 3), (1, 3), (3,)]
_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "conv_relu": [_X, (7, 5, 3, 3), (7,)],
    "conv_relu_pool": [_X, (7, 5, 3, 3), (7,)],
    "conv_norm": [_X, (7, 5, 3, 3), (7,)],
    "max_pool2d": [_X],
    "upsample_bilinear2d": [_X],
    "upsample_conv_relu": [_X, (7, 5, 2, 2), (7,)],
    "conv_transpose2d": [_X, (5, 7, 2, 2), (7,)],
    "segmentation_head": [_X, (_CLASSES, 5, 1, 1), (_CLASSES,)],
    "dice_loss": [(2, _CLASSES, _SIDE, _SIDE + 1)],
    "dice_cross_entropy": [(2, _CLASSES, _SIDE, _SIDE + 1)],
    "region_dice_cross_entropy": [(2, len(_REGIONS), _SIDE, _SIDE + 1)],
    "dice_coefficient": [(2, _CLASSES, _SIDE, _SIDE + 1)],
    "confusion_matrix": [(2, _CLASSES, _SIDE, _SIDE + 1)],
}


def _labels(logits: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, _CLASSES, (2, *logits.shape[2:]), generator=generator).to(logits.device)


def _dice(logits: torch.Tensor) -> torch.Tensor:
    truth = plain.one_hot(_labels(logits), _CLASSES).permute(0, 3, 1, 2).to(logits.dtype)
    p = logits.softmax(1)
    overlap, total = (p * truth).sum((0, 2, 3)), (p + truth).sum((0, 2, 3))
    return ((2 * overlap + 1) / (total + 1)).mean()


def _regions(logits: torch.Tensor) -> torch.Tensor:
    labels, z = _labels(logits), wide(logits)
    truth = torch.stack([torch.isin(labels, torch.tensor(members).to(labels)) for members in _REGIONS], 1).to(z)
    overlap, total = (z.sigmoid() * truth).sum((0, 2, 3)), (z.sigmoid() + truth).sum((0, 2, 3))
    return 1 - ((2 * overlap + 1) / (total + 1)).mean() + plain.binary_cross_entropy_with_logits(z, truth)


def _confusion(logits: torch.Tensor) -> torch.Tensor:
    pairs = _labels(logits) * _CLASSES + logits.argmax(1)
    return pairs.flatten().bincount(minlength=_CLASSES**2).view(_CLASSES, _CLASSES)


_LITERAL: dict[str, Callable[..., Any]] = {
    "conv_relu": lambda x, w, b: plain.conv2d(x, w, b, padding=1).relu(),
    "conv_relu_pool": lambda x, w, b: (y := plain.conv2d(x, w, b, padding=1).relu(), plain.max_pool2d(y, 2)),
    "conv_norm": lambda x, w, b: plain.leaky_relu(plain.group_norm(plain.conv2d(x, w, b, padding=1), 1), 0.25),
    "max_pool2d": lambda x: plain.max_pool2d(x, 2),
    "upsample_bilinear2d": lambda x: plain.interpolate(x, scale_factor=2, mode="bilinear"),
    "upsample_conv_relu": lambda x, w, b: plain.conv2d(
        plain.pad(plain.interpolate(x, scale_factor=2), (0, 1, 0, 1)), w, b
    ).relu(),
    "conv_transpose2d": lambda x, w, b: plain.conv_transpose2d(x, w, b, stride=2),
    "segmentation_head": plain.conv2d,
    "dice_loss": lambda z: 1 - _dice(wide(z)),
    "dice_cross_entropy": lambda z: 1 - _dice(wide(z)) + plain.cross_entropy(wide(z), _labels(z)),
    "region_dice_cross_entropy": _regions,
    "dice_coefficient": _dice,
    "confusion_matrix": _confusion,
}  # fmt: skip


def _ours(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(functional, name)
    if name == "conv_norm":
        return lambda x, w, b: function(x, w, b, norm="group", groups=1, slope=0.25)
    if name == "dice_coefficient":
        return lambda z: function(z.softmax(1), _labels(z))
    if name == "confusion_matrix":
        return lambda z: function(z, _labels(z), _CLASSES)
    if name.startswith("region"):
        return lambda z: function(z, _labels(z), _REGIONS, num_classes=_CLASSES)
    if name.startswith("dice"):
        return lambda z: function(z, _labels(z))
    return function


def _check(name: str, shapes: list[tuple[int, ...]], device: torch.device, dtype: torch.dtype) -> Check:
    generator = torch.Generator().manual_seed(0)
    if name in _LAYERS:
        # Small whole numbers: sums before a ReLU are exact in every dtype, so that none falls on its other side.
        operands = [torch.randint(-1, 2, shape, generator=generator).to(dtype) for shape in shapes]
    else:
        operands = [torch.randn(shape, generator=generator).to(dtype) for shape in shapes]
    exact = _results(_LITERAL[name], [t.double() for t in operands])
    GIVEN_UP.clear()  # every check tries its kernels, also those that another one shares
    try:
        same = _results(_LITERAL[name], [t.to(device) for t in operands])
        got = _results(_ours(name), [t.to(device) for t in operands])
    except Exception as error:  # a kernel that cannot be compiled or launched is what this is here to find
        problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        return Check(name, str(dtype), float("nan"), 0.0, problem)
    if GIVEN_UP:
        return Check(name, str(dtype), float("nan"), 0.0, "; ".join(f"{k}: {why}" for k, why in GIVEN_UP.items()))
    errors, allowed = [], []
    for g, s, e in zip(got, same, exact, strict=True):
        slack = torch.finfo(dtype).eps * e.abs().max().item() if e.is_floating_point() else 0.0
        errors.append((g.cpu().double() - e).abs().max().item())
        allowed.append(_SLACK * ((s.cpu().double() - e).abs().max().item() + slack))
    worst = max(range(len(errors)), key=lambda i: (errors[i] != errors[i], errors[i] / (allowed[i] or 1e-300)))
    return Check(name, str(dtype), errors[worst], allowed[worst])


def _results(function: Callable[..., Any], operands: list[torch.Tensor]) -> list[torch.Tensor]:
    """Outputs, then the gradient of each operand under a fixed cotangent, where there is one."""
    leaves = [t.detach().requires_grad_() for t in operands]
    outputs = function(*leaves)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    if not outputs[0].requires_grad:
        return [y.detach() for y in outputs]
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randint(1, 3, y.shape, generator=generator).to(y) for y in outputs]
    return [y.detach() for y in outputs] + list(torch.autograd.grad(outputs, leaves, cotangents))
