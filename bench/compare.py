"""Says what moved beyond the noise: ``python -m bench.compare BASE HEAD``, of two result files or of two commits.

Commits are checked out into a temporary folder and measured in turns by this checkout's ``bench/``, twice each. Exit
code 1 if anything became slower or stopped being right, 2 for bad input.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bench.measuring.rows import OK, Results, Row, read
from bench.pages.tables import markdown, milliseconds

_REPOSITORY = Path(__file__).parent.parent
_LEAST_CHANGE = 0.03
"""Medians closer than this are the same: clocks and memory placement move them from run to run."""
_REPETITIONS = 2


@dataclass(frozen=True)
class Change:
    """A variant of a workload in both results; ``ratio`` is the head's median over the base's (nan if not timed)."""

    base: Row
    head: Row
    ratio: float
    noise: float
    """A change of ``ratio`` from 1 by up to this share is noise."""

    @property
    def verdict(self) -> str:
        """"broken", "mended", "slower", "faster" or "same"."""
        if self.head.state != OK or self.base.state != OK:
            return "same" if self.head.state == self.base.state else "broken" if self.head.state != OK else "mended"
        if abs(math.log(self.ratio)) <= math.log1p(self.noise):
            return "same"
        return "slower" if self.ratio > 1 else "faster"


def changes(base: Sequence[Row], head: Sequence[Row]) -> list[Change]:
    """The rows that both have. Noise is the sum of both spreads from the 20th to the 80th percentile, at least 3 %.

    A single sample, as that of a first result, has no spread: a quarter is taken for it.
    """
    before = {(row.workload, row.variant): row for row in base}
    found = []
    for row in head:
        old = before.get((row.workload, row.variant))
        if old is None:
            continue
        timed = old.p50_ms > 0 and row.p50_ms > 0
        ratio = row.p50_ms / old.p50_ms if timed else math.nan
        noise = max(_LEAST_CHANGE, _spread(old) + _spread(row)) if timed else 0.0
        found.append(Change(old, row, ratio, noise))
    return found


def _spread(row: Row) -> float:
    return 0.125 if row.rounds == 1 else (row.p80_ms - row.p20_ms) / row.p50_ms


def report(found: Sequence[Change]) -> str:
    """A table of what moved, worst first, and how many did not."""
    order = {"broken": 0, "slower": 1, "faster": 2, "mended": 3}
    moved = sorted((c for c in found if c.verdict != "same"), key=lambda c: (order[c.verdict], -abs(c.ratio - 1)))
    same = f"{len(found) - len(moved)} of {len(found)} measurements moved by no more than their noise."
    if not moved:
        return same
    lines = [[f"{c.head.subject} {c.head.step}, {c.head.shape}, {c.head.precision}", c.head.variant, c.verdict,
              _time(c.base), _time(c.head), f"{c.ratio - 1:+.1%}" if c.ratio == c.ratio else "–", f"±{c.noise:.1%}"]
             for c in moved]  # fmt: skip
    header = ["", "variant", "", "base", "head", "change", "noise"]
    return markdown(header, lines, right_from=3) + "\n\n" + same


def _time(row: Row) -> str:
    return milliseconds(row.p50_ms) if row.state == OK else row.state


def merged(runs: Sequence[Results]) -> list[Row]:
    """Rows of repeated runs as one: medians of medians, and percentiles that span those of every run."""
    groups: dict[tuple, list[Row]] = {}
    for results in runs:
        for row in results.rows:
            groups.setdefault((row.workload, row.variant), []).append(row)
    joined = []
    for rows in groups.values():
        worst = next((row for row in rows if row.state != OK), None)
        joined.append(worst or replace(
            rows[0],
            p20_ms=min(row.p20_ms for row in rows),
            p50_ms=statistics.median(row.p50_ms for row in rows),
            p80_ms=max(row.p80_ms for row in rows),
            rounds=sum(row.rounds for row in rows),
        ))  # fmt: skip
    return joined


def measure_commits(commits: Sequence[str], only: str, minutes: float) -> list[list[Row]]:
    """Rows of each commit, measured in turns.

    Raises:
        ValueError: a commit that git does not know, or a run that fails; the message says which.
    """
    for commit in commits:
        if _git("rev-parse", "--verify", "--quiet", f"{commit}^{{commit}}").returncode:
            raise ValueError(f"{commit!r} is neither a result file nor a commit of this repository")
    with tempfile.TemporaryDirectory(prefix="fastunet-compare-") as folder:
        trees = [Path(folder) / name for name in ("base", "head")]
        try:
            for tree, commit in zip(trees, commits):
                _check_out(commit, tree)
            runs: list[list[Results]] = [[], []]
            for repetition in range(_REPETITIONS):
                for index, tree in enumerate(trees):
                    runs[index].append(_measure(tree, Path(folder) / f"out-{index}-{repetition}", only, minutes))
        finally:
            for tree in trees:
                _git("worktree", "remove", "--force", str(tree))
            _git("worktree", "prune")
    return [merged(results) for results in runs]


def _check_out(commit: str, tree: Path) -> None:
    """A worktree of ``commit`` with this checkout's bench/, so that both are measured by the same code."""
    added = _git("worktree", "add", "--detach", str(tree), commit)
    if added.returncode:
        raise ValueError(f"git cannot check out {commit}: {added.stderr.strip()}")
    shutil.rmtree(tree / "bench", ignore_errors=True)
    shutil.copytree(_REPOSITORY / "bench", tree / "bench", ignore=shutil.ignore_patterns("results", "__pycache__"))
    # an installed fastunet would lend its own kernels to a tree that has them elsewhere
    (tree / "fastunet" / "kernels").symlink_to(tree / "kernels", target_is_directory=True)


def _measure(tree: Path, out: Path, only: str, minutes: float) -> Results:
    command = [sys.executable, "-m", "bench.run", "--out", str(out), "--only", only, "--minutes", str(minutes)]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    run = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    files = list(out.rglob("*.json"))
    if run.returncode or not files:
        last = (run.stderr.strip() or run.stdout.strip()).split("\n")[-1]
        raise ValueError(f"measuring {tree.name} failed: {last}")
    return read(files[0])


def _git(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; see the module's text for the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.compare", description=__doc__.split("\n\n")[0])
    parser.add_argument("base", help="a result file or a commit")
    parser.add_argument("head", help="a result file or a commit")
    parser.add_argument("--only", default="^brats", metavar="REGEX", help="what to measure (default: ^brats)")
    parser.add_argument("--minutes", type=float, default=3.0, help="of each of the four runs on commits (default: 3)")
    options = parser.parse_args(arguments)
    sides = [options.base, options.head]
    are_files = [Path(side).is_file() for side in sides]
    try:
        if any(are_files) and not all(are_files):
            other = sides[are_files.index(False)]
            raise ValueError(f"{other!r} is no result file, the other side is one; give two files or two commits")
        if all(are_files):
            results = [read(Path(side)) for side in sides]
            devices = [r.environment.device for r in results]
            if devices[0] != devices[1]:
                raise ValueError(f"{devices[0]} and {devices[1]} are different devices; their times do not compare")
            base, head = (list(r.rows) for r in results)
        else:
            base, head = measure_commits(sides, options.only, options.minutes)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    found = changes(base, head)
    print(report(found))
    return int(any(change.verdict in ("slower", "broken") for change in found))


if __name__ == "__main__":
    sys.exit(main())
