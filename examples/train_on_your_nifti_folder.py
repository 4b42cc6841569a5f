"""Train on a folder of NIfTI cases from Python: python examples/train_on_your_nifti_folder.py DATA RUN [STEPS]

DATA is any folder that `fastunet check DATA` accepts (BraTS, nnU-Net, Medical Segmentation Decathlon). RUN then holds a
checkpoint for `fastunet segment RUN DATA --out LABELS`. The loop is yours to change; `fastunet train` has a longer one,
with validation, augmentation, mixed precision and resuming.
"""

import sys
from dataclasses import asdict
from itertools import count, islice
from pathlib import Path

import torch

import fastunet
from fastunet.data import IGNORED, SliceDataset, discover_cases
from fastunet.losses import DiceCrossEntropyLoss
from fastunet.training.checkpoint import ModelCard, save_weights

MODALITIES = ("flair", "t1ce")


def main(data: str, run: str, steps: str = "1000") -> None:
    folder = Path(run)
    folder.mkdir(parents=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cases = discover_cases(data, modalities=MODALITIES)
    slices = SliceDataset(cases, cache_dir=folder / "cache", modalities=MODALITIES, skip_empty=True)
    table = cases[0].label_map
    model = fastunet.UNet(len(MODALITIES), len(table.class_names), width=16, depth=3)
    model.to(device, memory_format=torch.channels_last)
    loss_function = DiceCrossEntropyLoss(ignore_index=IGNORED)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    batches = (batch for epoch in count() for batch in slices.batches(8, epoch))
    for step, batch in enumerate(islice(batches, int(steps))):
        images, labels = (tensor.to(device) for tensor in slices.read(batch))
        optimizer.zero_grad()
        loss = loss_function(model(images), labels)
        loss.backward()
        optimizer.step()
        if step % 20 == 0:
            print(f"step {step}: loss {loss.item():.4f}", flush=True)
    save_weights(folder / "last.safetensors", model, ModelCard(model.config, MODALITIES, asdict(table)))


if __name__ == "__main__":
    main(*sys.argv[1:])
