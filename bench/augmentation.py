"""What augmentation does for unseen cases: ``python -m bench.augmentation`` trains on phantoms and writes its table.

The same network learns from the same few cases without augmentation, with the defaults, and with quarter turns as well;
the table in ``docs/train.md`` holds the Dice of the cases kept for validation, at the end of the last epoch.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import tempfile
from pathlib import Path

import torch

from bench.report import replaced
from fastunet.data import make_phantoms
from fastunet.files import write_text
from fastunet.training.config import TrainConfig
from fastunet.training.distributed import Processes
from fastunet.training.run import train

PAGE = Path(__file__).parent.parent / "docs" / "train.md"
BEGIN, END = "<!-- augmentation:begin -->", "<!-- augmentation:end -->"
VARIANTS = {"`--no-augment`": dict(augment=False), "default": {}, "`--turns`": dict(turns=True)}
_CASES, _SHAPE = 12, (48, 48, 24)
_OPTIONS = dict(width=8, depth=3, batch_size=8, learning_rate=2e-3, schedule="cosine", val_fraction=0.67, device="cpu")


def measure(work: Path, seeds: int, epochs: int) -> dict[str, list[float]]:
    """The mean foreground Dice of each variant and seed; a seed makes its own phantoms, split and weights."""
    scores: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for seed in range(seeds):
        data = work / f"data{seed}"
        make_phantoms(data, _CASES, seed, shape=_SHAPE)
        for number, (name, options) in enumerate(VARIANTS.items()):
            run = work / f"run{seed}-{number}"
            config = TrainConfig(data=str(data), epochs=epochs, seed=seed, **_OPTIONS, **options)
            train(config, run, Processes(0, 1, torch.device("cpu")), quiet=True)
            with open(run / "log.csv", newline="") as file:
                scores[name].append(float(list(csv.DictReader(file))[-1]["dice_foreground"]))
            print(f"seed {seed}, {name}: {scores[name][-1]:.3f}", flush=True)
    return scores


def table(scores: dict[str, list[float]], epochs: int) -> str:
    """Markdown: a row per variant, a column per seed, and the mean."""
    seeds = range(len(next(iter(scores.values()))))
    lines = [
        f"| {epochs} epochs | {' | '.join(f'seed {seed}' for seed in seeds)} | mean |",
        "| --- |" + " --- |" * (len(seeds) + 1),
    ]
    for name, values in scores.items():
        lines.append(f"| {name} | {' | '.join(f'{value:.3f}' for value in values)} | {statistics.mean(values):.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.augmentation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="of data, split and weights (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=40, help="of each run (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as work:
        text = table(measure(Path(work), args.seeds, args.epochs), args.epochs)
    print(text)
    write_text(PAGE, replaced(PAGE.read_text(), text, BEGIN, END))


if __name__ == "__main__":
    main()
