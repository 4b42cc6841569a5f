"""Weights of Keras models in and out: ``.weights.h5``, legacy ``.h5`` and ``.keras``. Needs h5py, not Keras.

Layers are matched by their order, not by their names: a Keras file lists the convolutions of a functional model in the
order in which they are computed, and so does ``fastunet.UNet``'s ``state_dict``. Keras kernels are (k, k, C_in, C_out),
those of transposed convolutions (k, k, C_out, C_in); PyTorch's are (C_out, C_in, k, k) and (C_in, C_out, k, k).
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from fastunet.architecture import Architecture
from fastunet.arguments import checked
from fastunet.errors import UserError
from fastunet.files import write_bytes
from fastunet.interop.keras_model import functional_config

if TYPE_CHECKING:
    import h5py

_INSIDE_ARCHIVE = "model.weights.h5"
Layers = list[tuple[str, nn.Conv2d | nn.ConvTranspose2d]]


@checked
def load_keras_weights(model: nn.Module, path: str | Path) -> None:
    """Copies the convolutions of a Keras file into ``model``'s, in order; nothing is copied unless everything fits.

    Args:
        model: its ``nn.Conv2d`` and ``nn.ConvTranspose2d`` layers in forward order, as those of ``fastunet.UNet`` are.
        path: a ``.weights.h5`` or ``.keras`` of Keras 3, or a legacy ``.h5`` of weights or of a whole model.

    Raises:
        ValueError: the file cannot be read, or its convolutions do not fit; the message lists every one that does not.
    """
    path = Path(path)
    with _opened(path) as file:
        found = list(_kernels(file))
    layers = _convolutions(model)
    transposes = [f for f in found if f[2]]
    ordered = iter([f for f in found if f[2] is not True]), iter(transposes)
    problems, new = [], []
    if len(found) != len(layers):
        problems.append(f"it has {len(found)} convolutions, the model {len(layers)}")
    for name, layer in layers:
        transposed = isinstance(layer, nn.ConvTranspose2d)
        kernel, bias, _ = next(ordered[transposed and bool(transposes)], (None, None, None))
        if kernel is None:
            problems.append(f"{name} has no counterpart")
            continue
        weight = kernel.transpose(3, 2, 0, 1)
        if weight.shape != tuple(layer.weight.shape) or (bias is None) != (layer.bias is None):
            problems.append(f"{name} is {tuple(layer.weight.shape)}, the file's is {weight.shape}"
                            + (" without bias" if bias is None else ""))  # fmt: skip
            continue
        new.append((layer, weight, bias))
    if problems:
        raise UserError(f"{path} does not fit the model: {'; '.join(problems)}")
    with torch.no_grad():
        for layer, weight, bias in new:
            layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
            if bias is not None and layer.bias is not None:
                layer.bias.copy_(torch.from_numpy(bias))


@checked
def save_keras_weights(model: nn.Module, path: str | Path) -> None:
    """Writes ``model``'s convolutions as Keras reads them: ``.weights.h5``, legacy ``.h5``, or a whole ``.keras``.

    The first two are for ``load_weights`` of a Keras model of the same layers; ``.keras``, for ``load_model``, is
    written for a ``fastunet.UNet`` of "same" convolutions and nearest upsampling, with the softmax of
    ``predict_proba``.

    Raises:
        ValueError: another suffix, a network that ``.keras`` is not written for, or the file cannot be written.
    """
    path = Path(path)
    if path.suffix not in (".h5", ".keras"):
        raise UserError(f"{path}: expected a name that ends in .weights.h5, .h5 or .keras")
    config = json.dumps(functional_config(_architecture(model))) if path.suffix == ".keras" else ""
    buffer = io.BytesIO()
    with _h5py().File(buffer, "w") as file:
        keras3 = path.name.endswith((".weights.h5", ".keras"))
        (_write_keras3 if keras3 else _write_legacy)(file, _convolutions(model))
    if path.suffix == ".keras":
        weights, buffer = buffer, io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            archive.writestr("metadata.json", json.dumps({"keras_version": "3.5.0"}))
            archive.writestr("config.json", config)
            archive.writestr(_INSIDE_ARCHIVE, weights.getvalue())
    write_bytes(path, buffer.getvalue())


def _architecture(model: nn.Module) -> Architecture:
    architecture = getattr(model, "architecture", None)
    if not isinstance(architecture, Architecture):
        raise UserError(f"a .keras archive is written of a fastunet.UNet, not of a {type(model).__name__}")
    return architecture


def _convolutions(model: nn.Module) -> Layers:
    if getattr(getattr(model, "architecture", None), "norm", None) is not None:
        raise UserError("norms are not read from Keras files, nor written: this network has some")
    return [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)]


def _h5py() -> Any:
    try:
        import h5py
    except ImportError as error:
        raise UserError("Keras files need h5py: pip install 'fastunet[keras]'") from error
    return h5py


def _opened(path: Path) -> h5py.File:
    """The HDF5 file at ``path``, or the one inside a ``.keras`` archive."""
    h5py = _h5py()
    try:
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                return h5py.File(io.BytesIO(archive.read(_INSIDE_ARCHIVE)), "r")
        return h5py.File(path, "r")
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is not a Keras file: {error}") from error


def _kernels(file: h5py.File) -> Iterator[tuple[np.ndarray, np.ndarray | None, bool | None]]:
    """Kernel, bias, and whether it is a transposed convolution (None: the file does not tell) in the file's order."""
    root = file.get("model_weights", file)
    if "layer_names" in root.attrs:
        for layer in root.attrs["layer_names"]:
            group = root[_text(layer)]
            values = [group[_text(name)][()] for name in group.attrs["weight_names"]]
            if values and values[0].ndim == 4:
                yield values[0], values[1] if len(values) > 1 else None, None
        return
    groups: list[str] = []
    file.visit(lambda name: groups.append(name) if name.endswith("/vars") and "optimizer" not in name else None)
    for name in sorted(groups, key=_natural):
        values = [file[name][key][()] for key in sorted(file[name], key=int)]
        if values and values[0].ndim == 4:
            yield values[0], values[1] if len(values) > 1 else None, "conv2d_transpose" in name


