"""Take a Keras U-Net over to PyTorch: python examples/port_a_keras_model.py WEIGHTS.h5 OUT.safetensors

WEIGHTS is a `.weights.h5`, `.h5` or `.keras` file of the Keras BraTS U-Net, layers of any name; Keras itself is not
needed. For other sizes give `width`, `depth`, `in_channels` and `num_classes` of yours; a file that does not fit is
refused with what was expected.
"""

import sys

import safetensors.torch
import torch

import fastunet
from fastunet.interop import load_keras_weights


def main(weights: str, out: str, width: str = "32", depth: str = "4") -> None:
    model = fastunet.UNet(in_channels=2, num_classes=4, width=int(width), depth=int(depth))
    load_keras_weights(model, weights)
    safetensors.torch.save_file({k: v.contiguous() for k, v in model.state_dict().items()}, out)
    images = torch.zeros(1, 2, 64, 64)  # PyTorch's order: Keras' (N, H, W, C) images need .permute(0, 3, 1, 2)
    probabilities = model.eval().predict_proba(images)
    print(f"{weights}: probabilities {tuple(probabilities.shape)} of an empty image, mean", end=" ")
    print([round(p, 4) for p in probabilities.mean((0, 2, 3)).tolist()])


if __name__ == "__main__":
    main(*sys.argv[1:])
