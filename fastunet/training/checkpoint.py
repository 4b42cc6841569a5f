"""Checkpoints: weights with the facts needed to use them, and the full state from which a run continues exactly.

Every checkpoint is one safetensors file, written whole (temporary file, fsync, rename), so that a crash at any moment
leaves the previous one, and weights and optimiser state can never come from different moments.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from fastunet.errors import UserError
from fastunet.files import write_bytes

BEST, LAST, STATE = "best.safetensors", "last.safetensors", "state.safetensors"
_CARD_KEY, _STATE_KEY = "fastunet", "fastunet_state"


@dataclass(frozen=True)
class ModelCard:
    """What it takes to use a network's weights: its constructor arguments, and how its inputs and labels were made.

    ``labels`` holds the label table: ``values`` (the file value of each class), ``class_names`` and ``regions``
    (name → class indices). ``images``: trained on 2-D images, which are normalised over all pixels, zeros too.
    """

    model: dict
    modalities: tuple[str, ...]
    labels: dict
    size: int | None = None
    axis: int = 2
    training: dict = field(default_factory=dict)
    images: bool = False

    @property
    def class_names(self) -> list[str]:
        """Names by class index."""
        return list(self.labels["class_names"])


@dataclass
class Progress:
    """How far a run is: the next batch to take is number ``batch`` of epoch ``epoch`` (both from 0).

    ``loss_sum`` adds up the losses of the epoch's batches so far; ``history`` has a row per finished epoch;
    ``fingerprint`` identifies the data, so that a run cannot continue on other cases.
    """

    epoch: int = 0
    batch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    seconds: float = 0.0
    waited: float = 0.0
    best: float = -1.0
    history: list[dict] = field(default_factory=list)
    fingerprint: str = ""


def save_weights(path: Path, model: torch.nn.Module, card: ModelCard) -> None:
    """Writes ``model``'s state dict and ``card`` to one safetensors file."""
    write_bytes(path, _serialise(model.state_dict(), {_CARD_KEY: json.dumps(asdict(card))}))


def load_model(path: str | Path, *, backend: str = "auto") -> tuple[torch.nn.Module, ModelCard]:
    """The network in evaluation mode and its card, from a checkpoint file or a run folder (its best, else its last).

    Raises:
        UserError: nothing there, not a whole safetensors file, no card, or weights of another architecture.
    """
    import fastunet

    path = checkpoint_file(path)
    tensors, metadata = _read(path)
    try:
        fields = json.loads(metadata[_CARD_KEY])
        card = ModelCard(**fields | {"modalities": tuple(fields["modalities"])})
        model = fastunet.UNet(**card.model, backend=backend)
    except KeyError as error:
        raise UserError(f"{path} is not a fastunet checkpoint: its metadata lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} describes a network that this version cannot build: {error}") from error
    load_weights(model, tensors, path)
    return model.eval(), card


def load_weights(model: torch.nn.Module, tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Copies ``tensors`` into ``model``; names that differ or shapes that do not fit are a ``UserError``."""
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "lacks" if name in expected else "has an unexpected"
        raise UserError(f"{path} holds weights of another architecture: it {problem} {name}")
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            found, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
            raise UserError(f"{path} holds weights of another architecture: {name} is {found}, expected {wanted}")
    model.load_state_dict(tensors)


def save_state(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
) -> None:
    """Writes everything from which training continues bit for bit: weights, optimiser, loss scale and progress.

    Random numbers need no state: each batch seeds its own (see :func:`fastunet.training.loop.batch_seed`).
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{slot}.{name}"] = value
    state = {"progress": asdict(progress), "scaler": scaler.state_dict()}
    write_bytes(path, _serialise(tensors, {_STATE_KEY: json.dumps(state)}))


def load_state(
    path: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler
) -> Progress:
    """Restores what :func:`save_state` wrote into the given objects and returns the progress.

    Raises:
        UserError: the file is truncated, is no training state, or belongs to another architecture.
    """
    tensors, metadata = _read(path)
    if _STATE_KEY not in metadata:
        raise UserError(f"{path} holds no training state")
    state = json.loads(metadata[_STATE_KEY])
    weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
    load_weights(model, weights, path)
    parameters = dict(model.named_parameters())
    for key, value in tensors.items():
        kind, _, rest = key.partition(".")
        if kind == "optimizer":
            slot, _, name = rest.partition(".")
            parameter = parameters[name]
            # Moments keep the memory layout of their parameter, step counts only its device.
            like = parameter if value.shape == parameter.shape else value.to(parameter.device)
            optimizer.state[parameter][slot] = torch.empty_like(like, requires_grad=False).copy_(value)
    scaler.load_state_dict(state["scaler"])
    return Progress(**state["progress"])


def checkpoint_file(path: str | Path) -> Path:
    """The file that :func:`load_model` reads for ``path``; a run folder without any is a ``UserError``."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in (BEST, LAST):
        if (path / name).is_file():
            return path / name
    raise UserError(f"{path} holds no checkpoint ({BEST} or {LAST})")


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except FileNotFoundError as error:
        raise UserError(f"there is no checkpoint {path}") from error
    except OSError as error:
        raise UserError(f"cannot read the checkpoint {path}: {error}") from error
    except safetensors.SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file: {error}") from error


def _serialise(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> bytes:
    packed = {name: tensor.detach().to("cpu", memory_format=torch.contiguous_format).contiguous()
              for name, tensor in tensors.items()}  # fmt: skip
    return safetensors.torch.save(packed, metadata)
