"""Weights of PyTorch checkpoints, whatever wrapped the model that wrote them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastunet.arguments import checked
from fastunet.errors import UserError

PREFIXES = ("module.", "_orig_mod.", "model.", "net.", "network.")
"""What DistributedDataParallel, torch.compile and trainers put before every key."""
_WRAPPERS = ("state_dict", "model_state_dict", "network_weights", "model", "net")
"""Keys under which trainers keep the ``state_dict``."""


@checked
def load_torch_weights(model: nn.Module, source: str | Path | Mapping[str, Any]) -> None:
    """Loads a checkpoint into ``model``; nothing is copied unless every key fits.

    Args:
        model: any module; ``fastunet.UNet`` and ``fastunet.reference.UNet`` have the same keys.
        source: a ``state_dict``, or a file that holds one: ``.safetensors``, or a pickle, which is read with
            ``weights_only=True``, so that it can hold tensors and plain containers but no code. A dictionary that keeps
            the ``state_dict`` under "state_dict", "model" and the like is opened; prefixes of wrappers are taken off.

    Raises:
        ValueError: the file cannot be read, or does not fit; the message lists every missing, unexpected and
            misshapen key.
    """
    name = f"{source}" if isinstance(source, str | Path) else "the state_dict"
    state = _state_dict(_read(Path(source)) if isinstance(source, str | Path) else source, name)
    wanted = model.state_dict()
    state = _without_prefixes(state, set(wanted))
    problems = {
        "missing": sorted(wanted.keys() - state.keys()),
        "unexpected": sorted(state.keys() - wanted.keys()),
        "misshapen": [f"{key} {tuple(state[key].shape)} instead of {tuple(wanted[key].shape)}"
                      for key in wanted if key in state and state[key].shape != wanted[key].shape],
    }  # fmt: skip
    found = [f"{kind}: {', '.join(keys)}" for kind, keys in problems.items() if keys]
    if found:
        raise UserError(f"{name} does not fit the model; {'; '.join(found)}")
    model.load_state_dict(state)


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load

            return load(path.read_bytes())
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has exceptions of its own
        reason = next(iter(str(error).splitlines()), repr(error))
        raise UserError(f"cannot read weights from {path}: {reason}") from error


def _state_dict(found: Any, name: str) -> dict[str, torch.Tensor]:
    """The mapping of names to tensors inside what a file holds."""
    while isinstance(found, Mapping):
        inside = next((found[key] for key in _WRAPPERS if isinstance(found.get(key), Mapping)), None)
        if inside is None:
            break
        found = inside
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise UserError(f"{name} holds no state_dict: expected names with tensors, at the top or under {_WRAPPERS}")
    return dict(found)


def _without_prefixes(state: dict[str, torch.Tensor], wanted: set[str]) -> dict[str, torch.Tensor]:
    """Takes wrappers' prefixes off while all keys share one and the keys do not fit yet."""
    while not wanted & state.keys():
        prefix = next((p for p in PREFIXES if all(key.startswith(p) for key in state)), None)
        if prefix is None:
            break
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state
