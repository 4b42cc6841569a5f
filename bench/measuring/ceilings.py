"""What the machine can do at best, measured in the run that is judged by it: a large copy and a large product."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.measuring.precision import DTYPES, PRECISIONS, precision_settings
from bench.measuring.timing import clock_of

_REPEATS = 7
_COPY_MIB = {"cuda": 1024, "cpu": 256}
_SIDE = {"cuda": 8192, "cpu": 1536}


def measure_ceilings(device: torch.device) -> tuple[float, dict[str, float]]:
    """Copy bandwidth in GB/s (bytes read plus written) and matrix products in TFLOP/s by precision; best of seven."""
    products = PRECISIONS if device.type == "cuda" else ("fp32", "bf16")
    return copy_bandwidth(device), {precision: matmul_rate(device, precision) for precision in products}


def copy_bandwidth(device: torch.device) -> float:
    """GB/s of a copy between two tensors of 1024 MiB on a GPU, 256 MiB on a CPU, many times the caches."""
    source = torch.randn(_COPY_MIB[device.type] * 2**20 // 4, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() * 4 / _best_seconds(device, lambda: target.copy_(source)) / 1e9


def matmul_rate(device: torch.device, precision: str) -> float:
    """TFLOP/s of a square product of random matrices with sides of 8192 on a GPU, 1536 on a CPU.

    On a CPU the better of PyTorch's two libraries: MKL, which multiplies matrices, stays below oneDNN on AMD's
    processors, so a 3×3 convolution of 128 channels, oneDNN's best case, is measured beside it.
    """
    size = _SIDE[device.type]
    with precision_settings(precision), torch.no_grad():
        a, b = (torch.randn(size, size, device=device).to(DTYPES[precision]) for _ in range(2))
        out = torch.empty_like(a)
        rate = 2 * size**3 / _best_seconds(device, lambda: torch.mm(a, b, out=out))
        if device.type == "cpu":
            x, weight = (torch.randn(shape).to(DTYPES[precision]).contiguous(memory_format=torch.channels_last)
                         for shape in ((4, 128, 64, 64), (128, 128, 3, 3)))  # fmt: skip
            seconds = _best_seconds(device, lambda: torch.nn.functional.conv2d(x, weight, padding=1))
            rate = max(rate, 2 * 9 * 128 * x.numel() / seconds)
        return rate / 1e12


def _best_seconds(device: torch.device, call: Callable[[], object]) -> float:
    """The shortest of a few calls after a warm-up; a ceiling is what can be reached, hence no median."""
    clock = clock_of(device)
    return min([clock(call, 1) for _ in range(_REPEATS + 1)][1:])