def _write_keras3(file: h5py.File, layers: Layers) -> None:
    """``layers/conv2d_<i>/vars/<j>``: Keras counts layers of a class by their order, whatever their names are."""
    counts = {"conv2d": 0, "conv2d_transpose": 0}
    for _, layer in layers:
        kind = "conv2d_transpose" if isinstance(layer, nn.ConvTranspose2d) else "conv2d"
        name = f"{kind}_{counts[kind]}" if counts[kind] else kind
        counts[kind] += 1
        for j, value in enumerate(_values(layer)):
            file[f"layers/{name}/vars/{j}"] = value


def _write_legacy(file: h5py.File, layers: Layers) -> None:
    names = [name.replace(".", "_") for name, _ in layers]
    file.attrs["layer_names"] = np.array(names, dtype="S")
    file.attrs["backend"], file.attrs["keras_version"] = b"tensorflow", b"2.0.0"
    for name, (_, layer) in zip(names, layers):
        keys = [f"{name}/kernel:0", f"{name}/bias:0"][: len(_values(layer))]
        group = file.create_group(name)
        group.attrs["weight_names"] = np.array(keys, dtype="S")
        for key, value in zip(keys, _values(layer)):
            group[key] = value


def _values(layer: nn.Conv2d | nn.ConvTranspose2d) -> list[np.ndarray]:
    """Kernel and bias in Keras' layouts."""
    kernel = layer.weight.detach().float().cpu().permute(2, 3, 1, 0).numpy()
    return [np.ascontiguousarray(kernel)] + ([] if layer.bias is None else [layer.bias.detach().float().cpu().numpy()])


def _natural(name: str) -> list[int | str]:
    """Sorts conv2d before conv2d_1, and conv2d_2 before conv2d_10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


def _text(name: str | bytes) -> str:
    return name.decode() if isinstance(name, bytes) else name
