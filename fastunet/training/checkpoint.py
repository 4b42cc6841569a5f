"""Checkpoints: weights with the facts needed to use them, and the full state from which a run continues exactly.

Every checkpoint is one safetensors file, written whole (temporary file, fsync, rename), so that a crash at any moment
leaves the previous one, and weights and optimiser state can never come from different moments. It carries a digest of
all that it holds, which is checked when it is read, and never a value that is not finite.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
import torch

from fastunet.data import LabelMap
from fastunet.errors import UserError
from fastunet.schema import parse_json, to_type
from fastunet.training.results import Row, judged_by
from fastunet.training.tensor_file import read_tensors, write_tensors
from fastunet.unet import UNet

BEST, LAST, STATE = "best.safetensors", "last.safetensors", "state.safetensors"
_CARD_KEY, _STATE_KEY = "fastunet", "fastunet_state"
_SLOTS = frozenset({"step", "exp_avg", "exp_avg_sq"})  # what Adam keeps for each parameter

Count = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
Millimetres = Annotated[float, msgspec.Meta(gt=0)]


@dataclass(frozen=True)
class ModelCard:
    """What it takes to use a network's weights: its constructor arguments, and how its inputs and labels were made.

    ``labels`` holds the label table: ``values`` (the file value of each class), ``class_names`` and ``regions``
    (name → class indices). ``images``: trained on 2-D images, which are normalised over all pixels, zeros too.
    ``spacing``: the millimetres per pixel (rows, columns) to which slices are resampled, None if they are not.
    ``flips``: the image axes, -2 or -1, along which training mirrored slices.
    ``regions``: the outputs are sigmoids of the regions, painted as ``labels`` orders them, not a softmax of classes.
    """

    model: dict[str, Any]
    modalities: tuple[str, ...]
    labels: dict[str, Any]
    size: Annotated[int, msgspec.Meta(ge=1)] | None = None
    axis: Annotated[int, msgspec.Meta(ge=0, le=2)] = 2
    training: dict[str, Any] = field(default_factory=dict)
    images: bool = False
    spacing: tuple[Millimetres, Millimetres] | None = None
    flips: tuple[Literal[-2, -1], ...] = ()
    regions: bool = False

    @property
    def class_names(self) -> list[str]:
        """Names by class index."""
        return list(self.labels["class_names"])

    @property
    def label_map(self) -> LabelMap:
        """The label table; its regions have an order only if the network has outputs of them."""
        labels = LabelMap.from_dict(self.labels)
        return labels if self.regions else replace(labels, region_order=())


@dataclass
class Progress:
    """How far a run is: the next batch to take is number ``batch`` of epoch ``epoch`` (both from 0).

    ``loss_sum`` adds up the losses of the ``counted`` batches of the epoch so far, those whose loss was finite;
    ``skipped`` counts the steps that the loss scaler has skipped in a row; ``history`` has a row per finished epoch;
    ``fingerprint`` identifies the data, so that a run cannot continue on other cases.
    """

    epoch: Count = 0
    batch: Count = 0
    step: Count = 0
    loss_sum: float = 0.0
    counted: Count = 0
    skipped: Count = 0
    seconds: Seconds = 0.0
    waited: Seconds = 0.0
    best: float = -1.0
    history: list[Row] = field(default_factory=list)
    fingerprint: str = ""

    def __post_init__(self) -> None:
        if len(self.history) != self.epoch:
            raise ValueError(f"{self.epoch} epochs are done, but the log has {len(self.history)}")

    @property
    def best_epoch(self) -> int:
        """The first epoch (from 1) with the best validation Dice; 0 before there is any."""
        return next((int(row["epoch"]) for row in self.history if judged_by(row) == self.best), 0)


@dataclass(frozen=True)
class State:
    """What a training state holds beside its tensors; ``options`` are those that ``TrainConfig.fixed`` gives."""

    progress: Progress
    scaler: dict[str, int | float]
    options: dict[str, Any] = field(default_factory=dict)


def save_weights(path: Path, model: torch.nn.Module, card: ModelCard) -> None:
    """Writes ``model``'s state dict and ``card`` to one file; a value that is not finite is ``NotFinite``."""
    write_tensors(path, model.state_dict(), _CARD_KEY, asdict(card))


def load_model(path: str | Path, *, backend: str = "auto") -> tuple[UNet, ModelCard]:
    """The network in evaluation mode and its card, from a checkpoint file or a run folder (its best, else its last).

    Raises:
        UserError: nothing there, a damaged file, no card, or weights that are not finite or of another architecture.
    """
    path = checkpoint_file(path)
    tensors, metadata = read_tensors(path)
    if _CARD_KEY not in metadata:
        raise UserError(f"{path} is not a fastunet checkpoint: it does not say of which network")
    card = parse_json(metadata[_CARD_KEY], ModelCard, path)
    labels = to_type(card.labels, LabelMap, path)
    try:
        # Each level of a network has weights: a depth beyond their number would only fill the memory.
        if not 0 <= card.model.get("depth", 0) <= len(tensors):
            raise ValueError(f"its depth is {card.model['depth']}, but there are {len(tensors)} tensors")
        with torch.device("meta"):
            planned = UNet(**card.model)
        _check_weights(planned, tensors, path)
        outputs = labels.outputs if card.regions else labels.class_names
        if card.regions and not 0 < len(labels.region_order) == len(labels.regions):
            raise ValueError(f"it has {len(labels.regions)} regions, of which {len(labels.region_order)} have an order")
        if planned.architecture.num_classes != len(outputs):
            raise ValueError(f"it has {planned.architecture.num_classes} outputs and {len(outputs)} names")
        if planned.architecture.in_channels != len(card.modalities):
            raise ValueError(f"it takes {planned.architecture.in_channels} channels, named are {len(card.modalities)}")
        model = UNet(**card.model, backend=backend)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        problem = str(error).splitlines()[0]
        raise UserError(f"{path} describes a network that this version cannot build: {problem}") from error
    model.load_state_dict(tensors)
    return model.eval(), card


