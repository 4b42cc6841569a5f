"""``python -m tests.faults [--minutes N] [--seed S]``: every campaign whole, and the page ``docs/reliability.md``."""

from __future__ import annotations

import argparse
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.faults import arguments, calls, documents, kills, soak, volumes
from tests.faults.trials import Deadline, Outcome

PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
CAMPAIGNS = {  # the campaign, trials of a full run and its share of the time
    "volumes": (volumes.campaign, 2000, 0.12),
    "documents": (documents.campaign, 1000, 0.08),
    "kills": (kills.campaign, 50, 0.34),
    "disk": (kills.full_disk, 24, 0.12),
    "two": (kills.two_at_once, 12, 0.10),
    "arguments": (arguments.campaign, 6000, 0.08),
    "guard": (calls.guard_zones, 1000, 0.03),
    "soak": (soak.campaign, 100, 0.13),
}
_SHOWN = 20


def run(name: str, work: Path, trials: int, seed: int, seconds: float) -> Outcome:
    """One campaign in a folder of its own."""
    folder = work / name
    folder.mkdir(parents=True, exist_ok=True)
    return CAMPAIGNS[name][0](folder, trials, seed, Deadline(seconds))


def page(rows: list[tuple[str, int, Outcome, float]], commit: str, seed: int, minutes: float) -> str:
    """The page of a run: what was tried, what was lost, and how to repeat it."""
    machine = f"Python {platform.python_version()}, torch {torch.__version__}, {platform.system()}"
    lines = [
        "# Reliability",
        "",
        "Written by `python -m tests.faults`, from its last run; quick versions are among the tests.",
        "",
        f"Commit {commit.strip()}, {machine}, {time.strftime('%Y-%m-%d')}, `--minutes {minutes:g} --seed {seed}`.",
        "",
        "| campaign | wanted | tried | lost | what became of them |",
        "| --- | --- | --- | --- | --- |",
    ]
    for _, wanted, outcome, _ in rows:
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(outcome.counts.items(), key=lambda k: -k[1]))
        lines.append(f"| {outcome.title} | {wanted} | {outcome.tried} | {len(outcome.lost)} | {kinds} |")
    lines += [
        "",
        "Lost means: a traceback, a crash, a hang, a file that is not whole, another result without a word, or "
        "something left behind. A campaign that ran out of its share of the time tried less than it wanted.",
        "",
    ]
    for name, _, outcome, _ in rows:
        if outcome.lost:
            lines += [
                f"## Lost in {name}",
                "",
                *(f"- `{text[:300]}`" for text in sorted(set(outcome.lost))[:_SHOWN]),
                "",
            ]
    lines += ["One campaign alone: `python -m tests.faults --only kills --seed 1`.", ""]
    return "\n".join(lines)


def main() -> int:
    """Runs the campaigns; 1 if anything was lost."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="for all campaigns together (default: 60)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=tuple(CAMPAIGNS), nargs="+", help="these campaigns, without writing the page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    work, rows = calls.scratch(), []
    head = ["git", "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(head, capture_output=True, text=True, check=False).stdout
    for name in args.only or CAMPAIGNS:
        _, trials, share = CAMPAIGNS[name]
        began = time.monotonic()
        outcome = run(name, work, trials, args.seed, 60 * args.minutes * (1 if args.only else share))
        rows.append((name, trials, outcome, time.monotonic() - began))
        print(f"{name}: {outcome.tried} tried, {len(outcome.lost)} lost, {outcome.counts}", flush=True)
        for text in sorted(set(outcome.lost))[:_SHOWN]:
            print(f"  {text[:400]}", flush=True)
        if not args.only:
            PAGE.write_text(page(rows, commit, args.seed, args.minutes))
    shutil.rmtree(work, ignore_errors=True)
    return int(any(outcome.lost for _, _, outcome, _ in rows))


if __name__ == "__main__":
    sys.exit(main())
