"""The arithmetic of ``--precision``: what autocast, the tf32 switches and the loss scale are set to."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

from fastunet.errors import UserError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> contextlib.AbstractContextManager[Any]:
    """The autocast context of ``precision``; does nothing for "fp32" and "tf32"."""
    if precision not in _AUTOCAST:
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=_AUTOCAST[precision])


def prepare(device: torch.device, precision: str, *, deterministic: bool = False) -> None:
    """Sets the process-wide switches: tf32 only where asked for, and cuDNN's choice of algorithms.

    Raises:
        UserError: the device cannot do it.
    """
    if precision == "tf32" and device.type != "cuda":
        raise UserError(f"--precision tf32 needs a CUDA device, this run uses {device}")
    matmul: Any = torch.backends.cuda.matmul
    cudnn: Any = torch.backends.cudnn
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    if hasattr(matmul, "fp32_precision"):
        # Since PyTorch 2.9 these decide, and inherit where the older switches alone were written. Both are written:
        # while they contradict each other, reading the older ones raises.
        for settings in (matmul, cudnn.conv, cudnn.rnn):
            settings.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.deterministic = deterministic


def loss_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """The loss scaler: active for "fp16" only, whose gradients would underflow without it."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
