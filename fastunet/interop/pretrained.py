"""Networks as folders in the layout of Hugging Face's ``PyTorchModelHubMixin``: a configuration and the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors.torch

from fastunet import reference
from fastunet.arguments import checked
from fastunet.errors import UserError
from fastunet.files import make_output_folder, write_bytes
from fastunet.interop.checkpoints import load_torch_weights
from fastunet.schema import read_json
from fastunet.unet import UNet

CONFIG, WEIGHTS = "config.json", "model.safetensors"


@checked
def save_pretrained(model: reference.UNet, folder: str | Path) -> None:
    """Writes the network's constructor arguments and weights into ``folder``, which is made if need be.

    Raises:
        UserError: a file cannot be written.
    """
    folder = make_output_folder(folder)
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    write_bytes(folder / WEIGHTS, safetensors.torch.save(weights, {"format": "pt"}))
    write_bytes(folder / CONFIG, json.dumps(model.config, indent=2, sort_keys=True).encode())


@checked
def from_pretrained(folder: str | Path, *, backend: str = "auto") -> UNet:
    """The network, in evaluation mode, of a local folder that :func:`save_pretrained` or the mixin wrote.

    Raises:
        UserError: a file is missing or damaged, or names arguments that the constructor does not take.
        ValueError: weights that do not fit.
    """
    path = Path(folder) / CONFIG
    config = read_json(path, dict[str, Any])
    try:
        model = UNet(**{**config, "backend": backend})
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} does not describe a fastunet.UNet: {error}") from error
    load_torch_weights(model, Path(folder) / WEIGHTS)
    return model.eval()
