"""What the processor spends on a network's launches, measured without a GPU: ``python -m bench.launch_cost``.

Every operator call of the network goes through ``torch.ops.fastunet``, its launcher and Triton, on tensors of the real
shapes, and ends where the GPU's driver would be called. That call itself (2 to 4 µs on usual servers) is not included.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
import triton

from bench.host_driver import host_driver
from fastunet.layers import CASES, Call, network_calls


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


def cost(call: Call, dtype: torch.dtype, started: list) -> tuple[int, float, float]:
    """Launches of an operator call, and its µs: of a repeated call as a whole, of its launcher run in full."""
    operands, operator = call.random(dtype, "cpu"), getattr(torch.ops.fastunet, call.operator)
    operator(*operands, "triton")
    started.clear()
    operator(*operands, "triton")
    launches = len(started)
    whole = microseconds(lambda: operator(*operands, "triton"))
    full = microseconds(lambda: call.launcher().__wrapped__(*operands))
    started.clear()
    return launches, whole, full


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.launch_cost", description=__doc__)
    parser.add_argument("--network", choices=CASES, default="brats 128")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    architecture, size = CASES[options.network]
    print(f"{options.network}, batch 1, bfloat16, Triton {triton.__version__}, PyTorch {torch.__version__}")
    with host_driver() as started, torch.no_grad():
        for training in (False, True):
            calls = network_calls(architecture, 1, *size, training=training, loss=training)
            costs = [cost(call, torch.bfloat16, started) for call in calls]
            launches, whole, full = (sum(column) for column in zip(*costs))
            name = "training step" if training else "inference"
            print(f"{name}: {len(calls)} operator calls, {launches} launches, {whole:.0f} µs, "
                  f"{whole / launches:.1f} µs a launch ({full / launches:.1f} where launchers run in full)")  # fmt: skip


if __name__ == "__main__":
    main()
