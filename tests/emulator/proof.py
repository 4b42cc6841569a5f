"""Tables of the campaign's results, and docs/proof.md."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from pathlib import Path

_HEAD = """# What runs compiled, without a GPU

This page is written by `python -m tests.emulator --full --proof` from the results of a full run: every test of
`tests/kernels` on every target. An empty cell is not for that target; the commits of the results are named.

`tests/emulator` executes the PTX that Triton compiles, instruction by instruction, in NumPy, under the unmodified
launchers. Each launch runs twice and must leave the same bytes: once with every asynchronous copy made at once, the
programs in reverse order and another lane elected; once with every copy made only at the wait for it, NaN in its place
until then, and a race detector on shared memory. A *fault* is an access outside of the launch's tensors, a misaligned
one, a race between warps or programs, a read of shared memory that nothing wrote, an access of what an asynchronous
copy in flight writes, a write of what one reads, a missing `fence.proxy.async`, registers of a `wgmma` in flight that
change, a barrier count out of range, a wait without end, or other bytes in one of the two runs.

**Not proven here.** ptxas, which turns PTX into machine code (`tests/aot` looks at that code); the rounding inside of
a tensor core (sums are rounded in another order) and the approximations of `ex2` and `rcp`; any speed. **sm_100
(`tcgen05`) and AMD** are not emulated: `tests/aot` compiles every kernel for them and checks registers, spills, shared
memory and, on sm_100, that products are asynchronous; nothing of theirs has been executed.

Kernels on sm_90 whose weights or pixels come by pointers may feed `wgmma` from `cp.async` without
`fence.proxy.async`, as Triton does everywhere; that is not counted as a fault.
"""


_TRAFFIC = """## Work and traffic, counted while it runs

The greatest launch of each kernel in training and inference of a brats network of width 32 and depth 1 on one image of
32 × 32, and bilinear upsampling of 32 channels of 12 × 20, bfloat16, sm_90. Operations, bytes read and bytes written
are given as `fastunet/inspection/traffic.py` counts them from the intermediate code, and as executed; what is masked
off counts in both. They are equal, or differ where `tests/emulator/test_traffic.py` says why: loads ahead past the last
step, or elements of a tile that share an address. What several warps compute alike counts for each: a head of 16
channels, compared too, has a weight gradient of 16 × 16, which its four warps compute twice, and so 1.5 times the
operations of its tiles. "Useful" are the operations of the operator's definition, for all launches of the call; "inside
of tensors" the bytes that were not masked off, once for each thread. Barriers and waits are counted by warps.
"""


_MUTANTS = """
## Can the checks fail?

