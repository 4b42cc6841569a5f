"""How the cost of a step grows: ``python -m bench.scaling --out DIR`` along batch, side, width, classes and processes.

On one device, batch, side, width and classes vary one at a time, inference and training; then training steps run in 1
and 2 processes on the CPU (gloo). ``torchrun --nproc-per-node=8 -m bench.scaling --worker DIR`` measures the step in
the processes that torchrun started, on as many GPUs (NCCL); run it for each number of processes.
"""

from __future__ import annotations

import argparse
import functools
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from bench.measuring.machine import default_device, environment
from bench.measuring.precision import precision_settings
from bench.measuring.rows import OK, OURS, UNCOMMITTED, Environment, Results, Row, read, write
from bench.measuring.timing import Budget, Timing, interleave
from bench.workloads.networks import LOGITS, TRAINING, TrainingStep, model_with_weights, network_workload
from bench.workloads.variants import FASTUNET
from fastunet.architecture import Architecture
from fastunet.functional.dice import dice_cross_entropy
from fastunet.inspection.repeats import Runner
from fastunet.training.distributed import Processes, process_group

AXES = ("batch", "side", "width", "classes")
WEAK, STRONG = "processes, weak", "processes, strong"
_BASE = {"cpu": dict(batch=1, side=64, width=16, classes=4), "cuda": dict(batch=8, side=128, width=32, classes=4)}
_VALUES = {
    "cpu": dict(batch=(1, 2, 4, 8), side=(32, 64, 128, 256), width=(8, 16, 32, 64), classes=(2, 8, 32)),
    "cuda": dict(batch=(1, 2, 4, 8, 16, 32, 64), side=(64, 128, 256, 512), width=(16, 32, 64, 128),
                 classes=(2, 4, 8, 16, 32)),
}  # fmt: skip
_WORKER_ROUNDS = 9
_CPU_PROCESSES = (1, 2)


def exponent(values: Sequence[float], times: Sequence[float]) -> float:
    """k of ``time ~ value**k``, by least squares of the logarithms over the largest three values: small ones measure
    what a call costs at all.

    Raises:
        ValueError: fewer than two values.
    """
    points = sorted(zip(values, times))[-3:]
    if len(points) < 2:
        raise ValueError(f"an exponent needs two points, got {len(points)}")
    return statistics.linear_regression(*([math.log(c) for c in column] for column in zip(*points))).slope


def axis_rows(axis: str, step: str, device: torch.device, budget: Budget) -> list[Row]:
    """Rows along one axis, all its values timed in turns."""
    precision = "bf16" if device.type == "cuda" else "fp32"
    points = []
    for value in _VALUES[device.type][axis]:
        at = _BASE[device.type] | {axis: value}
        workload = network_workload("brats", step, at["batch"], at["side"], precision, width=at["width"],
                                    num_classes=at["classes"])  # fmt: skip
        points.append((value, at, workload))
    with precision_settings(precision):
        runners = [Runner(w.build(FASTUNET, device), [[FASTUNET.place(t) for t in w.operands(device, 0)]], graph=False)
                   for _, _, w in points]  # fmt: skip
        timings = interleave(runners, [1] * len(runners), device, budget)
    return [_row(timing, step, precision, axis, value, at) for timing, (value, at, _) in zip(timings, points)]


