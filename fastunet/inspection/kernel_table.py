"""Every kernel that the reference networks launch, compiled for a GPU that need not be there, as one table."""

from __future__ import annotations

import math
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch

from fastunet.architecture import Architecture
from fastunet.inspection.layers import CASES, NORM_CASES, Call, network_calls, standalone_calls
from fastunet.inspection.machine_code import (
    GFX942,
    Report,
    compile_launch,
    compiled_key,
    failures,
    inspect_all,
    intermediate,
)
from fastunet.inspection.traffic import Traffic, count
from fastunet.kernels import _launch, _tuned
from fastunet.kernels._launch import Launch
from fastunet.kernels.conv.cost import Cost, Device, usual_device


@dataclass(frozen=True)
class Use:
    """A launch and where it comes from: the operator call of a network at an image size."""

    case: str
    call: Call
    dtype: torch.dtype
    architecture: int
    launch: Launch
    launches: list[Launch]
    """All launches of the call, of which ``launch`` is one."""


@dataclass(frozen=True)
class Row:
    """One distinct compiled kernel: its first use, its machine code, its traffic there, and what is wrong with it.

    ``call_flop`` counts the products of all launches of the use's operator call.
    """

    use: Use
    report: Report
    traffic: Traffic
    call_flop: int
    failures: list[str]


def launches(call: Call, dtype: torch.dtype, architecture: int, gpu: str | None = None) -> list[Launch]:
    """The launches of an operator call; ``gpu`` names committed winners (``kernels/tuned``) to use."""
    recorded_for = 80 if architecture == GFX942 else architecture
    records: list[Launch]
    with _tuned.using(gpu), _launch.recording(recorded_for) as records:
        call.launcher()(*call.allocate(dtype))
    return records


def uses(architecture: int, dtype: torch.dtype, *, batch: int = 16, names: Iterable[str] | None = None,
         gpu: str | None = None) -> list[Use]:
    """Every launch of training and inference of the networks in ``CASES``, or those in ``names``, in order."""
    found = []
    for name in names or CASES:
        network, (height, width) = (CASES | NORM_CASES)[name]
        found += uses_of(name, _calls(network, batch, height, width), dtype, architecture, gpu)
    return found


def uses_of(case: str, calls: Iterable[Call], dtype: torch.dtype, architecture: int,
            gpu: str | None = None) -> list[Use]:
    """Every launch of ``calls``, in order."""
    found = []
    for call in calls:
        records = launches(call, dtype, architecture, gpu)
        found += [Use(case, call, dtype, architecture, launch, records) for launch in records]
    return found


def distinct(all_uses: Iterable[Use]) -> list[Use]:
    """The first use of each kernel that Triton would compile."""
    found: dict[str, Use] = {}
    for use in all_uses:
        found.setdefault(f"{use.architecture} {compiled_key(use.launch, use.architecture)}", use)
    return list(found.values())


def examine_all(all_uses: Iterable[Use], threads: int = 2) -> list[Row]:
    """Compiles each distinct kernel, reads its machine code and counts its traffic; all for one architecture.

    ``threads`` compile at a time: the compilers run outside of Python's lock.
    """
    found = distinct(all_uses)
    with ThreadPoolExecutor(threads) as pool:
        compiled = list(pool.map(lambda use: compile_launch(use.launch, use.architecture), found))
    rows = []
    irs = {compiled_key(use.launch, use.architecture): kernel.asm["ttir"] for use, kernel in zip(found, compiled)}

    def flop(launch: Launch, architecture: int) -> int:
        key = compiled_key(launch, architecture)
        irs[key] = irs.get(key) or intermediate(launch, architecture)
        return count(launch, irs[key]).flop

    for use, kernel, report in zip(found, compiled, inspect_all(compiled, found[0].architecture)):
        traffic = count(use.launch, kernel.asm["ttir"])
        others = [launch for launch in use.launches if launch is not use.launch] if traffic.flop else []
        call_flop = traffic.flop + sum(flop(other, use.architecture) for other in others)
        rows.append(Row(use, report, traffic, call_flop, failures(report, use.launch)))
    return rows


