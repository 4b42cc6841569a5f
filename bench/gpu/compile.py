"""Fills Triton's cache on disk with the kernels of both networks, in parallel, so that tests do not wait for it."""

from __future__ import annotations

import os
import time

from fastunet.inspection.layers import CASES
from fastunet.inspection.warm_up import Work, warm_up
from fastunet.kernels import _launch


def main() -> None:
    """Compiles for the current device and reports how long it took."""
    architecture, started, processes = _launch.architecture(), time.monotonic(), os.cpu_count() or 1
    works = [Work(network, size, 2, precision, architecture)
             for network, size in CASES.values() for precision in ("bf16", "fp16", "tf32")]  # fmt: skip
    compiled = warm_up(works, processes)
    print(f"{compiled} kernels compiled in {time.monotonic() - started:.1f} s by {processes} processes")


if __name__ == "__main__":
    main()
