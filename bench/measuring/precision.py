"""The four precisions that are measured, and the switches of PyTorch that they stand for."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""Storage by precision. tf32 stores float32 and multiplies with ten bits of mantissa."""
PRECISIONS = tuple(DTYPES)

EPSILON = {"fp32": 2.0**-23, "tf32": 2.0**-23, "fp16": 2.0**-10, "bf16": 2.0**-7}
"""Spacing of the stored results around 1. Products in tf32 err more, which the budget learns from PyTorch's error."""


@contextlib.contextmanager
def precision_settings(precision: str) -> Iterator[None]:
    """TF32 on for "tf32" and off for the others, ``cudnn.benchmark`` on, for every variant alike; restored after."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark
    matmul.allow_tf32 = cudnn.allow_tf32 = precision == "tf32"
    cudnn.benchmark = True
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark = before