One barrier, wait or fence at a time is taken out of a kernel (`python -m tests.emulator.mutants` shows each). What is
not caught has a neighbour that orders the same accesses in these launches.
"""


def latest(rows: list[dict], tests: set[str]) -> list[dict]:
    """Of each of ``tests`` that ran with several states of the kernels the last; its row says at which commit."""
    commits, found = {}, {}
    for number, row in enumerate(rows):
        if "session" in row:
            commits[row["label"]] = row["session"]["commit"]
            row["collected"] = len(tests)
        row["commit"] = commits.get(row["label"], "unknown")
        if "session" in row or row["test"] in tests:
            found[row["label"].rsplit(" ", 1)[0], row.get("test", number)] = row
    return list(found.values())


def write(rows: list[dict], path: Path) -> None:
    """docs/proof.md."""
    from . import mutants, traffic

    parts = [_HEAD, table(rows), "", _TRAFFIC, traffic.table(list(traffic.rows())), _MUTANTS, mutants.table(), ""]
    path.write_text("\n".join(parts))


def table(rows: list[dict]) -> str:
    """Runs, results by kernel and dtype, and what failed."""
    sessions = [row for row in rows if "session" in row]
    tests = [row for row in rows if "test" in row]
    targets = list(dict.fromkeys(_target(row) for row in tests))
    collected = max((row.get("collected", 0) for row in sessions), default=0)
    parts = ["## Runs", _versions(sessions), _runs(tests, targets, collected)]
    parts += ["## Greatest error as a share of its budget", _NOTE, _kernels(tests, targets)]
    failed = [row for row in tests if row["outcome"] == "failed"]
    lines = [f"- {_target(r)}, `{r['test'].split('/')[-1]}`: {r['message'][:300]}" for r in failed]
    parts += ["## Failed", "\n".join(lines) or "None."]
    return "\n\n".join(parts)


_NOTE = """\
The budget is twice PyTorch's error in the same dtype plus two units of rounding of the greatest element, both
against float64 (`tests/tolerance.py`). For tf32 the unit is 2⁻⁹, what two operands cut to 10 bits lose. A cell holds
the greatest share of all tests that launch the kernel, and in brackets how many passed of those that ran; "=" where
they compare bit for bit only. An empty cell was not run, or the kernel is not for that target."""


def _target(row: dict) -> str:
    return row["label"].rsplit(" ", 1)[0].replace(" tf32", "")


def _versions(sessions: list[dict]) -> str:
    found = defaultdict(set)
    for row in sessions:
        for name, version in row["session"].items():
            found[name].add(version)
    return "; ".join(f"{name} {', '.join(sorted(versions))}" for name, versions in found.items()) + "."


def _runs(tests: list[dict], targets: list[str], collected: int) -> str:
    columns = ["target", "passed", "failed", "of them faults", "skipped", "launches", "programs", "instructions"]
    columns += ["time", "commits"]
    lines = ["| " + " | ".join(columns) + " |", "| --- |" + " ---: |" * 8 + " --- |"]
    for target in targets:
        mine = [row for row in tests if _target(row) == target]
        count = {o: sum(row["outcome"] == o for row in mine) for o in ("passed", "failed", "skipped")}
        faults = sum(row["message"].startswith("Fault") for row in mine)
        total = {name: sum(row["totals"].get(name, 0) for row in mine) for name in ("programs", "instructions")}
        launches, seconds = sum(sum(row["launches"].values()) for row in mine), sum(row["seconds"] for row in mine)
        cells = (target, count["passed"], count["failed"], faults, count["skipped"], launches, total["programs"],
                 f"{total['instructions'] / 1e6:.0f} M", f"{seconds / 60:.0f} min", _commits(mine),
                 )  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    total = {n: sum(row["totals"].get(n, 0) for row in tests) for n in ("programs", "instructions", "seconds")}
    seconds = total["seconds"] or 1
    speed = (f"The last column holds the commits, with the number of tests that last ran there. There are {collected} "
             f"tests, of which those in float32 run again in tf32; what is not counted here was not run. Launches, "
             f"programs and instructions (of warps) count both runs of a launch. While emulating, "
             f"{total['programs'] / seconds:.0f} programs and {total['instructions'] / seconds / 1e3:.0f} thousand "
             f"instructions a second on one core of a shared machine; the time includes compilation and PyTorch's "
             f"references.")  # fmt: skip
    return "\n".join(lines) + "\n\n" + speed


def _commits(rows: list[dict]) -> str:
    """Which tests last ran with which state of the kernels."""
    counts = Counter(row["commit"] for row in rows if "commit" in row)
    return ", ".join(f"{commit} ({count})" for commit, count in counts.items())


def _dtype(row: dict) -> str:
    if found := re.search(r"bfloat16|bf16|float16|fp16|float32|fp32", row["test"].split("::")[-1]):
        name = found[0].replace("bfloat", "bf").replace("float", "fp")
    else:
        kinds = {comparison["dtype"] for comparison in row["comparisons"]}
        name = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}.get(min(kinds, default=""), "other")
    return "tf32" if name == "fp32" and " tf32 " in row["label"] else name


def _kernels(tests: list[dict], targets: list[str]) -> str:
    cells: dict[tuple[str, str], dict[str, list[dict]]] = defaultdict(lambda: defaultdict(list))
    for row in tests:
        for kernel in row["launches"]:
            cells[kernel.removesuffix("_kernel"), _dtype(row)][_target(row)].append(row)
    lines = [f"| kernel | dtype | {' | '.join(targets)} |", "| --- | --- |" + " ---: |" * len(targets)]
    for (kernel, dtype), by_target in sorted(cells.items()):
        lines.append(f"| {kernel} | {dtype} | {' | '.join(_cell(by_target[target]) for target in targets)} |")
    return "\n".join(lines)


def _cell(rows: list[dict]) -> str:
    if not rows:
        return ""
    compared = [c for row in rows for c in row["comparisons"]]
    shares = [c["error"] / c["budget"] if c["budget"] else float(c["error"] > 0) for c in compared]
    passed = sum(row["outcome"] == "passed" for row in rows)
    return f"{max(shares):.2f} ({passed}/{len(rows)})" if shares else f"= ({passed}/{len(rows)})"
