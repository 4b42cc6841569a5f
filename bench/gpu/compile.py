"""Fills Triton's cache on disk with the kernels of both networks, in parallel, so that tests do not wait for it."""

from __future__ import annotations

import os
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from fastunet.inspection.kernel_table import distinct, uses
from fastunet.inspection.machine_code import compile_launch
from fastunet.kernels import _launch

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def compile_share(architecture: int, dtype: torch.dtype, share: int, shares: int) -> int:
    """Compiles every ``shares``-th distinct kernel from ``share`` on; returns how many."""
    chosen = distinct(uses(architecture, dtype, batch=2))[share::shares]
    for use in chosen:
        compile_launch(use.launch, architecture)
    return len(chosen)


def main() -> None:
    """Compiles for the current device and reports how long it took."""
    architecture, started = _launch.architecture(), time.monotonic()
    shares = max(1, os.cpu_count() // len(DTYPES))
    work = [(architecture, dtype, share, shares) for dtype in DTYPES for share in range(shares)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        compiled = sum(pool.map(compile_share, *zip(*work)))
    print(f"{compiled} kernels compiled in {time.monotonic() - started:.1f} s on {os.cpu_count()} processors")


if __name__ == "__main__":
    main()
