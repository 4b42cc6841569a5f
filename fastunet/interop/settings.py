"""What a graph hangs on besides the layers that it calls, noted when it was made, to be compared in each call."""

from __future__ import annotations

import argparse
import dataclasses
import enum
import functools
import numbers
import types
from typing import Any

import torch
from torch import nn

from fastunet.interop.trace import Reads, inlined, layer_kind

State = tuple[tuple[str, ...], type, tuple[tuple[str, type], ...], tuple[tuple[str, Any], ...]]


def states(root: nn.Module, kept: set[nn.Module], reads: Reads) -> tuple[State, ...]:
    """What the graph of ``root`` hangs on: of each module in it that is no layer its class, children and settings."""
    found = []
    for path, module in inlined(root, kept):
        kind, d = layer_kind(module), module.__dict__
        tensors = d["_parameters"].keys() | d["_buffers"].keys()
        names = sorted({"forward"} | reads[module] - _OWN - d["_modules"].keys() - tensors)
        settings = tuple((name, setting(d, kind, name)) for name in names)
        found.append((tuple(path.split(".")) if path else (), kind, _children(module), settings))
    return tuple(found)


_OWN = {*vars(nn.Module()), *dir(nn.Module), "parametrizations"}
_VALUES = {bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType, torch.dtype}
_RECORDS = (types.SimpleNamespace, argparse.Namespace)


def setting(d: dict[str, Any], kind: type, name: str) -> Any:
    """What the attribute ``name`` of a module with the dictionary ``d`` says, to be compared later."""
    return _frozen(d[name] if name in d else getattr(kind, name, None))


def _frozen(value: Any) -> Any:
    """``value`` with all that it contains as tuples; of other objects than values and plain records the class alone."""
    if type(value) in _VALUES or isinstance(value, numbers.Number | type | enum.Enum | str):
        return value
    if isinstance(value, list | tuple):
        return tuple(map(_frozen, value))
    if isinstance(value, dict):
        return tuple((key, _frozen(one)) for key, one in value.items())
    if isinstance(value, functools.partial):
        return _frozen((value.func, value.args, value.keywords))
    if isinstance(value, _RECORDS) or dataclasses.is_dataclass(value):
        return type(value), _frozen(vars(value))
    return type(value)


def _children(module: nn.Module) -> tuple[tuple[str, type], ...]:
    return tuple((name, type(None) if child is None else layer_kind(child)) for name, child in module._modules.items())
