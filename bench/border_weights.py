"""What ``--border-weights`` does for touching cells: ``python -m bench.border_weights`` prints Dice and merged cells.

The same small network learns from the same pictures of cells with and without; a seed makes its own pictures, split and
weights. A cell is found if an object of the prediction has an intersection over union above one half with it, and
merged if one object covers more than half of it and more than half of another. Objects hang together by sides.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
import torch

from fastunet.data import make_cells, read_labels
from fastunet.data.border_weights import components
from fastunet.inference.segmenter import Segmenter
from fastunet.training.checkpoint import load_model
from fastunet.training.config import TrainConfig
from fastunet.training.distributed import Processes
from fastunet.training.run import train

_SIZES = ((144, 144), (128, 176))
_OPTIONS = dict(preset="isbi", width=8, depth=3, batch_size=4, learning_rate=3e-3, schedule="cosine", val_fraction=0.1)
CPU = torch.device("cpu")


def score(truth: np.ndarray, predicted: np.ndarray) -> np.ndarray:
    """Cells, those found, those merged, objects predicted; and pixels: both, of the truth, predicted; of one image."""
    (cells, count), (objects, several) = components(truth), components(predicted)
    shared = np.zeros((count + 1, several + 1), int)
    np.add.at(shared, (cells, objects), 1)
    sizes, covered = shared.sum(1)[1:, None], shared[1:, 1:]
    union = sizes + shared.sum(0)[None, 1:] - covered
    most = 2 * covered > sizes
    merged = most & (most.sum(0) > 1)
    return np.array([count, (2 * covered > union).sum(), merged.sum(), several,
                     (truth & predicted).sum(), truth.sum(), predicted.sum()])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.border_weights", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="(default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=16, help="of each run (default: %(default)s)")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in range(args.seeds):
        with tempfile.TemporaryDirectory() as folder:
            work = Path(folder)
            make_cells(work / "data", 20, 2 * seed, sizes=_SIZES)
            unseen = make_cells(work / "unseen", 8, 2 * seed + 1, sizes=_SIZES)
            for border in (False, True):
                config = TrainConfig(data=str(work / "data"), epochs=args.epochs, seed=seed, border_weights=border,
                                     device="cpu", **_OPTIONS)  # fmt: skip
                train(config, work / f"run{border}", Processes(0, 1, CPU), quiet=True)
                model, card = load_model(work / f"run{border}")
                segmenter, total = Segmenter(model, card, CPU), 0
                for case in unseen:
                    slices = segmenter.open(case)
                    (truth,) = slices.stack(read_labels(case.label, case.label_map)) > 0
                    (predicted,) = slices.stack(segmenter.labels(slices)) > 0
                    total = total + score(truth, predicted)
                cells, found, merged, objects, both, true, painted = total
                print(f"seed {seed}, {'with' if border else 'without':7}: Dice {2 * both / (true + painted):.3f}, "
                      f"of {cells} cells {found / cells:.0%} found, {merged / cells:.0%} merged, {objects} objects",
                      flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