def worker_rows(processes: Processes, batch: int, side: int) -> list[Row]:
    """Weak and strong scaling of the training step over the processes of this group: ``batch`` images each, and
    ``batch`` images among all (left out where they do not divide). A round lasts as long as its slowest process."""
    precision = "bf16" if processes.device.type == "cuda" else "fp32"
    rows = []
    for axis, own in ((WEAK, batch), (STRONG, batch // processes.world)):
        if own * processes.world not in (batch, batch * processes.world):
            continue
        step = _distributed_step(processes, own, side, precision)
        with precision_settings(precision):
            timing = _timed_together(step, processes)
        at = dict(batch=own * processes.world, side=side, width=32, classes=4)
        rows.append(_row(timing, TRAINING, precision, axis, processes.world, at))
    return rows


def _distributed_step(processes: Processes, batch: int, side: int, precision: str) -> functools.partial:
    workload = network_workload("brats", TRAINING, batch, side, precision)
    architecture = Architecture.from_preset("brats", dropout=0.0)
    model = model_with_weights("fastunet", architecture, processes.device, torch.float32)
    images, labels = workload.operands(processes.device, processes.rank)
    loss_of = lambda x, y: dice_cross_entropy(model(x), y, check_labels=False)  # noqa: E731
    step = TrainingStep(model, loss_of, precision, exchange=processes.sum_gradients)
    return functools.partial(step, FASTUNET.place(images), labels)


def _timed_together(step, processes: Processes) -> Timing:
    """Rounds between barriers, each as long as in the slowest process; two to warm up."""
    samples = []
    for _ in range(_WORKER_ROUNDS + 2):
        processes.barrier()
        begin = time.perf_counter()
        step()
        if processes.device.type == "cuda":
            torch.cuda.synchronize(processes.device)
        slowest = torch.tensor(time.perf_counter() - begin, device=processes.device)
        if processes.world > 1:
            dist.all_reduce(slowest, dist.ReduceOp.MAX)
        samples.append(slowest.item())
    return Timing(tuple(samples[2:]))


def _row(timing: Timing, step: str, precision: str, axis: str, value: int, at: dict[str, int]) -> Row:
    p20, p50, p80 = (timing.percentile(share) for share in (0.2, 0.5, 0.8))
    shape = f"{at['batch']}×2×{at['side']}×{at['side']}, width {at['width']}, {at['classes']} classes"
    return Row("brats", step, shape, at["batch"], precision, FASTUNET.name, OURS, OK, p20_ms=p20 * 1e3,
               p50_ms=p50 * 1e3, p80_ms=p80 * 1e3, rounds=len(timing.samples),
               images_per_second=at["batch"] / p50, axis=axis, value=value)  # fmt: skip


def _cpu_process_rows(batch: int, side: int) -> Iterator[Row]:
    """Training steps in 1 and 2 processes of one thread each, so that a process stands for a device."""
    for world in _CPU_PROCESSES:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}",
                       "-m", "bench.scaling", "--worker", folder, "--batch", str(batch), "--side", str(side),
                       "--device", "cpu"]  # fmt: skip
            run = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
                                 cwd=Path(__file__).parent.parent, timeout=600, check=False)  # fmt: skip
            files = list(Path(folder).rglob("*.json"))
            if run.returncode or not files:
                last = run.stderr.strip().split("\n")[-1]
                raise RuntimeError(f"training in {world} processes failed: {last}")
            yield from read(files[0]).rows


def _work(options: argparse.Namespace) -> None:
    """What each process of a group does; the first one writes the rows."""
    with process_group(options.device or "auto") as processes:
        rows = worker_rows(processes, options.batch, options.side)
        if processes.leader:
            machine = environment(processes.device)
            _write(Path(options.worker), machine, rows, f"-{processes.world}-processes")
        processes.barrier()


def _write(folder: Path, machine: Environment, rows: list[Row], suffix: str = "") -> Path:
    path = folder / machine.slug / Results(machine, ()).filename.replace(".json", f"{suffix}-scaling.json")
    write(path, machine, rows)
    return path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.scaling", description=__doc__.split("\n\n")[0])
    parser.add_argument("--out", type=Path, default=UNCOMMITTED, help="folder of result files (default: .benchmarks)")
    parser.add_argument("--minutes", type=float, default=4.0, help="starts nothing new after this time (default: 4)")
    parser.add_argument("--worker", metavar="DIR", help="be one process of torchrun's group; rows go to DIR")
    parser.add_argument("--batch", type=int, default=4, help="images of each process, or of all (default: 4)")
    parser.add_argument("--side", type=int, default=64, help="of the images in several processes (default: 64)")
    parser.add_argument("--device", help="cpu or cuda; by default CUDA where there is one")
    options = parser.parse_args(arguments)
    if options.worker:
        _work(options)
        return 0
    deadline = time.monotonic() + 60 * options.minutes
    device = torch.device(options.device) if options.device else default_device()
    machine = environment(device)
    rows: list[Row] = []
    path = _write(options.out, machine, rows)
    budget = Budget(seconds=3.0, least_rounds=5, most_rounds=30)
    sources = [functools.partial(axis_rows, axis, step, device, budget) for step in (TRAINING, LOGITS) for axis in AXES]
    if device.type == "cpu":
        sources.insert(0, functools.partial(_cpu_process_rows, options.batch, options.side))
    for source in sources:
        if time.monotonic() > deadline:
            print(f"the rest did not fit into {options.minutes:g} minutes")
            break
        for row in source():
            rows.append(row)
            _write(options.out, machine, rows)
            print(f"{row.step}, {row.axis} {row.value}: {row.p50_ms:.2f} ms", flush=True)
    print(f"{len(rows)} rows in {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
