"""What Python values that are no tensors say: to be compared later, and to be put back."""

from __future__ import annotations

import enum
import functools
import inspect
import numbers
import operator
import types
from collections import deque
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_VALUES = {bool, int, float, str, type(None), types.FunctionType, types.BuiltinFunctionType, torch.dtype}
_OTHERS = nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType, types.MethodType
_DEEP = 6


def frozen(value: Any, deep: int = _DEEP) -> Any:
    """``value`` with all that it contains as tuples; of modules, tensors and PyTorch's own objects the class alone."""
    if type(value) in _VALUES or isinstance(value, numbers.Number | type | enum.Enum | str):
        return value
    if not deep:
        return type(value)
    if isinstance(value, list | tuple):
        return tuple(frozen(one, deep - 1) for one in value)
    if isinstance(value, dict):
        return tuple((key, frozen(one, deep - 1)) for key, one in value.items())
    if isinstance(value, functools.partial):
        return frozen((value.func, value.args, value.keywords), deep - 1)
    return (type(value), frozen(vars(value), deep - 1)) if _is_record(value) else type(value)


def _is_record(value: Any) -> bool:
    """Whether the attributes of an object are all that it says."""
    own = type(value).__module__.split(".")[0] != "torch"
    return own and not isinstance(value, _OTHERS) and hasattr(value, "__dict__")


def forward_of(kind: type) -> types.FunctionType | None:
    """The function that a class of modules runs, without its decorators."""
    forward: Any = getattr(kind, "forward", None)
    forward = inspect.unwrap(getattr(forward, "followed", forward))
    return forward if isinstance(forward, types.FunctionType) else None


def globals_of(kind: type) -> tuple[str, ...]:
    """The names that the forward pass of a class of modules reads in its file or from around it, but for modules."""
    forward = forward_of(kind)
    if forward is None:
        return ()
    names = [name for name in forward.__code__.co_names if name in forward.__globals__]
    names += [name for name in forward.__code__.co_freevars if name != "__class__"]
    return tuple(name for name in names if not isinstance(read_global(kind, name), types.ModuleType))


def read_global(kind: type, name: str) -> Any:
    """What such a name says now."""
    forward = forward_of(kind)
    if forward is None or name not in forward.__code__.co_freevars:
        return None if forward is None else forward.__globals__.get(name)
    try:
        return forward.__closure__[forward.__code__.co_freevars.index(name)].cell_contents  # type: ignore[index]
    except ValueError:  # it is not set yet
        return None


class Kept:
    """What a module has in its attributes, and in objects that its forward pass reads by name, however deep."""

    def __init__(self, module: nn.Module):
        self.containers: list[tuple[Any, Any]] = []
        seen = set[int]()
        kind = type(module)
        for value in (module.__dict__, *(read_global(kind, name) for name in globals_of(kind))):
            for each in _containers(value, seen, _DEEP):
                self.containers.append((each, each.copy()))

    def restore(self) -> bool:
        """Puts back what has changed, and tells whether anything had."""
        changed = [(now, before) for now, before in self.containers if not _same(now, before)]
        for now, before in changed:
            now.clear()
            now.update(before) if isinstance(now, dict | set) else now.extend(before)
        return bool(changed)


def _containers(value: Any, seen: set[int], deep: int) -> Iterator[Any]:
    """The lists, dictionaries, sets and attributes of objects in ``value``, each once."""
    if not isinstance(value, list | tuple | dict | set | deque):
        value = vars(value) if _is_record(value) else None
    if value is None or id(value) in seen or not deep:
        return
    seen.add(id(value))
    if not isinstance(value, tuple | types.MappingProxyType):
        yield value
    for one in list(value.values() if isinstance(value, dict) else value):
        yield from _containers(one, seen, deep - 1)


def _same(now: Any, before: Any) -> bool:
    """Whether a container holds the same objects as before."""
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(key in now and now[key] is value for key, value in before.items())
    return now == before if isinstance(now, set) else all(map(operator.is_, now, before))
