"""Measures within a time limit and writes after each workload: ``python -m bench.run --out DIR --minutes 8``.

What the README shows comes first; what does not fit the time is left out and counted in the last line. Needs torch,
numpy, and on a GPU Triton, nothing else; MONAI is measured where it is installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from bench.measuring.first_result import first_result_rows
from bench.measuring.machine import default_device, environment
from bench.measuring.measure import measure
from bench.measuring.rows import OK, OURS, RIVAL, UNCOMMITTED, Results, Row, best, by_workload, write
from bench.measuring.timing import Budget, open_second_pool
from bench.workloads import selection
from bench.workloads.waterfall import waterfall_workload
from fastunet.allocator import keep_freed_memory

_CPU = Budget(seconds=4.0, least_rounds=5, most_rounds=40)
_GPU = Budget(seconds=1.0, least_rounds=10, most_rounds=100, least_sample=5e-3)


def time_budget(device: torch.device) -> Budget:
    """Seconds and rounds of one workload."""
    return _GPU if device.type == "cuda" else _CPU


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code, 2 if nothing matches ``--only``."""
    options = _parser().parse_args(arguments)
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device(options.device) if options.device else default_device()
    chosen = [waterfall_workload(device), *selection.everything(device, options.full)]
    # the network that the README's headline is about goes before the steps that lead to it
    chosen.insert(1, chosen.pop(0))
    chosen = [w for w in chosen if re.search(options.only, w.name)]
    first_results = re.search(options.only, "first result") is not None
    if not chosen and not first_results:
        print(f"no workload matches --only {options.only!r}", file=sys.stderr)
        return 2
    machine = environment(device)
    path = Path(options.out) / machine.slug / Results(machine, ()).filename
    products = ", ".join(f"{name} {rate:.3g} TFLOP/s" for name, rate in machine.matmul_tflops.items())
    print(f"{machine.device}: copy {machine.copy_gbs:.1f} GB/s, matrix product {products}", flush=True)
    if options.keep_memory:
        keep_freed_memory()
    if options.second_pool:
        open_second_pool()
    budget = dataclasses.replace(time_budget(device), least_rounds=options.rounds)
    rows: list[Row] = []
    left_out = 0
    for index, workload in enumerate(chosen):
        if time.monotonic() > deadline:
            left_out = len(chosen) - index
            break
        rows += [m.row for m in measure(workload, device, machine, budget, deadline)]
        write(path, machine, rows)
        print(_line(rows[-1].workload, rows), flush=True)
    if first_results and time.monotonic() < deadline:
        for row in first_result_rows(device, deadline):
            rows.append(row)
            write(path, machine, rows)
            print(f"first result, {row.variant}: {row.p50_ms / 1e3:.1f} s {row.note}", flush=True)
    bad = [row for row in rows if row.state != OK]
    for row in bad:
        print(f"{row.state}: {row.subject} {row.step} {row.shape} {row.precision}, {row.variant}: {row.note}")
    left = f"; {left_out} workloads did not fit into {options.minutes:g} minutes" if left_out else ""
    print(f"{len(rows)} rows ({len(bad)} wrong or failed) in {path}{left}")
    return 0


def _line(workload: tuple, rows: list[Row]) -> str:
    """One line of progress: the fastest of ours and of the rivals."""
    group = by_workload(rows)[workload]
    ours, rival = best(group, OURS), best(group, RIVAL)
    name = " ".join(str(part) for part in workload[:4])
    if ours is None or rival is None:
        return f"{name}: {', '.join(f'{r.variant} {r.state}' for r in group)}"
    ratio = rival.p50_ms / ours.p50_ms
    return f"{name}: {ours.variant} {ours.p50_ms:.3f} ms, {rival.variant} {rival.p50_ms:.3f} ms, ratio {ratio:.2f}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.run", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", default=str(UNCOMMITTED),
                        help="folder of result files (bench/results to commit them; default: .benchmarks)")  # fmt: skip
    parser.add_argument("--minutes", type=float, default=9.0, help="starts nothing new after this time (default: 9)")
    parser.add_argument("--rounds", type=int, default=5, help="at least so many samples of each variant (default: 5)")
    parser.add_argument("--keep-memory", action="store_true", help="on a CPU: glibc does not return freed memory")
    parser.add_argument("--second-pool", action="store_true",
                        help="on a CPU: beside a thread that has run a parallel operation")  # fmt: skip
    parser.add_argument("--full", action="store_true", help="every shape, precision and variant")
    parser.add_argument("--only", default="", metavar="REGEX", help='workloads whose name matches, as in "brats infer"')
    parser.add_argument("--device", help="cpu or cuda; by default CUDA where there is one")
    return parser


if __name__ == "__main__":
    sys.exit(main())