def save_state(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    progress: Progress,
    average: torch.nn.Module | None = None,
    options: Mapping[str, Any] | None = None,
) -> None:
    """Writes everything from which training continues bit for bit: weights, their average if there is one, optimiser,
    loss scale and progress, and the ``options`` that decided it.

    Random numbers need no state: each batch seeds its own (see :func:`fastunet.training.learner.batch_seed`).

    Raises:
        NotFinite: there is nothing to continue from.
    """
    tensors = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    if average is not None:
        tensors |= {f"average.{name}": tensor for name, tensor in average.state_dict().items()}
    for name, parameter in model.named_parameters():
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{slot}.{name}"] = value
    facts = {"progress": asdict(progress), "scaler": scaler.state_dict(), "options": dict(options or {})}
    write_tensors(path, tensors, _STATE_KEY, facts)


def load_state(
    path: Path,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    average: torch.nn.Module | None = None,
) -> Progress:
    """Restores what :func:`save_state` wrote into the given objects and returns the progress.

    Raises:
        UserError: the file is damaged, is no training state, or belongs to another architecture.
    """
    tensors, state = _read_state(path)
    found: dict[str, dict[str, torch.Tensor]] = {"model": {}, "average": {}, "optimizer": {}}
    for key, value in tensors.items():
        kind, _, name = key.partition(".")
        found.setdefault(kind, {})[name] = value
    weights, averaged, moments = found["model"], found["average"], found["optimizer"]
    if found.keys() - {"model", "average", "optimizer"} or bool(averaged) != (average is not None):
        raise UserError(f"{path} belongs to a run of other options: it holds {', '.join(k for k in found if found[k])}")
    parameters = dict(model.named_parameters())
    _check_weights(model, weights, path)
    _check_moments(parameters, moments, path)
    if average is not None:
        _check_weights(average, averaged, path)
        average.load_state_dict(averaged)
    if state.scaler.keys() != scaler.state_dict().keys():
        raise UserError(f"{path} belongs to a run of another --precision")
    model.load_state_dict(weights)
    for key, value in moments.items():
        slot, _, name = key.partition(".")
        parameter = parameters[name]
        # Moments keep the memory layout of their parameter, step counts only its device.
        like = parameter if value.shape == parameter.shape else value.to(parameter.device)
        optimizer.state[parameter][slot] = torch.empty_like(like, requires_grad=False).copy_(value)
    scaler.load_state_dict(state.scaler)
    return state.progress


def saved_options(path: Path) -> dict[str, Any]:
    """The options that :func:`save_state` wrote, none in a state of an older version; errors as in ``load_state``."""
    return _read_state(path)[1].options


def checkpoint_file(path: str | Path) -> Path:
    """The file that :func:`load_model` reads for ``path``; a run folder without any is a ``UserError``."""
    path = Path(path)
    if not os.path.isdir(path):
        return path
    for name in (BEST, LAST):
        if os.path.isfile(path / name):
            return path / name
    raise UserError(f"{path} holds no checkpoint ({BEST} or {LAST})")


def _read_state(path: Path) -> tuple[dict[str, torch.Tensor], State]:
    tensors, metadata = read_tensors(path)
    if _STATE_KEY not in metadata:
        raise UserError(f"{path} holds no training state")
    return tensors, parse_json(metadata[_STATE_KEY], State, path)


def _check_weights(model: torch.nn.Module, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    expected = model.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "lacks" if name in expected else "has an unexpected"
        raise UserError(f"{path} holds weights of another architecture: it {problem} {name}")
    for name, parameter in expected.items():
        if tensors[name].shape != parameter.shape:
            found, wanted = tuple(tensors[name].shape), tuple(parameter.shape)
            raise UserError(f"{path} holds weights of another architecture: {name} is {found}, expected {wanted}")
        if tensors[name].dtype != parameter.dtype:
            raise UserError(f"{path} holds {name} as {tensors[name].dtype}, expected {parameter.dtype}")


def _check_moments(parameters: Mapping[str, torch.Tensor], moments: Mapping[str, torch.Tensor], path: Path) -> None:
    """All of Adam's tensors for all parameters, or, before the first step, none."""
    expected = {f"{slot}.{name}" for slot in _SLOTS for name in parameters} if moments else set()
    for key in sorted(expected ^ moments.keys()):
        problem = "lacks" if key in expected else "has an unexpected"
        raise UserError(f"{path} is no whole training state: it {problem} optimizer.{key}")
    for key, value in moments.items():
        slot, _, name = key.partition(".")
        wanted = torch.Size() if slot == "step" else parameters[name].shape
        if value.shape != wanted or not value.is_floating_point():
            found = f"{tuple(value.shape)} of {value.dtype}"
            raise UserError(f"{path} is no whole training state: optimizer.{key} is {found}")
