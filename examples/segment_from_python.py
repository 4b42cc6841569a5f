"""Segment cases with a trained network from Python: python examples/segment_from_python.py RUN DATA OUT

RUN is what `fastunet train` wrote. Each case of DATA gives one label file in OUT, in the label values of the training
data and on the grid of the case; the same class indices are at hand as an array.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from fastunet.data import discover_cases
from fastunet.inference.segmenter import Segmenter, write_case
from fastunet.training.checkpoint import load_model


def main(run: str, data: str, out: str) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, card = load_model(run)
    segmenter = Segmenter(model.to(device), card, device)
    Path(out).mkdir(parents=True)
    for case in discover_cases(data, modalities=card.modalities):
        labels = write_case(segmenter, segmenter.open(case), Path(out, f"{case.name}.nii.gz"), probabilities=False)
        counts = np.bincount(labels.ravel(), minlength=len(card.class_names))
        print(case.name, ", ".join(f"{name}: {voxels}" for name, voxels in zip(card.class_names, counts)))


if __name__ == "__main__":
    main(*sys.argv[1:])