def kernel_table(preset: str | None) -> str:
    """The table of ``fastunet info --kernels``: every kernel of both reference networks, or of one preset, at batch 16
    in bfloat16, compiled ahead of time for the GPU, or for compute capability 9.0 without one."""
    architecture = _launch.architecture() if torch.cuda.is_available() else 90
    names = [name for name in CASES | NORM_CASES if name.split()[0] == preset] or None
    return format_table(examine_all(uses(architecture, torch.bfloat16, names=names)))


HEADER = ("kernel", "layer", "arch", "registers", "stack", "shared", "main loop", "products", "loads/product",
          "MB", "floor MB", "ratio", "GFLOP", "useful", "predicted µs", "floor", "")  # fmt: skip


def format_table(rows: Iterable[Row]) -> str:
    """``rows`` as text: registers of a thread, bytes of stack and shared memory, instructions and products of the main
    loop, then of one launch the bytes that its tiles ask for beside the floor of its operator call, its arithmetic,
    the share of the call's arithmetic that the layer needs, the time predicted by count, and the operator call's floor
    as a share of it. A prediction, not a measurement."""
    lines = [HEADER, *map(_cells, rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) if i < len(HEADER) - 1 else cell
                  for i, (cell, width) in enumerate(zip(line, widths))).rstrip()
        for line in lines
    )  # fmt: skip


def _cells(row: Row) -> tuple[str, ...]:
    use, report, traffic = row.use, row.report, row.traffic
    floor = use.call.floor_bytes(use.dtype)
    return (
        report.kernel,
        f"{use.case} {use.call.layer} {use.call.operator}",
        "gfx942" if use.architecture == GFX942 else f"sm_{use.architecture}",
        str(report.registers),
        str(report.stack),
        str(report.shared),
        str(report.instructions) if report.main_loops else "-",
        str(report.products) if report.products else "-",
        f"{report.loads_per_product:.2f}" if report.products else "-",
        f"{traffic.bytes / 1e6:.2f}",
        f"{floor / 1e6:.2f}",
        f"{traffic.bytes / floor:.2f}",
        f"{traffic.flop / 1e9:.2f}" if traffic.flop else "-",
        f"{2 * use.call.macs / row.call_flop:.0%}" if traffic.flop else "-",
        *_predicted(row),
        "; ".join(row.failures),
    )


def predicted(use: Use, traffic: Traffic, gpu: Device) -> float:
    """Seconds that a launch should take on ``gpu`` by :mod:`fastunet.kernels.conv.cost`."""
    programs = math.prod(use.launch.grid)
    cost: Any = Cost(programs, traffic.flop // (2 * programs), traffic.read // programs,
                     min(use.call.floor_bytes(use.dtype), traffic.bytes), 1, use.dtype.itemsize,
                     "pointer" in use.launch.kernel.__name__)  # fmt: skip
    return float(cost.seconds(gpu))


def floor(call: Call, dtype: torch.dtype, gpu: Device, multiplies: bool) -> float:
    """Seconds that an operator call cannot take less than: its bytes once, and, if it ``multiplies``, its products."""
    macs = call.macs // gpu.multiprocessors if multiplies else 0
    cost: Any = Cost(gpu.multiprocessors, macs, 0, call.floor_bytes(dtype), 0, dtype.itemsize, False)
    return float(cost.seconds(gpu))


def _predicted(row: Row) -> tuple[str, str]:
    """Microseconds of the launch, and the call's floor as a share of them."""
    use, traffic = row.use, row.traffic
    if use.architecture == GFX942:
        return "-", "-"
    gpu = usual_device(use.architecture)
    seconds = predicted(use, traffic, gpu)
    return f"{1e6 * seconds:.1f}", f"{floor(use.call, use.dtype, gpu, traffic.flop > 0) / seconds:.0%}"


def _calls(network: Architecture, batch: int, height: int, width: int) -> list[Call]:
    """Training, the two inference outputs, and the operators used alone; equal calls once."""
    calls = network_calls(network, batch, height, width)
    for output in ("probabilities", "labels"):
        calls += network_calls(network, batch, height, width, training=False, output=output)
    calls += standalone_calls(network, batch, height, width)
    return list({f"{call.operator} {call.arguments}": call for call in reversed(calls)}.values())[::-1]
