"""What the processor spends on a network's launches, measured without a GPU: ``python -m bench.launch_cost``.

Every operator call of the network goes through ``torch.ops.fastunet``, its launcher and Triton, on tensors of the real
shapes, and ends where the GPU's driver would be called. That call itself (2 to 4 µs on usual servers) is not included.
First calls compile one kernel after the other into an empty cache; training finds those of inference there.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence

import torch
import triton

from bench.gpu.host_driver import host_driver
from fastunet.inspection.layers import CASES, Call, network_calls


def microseconds(run: Callable[[], object], repeats: int = 5, seconds: float = 0.005) -> float:
    """The median over ``repeats`` of the mean time of ``run()``, called for ``seconds``."""
    run()
    found = []
    for _ in range(repeats):
        calls, started = 0, time.perf_counter()
        while time.perf_counter() - started < seconds:
            run()
            calls += 1
        found.append((time.perf_counter() - started) / calls * 1e6)
    return statistics.median(found)


def cost(call: Call, dtype: torch.dtype, started: list) -> tuple[float, int, float, float]:
    """Seconds of the first call, launches of a call, and µs: of a repeated call, of its launcher run in full."""
    operands, operator = call.random(dtype, "cpu"), getattr(torch.ops.fastunet, call.operator)
    begun = time.perf_counter()
    operator(*operands, "triton")
    first = time.perf_counter() - begun
    started.clear()
    operator(*operands, "triton")
    launches = len(started)
    whole = microseconds(lambda: operator(*operands, "triton"))
    full = microseconds(lambda: call.launcher().__wrapped__(*operands))
    started.clear()
    return first, launches, whole, full


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launch_cost", description=__doc__)
    parser.add_argument("--network", choices=CASES, default="brats 128", help="default: brats 128")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    architecture, size = CASES[options.network]
    print(f"{options.network}, batch 1, bfloat16, Triton {triton.__version__}, PyTorch {torch.__version__}")
    with host_driver() as started, torch.no_grad(), tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # empty, so that first calls compile
        for training in (False, True):
            calls = network_calls(architecture, 1, *size, training=training, loss=training)
            costs = [cost(call, torch.bfloat16, started) for call in calls]
            first, launches, whole, full = (sum(column) for column in zip(*costs))
            name = "training step" if training else "inference"
            print(f"{name}: {len(calls)} operator calls, {launches} launches, {whole:.0f} µs: "
                  f"{whole / launches:.1f} µs a launch, {full / launches:.1f} without plans; "
                  f"first calls {first:.0f} s")  # fmt: skip


if __name__ == "__main__":
    main()
