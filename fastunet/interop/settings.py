"""What a graph hangs on besides the layers that it calls, noted when it was made, to be compared in each call."""

from __future__ import annotations

from typing import Any

from torch import nn

from fastunet.interop.trace import Reads, inlined, layer_kind
from fastunet.interop.values import frozen, globals_of, read_global

State = tuple[tuple[str, ...], type, tuple[tuple[str, type], ...], tuple[tuple[str, Any], ...]]


def states(root: nn.Module, kept: set[nn.Module], reads: Reads) -> tuple[State, ...]:
    """What the graph of ``root`` hangs on: of each module in it that is no layer its class, children and settings."""
    found = []
    for path, module in inlined(root, kept):
        kind, d = layer_kind(module), module.__dict__
        tensors = d["_parameters"].keys() | d["_buffers"].keys()
        names = sorted({"forward"} | reads[module] - _OWN - d["_modules"].keys() - tensors)
        names += [_GLOBAL + name for name in globals_of(kind)]
        settings = tuple((name, setting(d, kind, name)) for name in names)
        found.append((tuple(path.split(".")) if path else (), kind, _children(module), settings))
    return tuple(found)


_OWN = {*vars(nn.Module()), *dir(nn.Module), "parametrizations"}
_GLOBAL = "the global "
def setting(d: dict[str, Any], kind: type, name: str) -> Any:
    """What the attribute ``name`` of a module with the dictionary ``d`` says, to be compared later."""
    if name.startswith(_GLOBAL):
        return frozen(read_global(kind, name.removeprefix(_GLOBAL)))
    return frozen(d[name] if name in d else getattr(kind, name, None))


def _children(module: nn.Module) -> tuple[tuple[str, type], ...]:
    return tuple((name, type(None) if child is None else layer_kind(child)) for name, child in module._modules.items())
