"""Write a network as ONNX and run it elsewhere: python examples/export_to_onnx.py RUN NETWORK.onnx

Needs `pip install 'fastunet[onnx]' onnxruntime`. Batch and image size stay free in the file.
"""

import sys

import numpy as np
import onnxruntime
import torch

import fastunet
from fastunet.training.checkpoint import load_model


def main(run: str, path: str) -> None:
    model, card = load_model(run)
    fastunet.to_onnx(model, path)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    images = np.random.default_rng(0).normal(size=(1, len(card.modalities), 45, 60)).astype(np.float32)
    (logits,) = session.run(["logits"], {"images": images})
    labels = logits.argmax(1)  # class indices; softmax over axis 1 gives probabilities
    same = (labels == model.predict(torch.from_numpy(images)).numpy()).mean()
    print(f"{path}: logits {logits.shape}; {same:.1%} of the labels are those of PyTorch")


if __name__ == "__main__":
    main(*sys.argv[1:])
