"""Validation at the public functions: one sentence that shows the offending shape, dtype or device."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from fastunet.arguments import is_dense
from fastunet.dispatch import autocast_operands


def check_tensors(operator: str, **values: object) -> None:
    """Raises unless each of ``values`` is a dense tensor, or None where its name is not x, weight, logits or labels."""
    for name, value in values.items():
        if isinstance(value, torch.Tensor):
            if not is_dense(value):
                raise ValueError(f"{operator}: {name} is {value.layout} {value.dtype}; expected dense, real numbers")
        elif value is not None or name in ("x", "weight", "logits", "labels"):
            raise TypeError(f"{operator}: {name} must be a tensor, got {str(value)[:80]!r}")


def check_classes(num_classes: int, most: int) -> None:
    """Raises unless ``num_classes`` is an integer from 1 to ``most``."""
    if isinstance(num_classes, bool) or not isinstance(num_classes, int):
        raise TypeError(f"num_classes is {str(num_classes)[:80]!r}; expected an integer from 1 to {most}")
    if not 1 <= num_classes <= most:
        raise ValueError(f"num_classes is {num_classes}; expected 1 to {most}")


def check_image(operator: str, x: torch.Tensor, name: str = "x") -> None:
    """Raises unless ``x`` is a floating (N, C, H, W) tensor with H, W ≥ 1."""
    check_tensors(operator, **{name: x})
    if x.dim() != 4:
        raise ValueError(f"{operator}: {name} must be (N, C, H, W), got shape {tuple(x.shape)}")
    if not x.is_floating_point():
        raise ValueError(f"{operator}: {name} must be a floating-point tensor, got {x.dtype}")
    if min(x.shape[1:]) < 1:
        raise ValueError(f"{operator}: {name} has shape {tuple(x.shape)}; only the batch may be empty")


def checked_operands(
    operator: str, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, side: int, transposed: bool = False
) -> list[Any]:
    """Image, weight and bias of a convolution of ``side`` × ``side`` pixels, in the autocast dtype; raises unless all
    fit: (C_out, C_in, side, side), if ``transposed`` (C_in, C_out, side, side), and (C_out,)."""
    check_image(operator, x)
    x, weight, bias = operands = autocast_operands(x, weight, bias)
    shape = (x.shape[1], "any", side, side) if transposed else ("any", x.shape[1], side, side)
    if weight.dim() != 4 or any(want not in ("any", got) for want, got in zip(shape, weight.shape)):
        wanted = ", ".join(map(str, shape))
        raise ValueError(f"{operator}: weight must have shape ({wanted}), got {tuple(weight.shape)}")
    check_alike(operator, "weight", weight, x)
    channels = weight.shape[1 if transposed else 0]
    if bias is not None and tuple(bias.shape) != (channels,):
        raise ValueError(f"{operator}: bias must have shape ({channels},), got {tuple(bias.shape)}")
    if bias is not None:
        check_alike(operator, "bias", bias, x)
    return operands


def check_alike(operator: str, name: str, tensor: torch.Tensor, x: torch.Tensor) -> None:
    """Raises unless ``tensor`` has the dtype and device of ``x``."""
    if tensor.dtype != x.dtype or tensor.device != x.device:
        raise ValueError(f"{operator}: {name} is {tensor.dtype} on {tensor.device}, but x is {x.dtype} on {x.device}")


def processes_of(process_group: Any, asked: str) -> int:
    """How many processes ``process_group`` (None: all) has; raises where there are none, for what was ``asked``."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(f"{asked} needs a process group: call torch.distributed.init_process_group first")
    fits = process_group is None or isinstance(process_group, dist.ProcessGroup)
    processes = dist.get_world_size(process_group) if fits else 0
    if processes < 1:
        raise ValueError(f"{asked}: process_group is {str(process_group)[:80]!r}; expected one this process is in")
    return processes
