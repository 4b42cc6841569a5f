"""Committed winners: which configuration a kernel uses on a GPU where the offline search has been run.

``kernels/tuned/<gpu>.json`` holds one file per GPU model (format in ``kernels/tuned/README.md``); a key that is not in
it keeps the kernel's own heuristic.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import pathlib
import re
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from . import _launch

FOLDER = pathlib.Path(__file__).parent / "tuned"
Config = TypeVar("Config")
Entry = tuple[str, tuple]
"""(kernel name, key with dtypes as names): what a row of a file is found by."""


@dataclasses.dataclass
class _State:
    told: str | None = None
    forced: dict[Entry, Any] = dataclasses.field(default_factory=dict)
    asked: dict[Entry, list[Any]] | None = None
    found: dict[str | None, dict[Entry, Any]] = dataclasses.field(default_factory=dict)
    kept: set[tuple[str | None, Entry]] = dataclasses.field(default_factory=set)


_state = _State()


def choose(kernel: str, key: tuple, cls: type[Config], heuristic: Callable[[], Config],
           usable: Callable[[Config], bool] | None = None,
           others: Callable[[], list[Config]] | None = None) -> Config:
    """The committed winner of ``kernel`` for ``key`` on the current GPU, if there is one that is ``usable``; else
    ``heuristic()``. A search starts from that and from ``others()``, usable configurations of other kinds.

    ``key`` is the launcher's bucketed key: numbers, strings, booleans and dtypes. In the interpreter and inside
    ``_launch.recording`` there is no GPU and so no table, unless :func:`using` names one.

    Raises:
        ValueError: the file of this GPU, or its row for this key, cannot be used; names the file and the row. Or the
            configuration that a search forces is not usable.
    """
    entry = (kernel, normal(key))
    if _state.asked is not None and entry not in _state.asked:
        _state.asked[entry] = [heuristic(), *(others() if others else ())]
    if entry in _state.forced:
        if usable is not None and not usable(_state.forced[entry]):
            raise ValueError(f"{kernel} cannot use {_state.forced[entry]} for {entry[1]}")
        return _state.forced[entry]
    found = lookup(kernel, key, cls)
    return heuristic() if found is None or (usable is not None and not usable(found)) else found


def lookup(kernel: str, key: tuple, cls: type[Config]) -> Config | None:
    """The committed winner of ``kernel`` for ``key`` on the current GPU, or None; see :func:`choose`."""
    entry = (kernel, normal(key))
    slug = _slug()
    if slug is None:
        return None
    found = _state.found.setdefault(slug, {})
    if entry not in found:
        config = _table(slug).get(entry)
        found[entry] = None if config is None else build(cls, config, f"{slug}.json, {kernel} {list(entry[1])}")
    return found[entry]


def normal(key: tuple) -> tuple:
    """``key`` with every dtype replaced by its name, as a JSON file holds it."""
    return tuple(str(part).removeprefix("torch.") if isinstance(part, torch.dtype) else part for part in key)


def build(cls: type[Config], values: dict[str, Any], where: str) -> Config:
    """``cls(**values)``; a ValueError that starts with ``where`` if these are not the fields and types of ``cls``."""
    hints = typing.get_type_hints(cls)
    names = {f.name for f in dataclasses.fields(cls)}
    required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
    if not required <= set(values) <= names:
        raise ValueError(f"{where}: fields {sorted(values)} do not make a {cls.__name__}, which has {sorted(names)}")
    for name, value in values.items():
        hint = hints[name]
        allowed = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        if type(value) not in allowed:
            raise ValueError(f"{where}: {name} is {value!r}, not of type {hint}")
    return cls(**values)


def slug_of(device_name: str) -> str:
    """The file stem of a GPU: "NVIDIA H100 80GB HBM3" → "nvidia-h100-80gb-hbm3"."""
    return re.sub(r"[^a-z0-9]+", "-", device_name.lower()).strip("-")


def read(path: pathlib.Path) -> dict[str, Any]:
    """A winners' file as its JSON object, checked.

    Raises:
        ValueError: it is not JSON or not in the format of ``kernels/tuned/README.md``; names the file and the row.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    head = {"device": str, "architecture": int, "rows": list}
    if not isinstance(content, dict) or any(not isinstance(content.get(k), t) for k, t in head.items()):
        raise ValueError(f"{path} must be an object with device (string), architecture (number) and rows (list)")
    for i, row in enumerate(content["rows"]):
        fields = {"kernel": str, "key": list, "config": dict, "versions": dict, "commit": str}
        if not isinstance(row, dict) or any(not isinstance(row.get(k), t) for k, t in fields.items()):
            raise ValueError(f"{path}, row {i}: expected {', '.join(f'{k} ({t.__name__})' for k, t in fields.items())}")
    return content


def files() -> list[pathlib.Path]:
    """Every committed winners' file."""
    return sorted(FOLDER.glob("*.json"))


def keep(entry: Entry, config: Any) -> None:
    """Takes ``config`` for ``entry`` from now on, on the current GPU and in this process."""
    _state.found.setdefault(_slug(), {})[entry] = config
    _state.kept.add((_slug(), entry))


def is_kept(entry: Entry) -> bool:
    """Whether :func:`keep` has settled ``entry`` for the current GPU."""
    return (_slug(), entry) in _state.kept


@contextlib.contextmanager
def using(slug: str | None) -> Iterator[None]:
    """Takes the winners of the GPU ``slug`` whatever device is there; for ahead-of-time checks."""
    previous, _state.told = _state.told, slug
    try:
        yield
    finally:
        _state.told = previous


@contextlib.contextmanager
def asking() -> Iterator[dict[Entry, list[Any]]]:
    """Collects which entries the launchers choose, each with the starts of a search, the heuristic's choice first."""
    previous, _state.asked = _state.asked, {}
    try:
        yield _state.asked
    finally:
        _state.asked = previous


@contextlib.contextmanager
def forcing(entry: Entry, config: Any) -> Iterator[None]:
    """Answers ``entry`` with ``config``; how a search tries its candidates through the unchanged launchers."""
    previous = dict(_state.forced)
    _state.forced[entry] = config
    try:
        yield
    finally:
        _state.forced = previous


def observed() -> bool:
    """Whether choices are collected, forced or those of another GPU."""
    return _state.asked is not None or bool(_state.forced) or _state.told is not None


def _slug() -> str | None:
    if _state.told is not None:
        return _state.told
    if _launch.INTERPRETED or _launch.thread.architecture is not None:
        return None
    return _device_slug(torch.cuda.current_device())


@functools.cache
def _device_slug(index: int) -> str:
    return slug_of(torch.cuda.get_device_name(index))


@functools.cache
def _table(slug: str) -> dict[Entry, dict[str, Any]]:
    path = FOLDER / f"{slug}.json"
    if not path.exists():
        return {}
    return {(row["kernel"], tuple(row["key"])): row["config"] for row in read(path)["rows"]}
