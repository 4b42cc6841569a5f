"""What a graph hangs on besides the layers that it calls, noted when it was made, to be compared in each call."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastunet.interop.trace import Reads, inlined, layer_kind
from fastunet.interop.values import Missing, frozen

State = tuple[tuple[str, ...], type, tuple[tuple[str, type], ...], tuple[tuple[str, Any], ...]]


def states(root: nn.Module, kept: set[nn.Module], reads: Reads) -> tuple[State, ...]:
    """What the graph of ``root`` hangs on: of each module in it that is no layer its class, children and settings."""
    found = []
    for path, module in inlined(root, kept):
        kind, d = layer_kind(module), module.__dict__
        names = sorted({"forward"} | reads[module] - _OWN - d["_modules"].keys())
        settings = tuple((name, setting(d, kind, name)) for name in names)
        found.append((tuple(path.split(".")) if path else (), kind, _children(module), settings))
    return tuple(found)


_OWN = {*vars(nn.Module()), *dir(nn.Module), "parametrizations"}


def setting(d: dict[str, Any], kind: type, name: str) -> Any:
    """What the attribute ``name`` of a module with the dictionary ``d`` says, to be compared later."""
    if name in d:
        return frozen(d[name])
    for tensors in (d["_parameters"], d["_buffers"]):
        if name in tensors:
            return tensors[name] is None
    return frozen(getattr(kind, name, Missing))


def _children(module: nn.Module) -> tuple[tuple[str, type], ...]:
    return tuple((name, type(None) if child is None else layer_kind(child)) for name, child in module._modules.items())
