"""Time to the first result: a new process imports, builds, compiles and predicts once, with empty compiler caches.

``python -m bench.measuring.first_result VARIANT DEVICE`` is that process; it prints "ready" once it has logits.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from bench.measuring.rows import FAILED, OK, OURS, RIVAL, Row
from bench.workloads.variants import AUTOTUNED, CHANNELS_LAST, COMPILED, FASTUNET

_VARIANTS = {v.name: v for v in (FASTUNET, CHANNELS_LAST, COMPILED, AUTOTUNED)}
_CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
_LONGEST = 150.0
_PRESET, _SIDE = "brats", 128


def first_result_rows(device: torch.device, deadline: float) -> Iterator[Row]:
    """A row for each variant: seconds from starting Python to the first logits of one image, once each.

    Autotuning is left out on a CPU, where it takes minutes. Stops at ``deadline`` (of ``time.monotonic``).
    """
    precision = "bf16" if device.type == "cuda" else "fp32"
    for name in [n for n in _VARIANTS if device.type == "cuda" or n != AUTOTUNED.name]:
        left = min(_LONGEST, deadline - time.monotonic())
        if left <= 0:
            return
        seconds, problem = _time_process([name, device.type], left)
        role, state = (OURS if name == FASTUNET.name else RIVAL), (FAILED if problem else OK)
        ms = seconds * 1e3
        yield Row(_PRESET, "first result", f"1×{_SIDE}×{_SIDE}", 1, precision, name, role, state, problem,
                  p20_ms=ms, p50_ms=ms, p80_ms=ms, rounds=1)  # fmt: skip


def _time_process(arguments: list[str], limit: float) -> tuple[float, str]:
    """Seconds until the process had its result, or 0 and the reason."""
    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | {name: str(Path(caches) / name) for name in _CACHES}
        begin = time.perf_counter()
        try:
            run = subprocess.run([sys.executable, "-m", "bench.measuring.first_result", *arguments], env=environment,
                                 text=True, capture_output=True, timeout=limit, check=False,
                                 cwd=Path(__file__).parents[2])  # fmt: skip
        except subprocess.TimeoutExpired:
            return 0.0, f"no result after {limit:.0f} s"
        seconds = time.perf_counter() - begin
    if run.returncode != 0 or "ready" not in run.stdout:
        return 0.0, (run.stderr.strip().split("\n") or [""])[-1][:200] or f"exit {run.returncode}"
    return seconds, ""


def _predict_once(name: str, device: str) -> None:
    from fastunet import UNet, reference

    variant = _VARIANTS[name]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    build = UNet if variant.form == "fastunet" else reference.UNet
    model = build.from_preset(_PRESET).to(device, dtype, memory_format=torch.channels_last).eval()
    image = torch.randn(1, model.architecture.in_channels, _SIDE, _SIDE, device=device, dtype=dtype)
    with torch.no_grad():
        variant.wrap(model)(variant.place(image)).float().sum().item()
    print("ready")


if __name__ == "__main__":
    _predict_once(*sys.argv[1:])
