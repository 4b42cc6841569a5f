"""Each operator call of both networks as predicted by count and as measured: ``python -m bench.gpu.predict``.

By these rows the constants of ``kernels/conv/cost.py`` can be judged and fitted: a prediction that is off by the same
factor everywhere chooses the same tiles, one that is off by variant does not.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench.measuring import machine
from fastunet.inspection.kernel_table import floor, predicted, uses_of
from fastunet.inspection.layers import CASES, Call, network_calls
from fastunet.inspection.machine_code import compile_launch
from fastunet.inspection.repeats import device_microseconds, rotated
from fastunet.inspection.traffic import count
from fastunet.kernels import _launch
from fastunet.kernels.conv import cost


def calls() -> Iterator[tuple[str, Call]]:
    """Case and call of training and inference of the networks at batch 16, then 1; equal calls once."""
    seen = set()
    for batch in (16, 1):
        for name, (network, (height, width)) in CASES.items():
            found = network_calls(network, batch, height, width)
            found += network_calls(network, batch, height, width, training=False, output="labels")
            for call in found:
                key = f"{call.operator} {call.arguments}"
                if key not in seen:
                    seen.add(key)
                    yield f"{name} x{batch}", call


def row(case: str, call: Call, dtype: torch.dtype, measure: Callable[[Call, torch.dtype], float]) -> dict[str, Any]:
    """Predicted, measured and floor microseconds of a call, whose launches are named by their kernels."""
    architecture, gpu = _launch.architecture(), cost.device()
    found = uses_of(case, [call], dtype, architecture)
    counted = [count(use.launch, compile_launch(use.launch, architecture).asm["ttir"]) for use in found]
    multiplies = any(traffic.flop for traffic in counted)
    return dict(
        case=case, layer=call.layer, operator=call.operator,
        kernels=[use.launch.kernel.__name__ for use in found],
        predicted_us=1e6 * sum(predicted(use, traffic, gpu) for use, traffic in zip(found, counted)),
        measured_us=measure(call, dtype), floor_us=1e6 * floor(call, dtype, gpu, multiplies),
    )  # fmt: skip


def measured(call: Call, dtype: torch.dtype) -> float:
    """Microseconds on the current GPU, over operands that its cache does not hold."""
    sets = rotated(call.random(dtype, "cuda"), machine.cache_bytes(torch.device("cuda")))
    return device_microseconds(call.launcher(), sets)


def line(found: dict[str, Any]) -> str:
    """A row as text."""
    ratio = found["measured_us"] / found["predicted_us"]
    name = f"{found['case']} {found['layer']} {found['operator']}"
    return (f"{name:<60} predicted {found['predicted_us']:8.1f} µs  measured {found['measured_us']:8.1f} µs  "
            f"{ratio:5.2f}×  floor {found['floor_us']:7.1f} µs  {'+'.join(found['kernels'])}")  # fmt: skip


def main(arguments: list[str] | None = None, measure: Callable[[Call, torch.dtype], float] = measured) -> None:
    """Prints a line for each call in bfloat16 and writes ``DIR/predicted.json``; ends after ``--minutes``."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.predict", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of predicted.json")
    parser.add_argument("--minutes", type=float, default=5.0, help="end within this time (default: %(default)g)")
    options = parser.parse_args(arguments)
    deadline, rows = time.monotonic() + 60 * options.minutes, []
    for case, call in calls():
        if time.monotonic() > deadline:
            break
        rows.append(row(case, call, torch.bfloat16, measure))
        print(line(rows[-1]), flush=True)
    content = dict(device=cost.device().name, versions=machine.versions(), commit=machine.commit(), rows=rows)
    (options.out / "predicted.json").write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
