"""What Python values that are no tensors say: to be compared later, and to be put back."""

from __future__ import annotations

import enum
import functools
import logging
import numbers
import operator
import types
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

_VALUES = {bool, int, float, str, bytes, range, slice, type(None), types.BuiltinFunctionType, torch.dtype, torch.device}
_OTHERS = nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, logging.Logger
_DEEP = 6


class Missing:
    """Stands for the value of what is not there."""


def frozen(value: Any, deep: int = _DEEP) -> Any:
    """``value`` with all that it contains as tuples; of modules, tensors and PyTorch's own objects the class alone."""
    kind = type(value)
    if kind in _VALUES:
        return value
    if kind is types.FunctionType:
        around = value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__
        return (value, frozen(around, deep - 1)) if deep and any(around) and is_users(value.__module__) else value
    if isinstance(value, type):
        return (value, _attributes(value, deep)) if deep and _is_plain(value) else value
    if isinstance(value, numbers.Number | enum.Enum | str):
        return value
    if not deep:
        return kind
    parts: Any = None
    if isinstance(value, list | tuple | deque):
        parts = value
    elif isinstance(value, dict | types.MappingProxyType):
        parts = [(key, frozen(one, deep - 1)) for key, one in value.items()]
        return tuple(parts)
    elif isinstance(value, set | frozenset):
        return frozenset(frozen(one, deep - 1) for one in value)
    elif isinstance(value, types.CellType):
        return frozen(value.cell_contents, deep) if value != types.CellType() else Missing
    elif isinstance(value, functools.partial):
        parts = value.func, value.args, value.keywords
    elif isinstance(value, types.MethodType):
        parts = value.__func__, value.__self__
    elif isinstance(value, staticmethod | classmethod):
        parts = (value.__func__,)
    elif isinstance(value, property):
        parts = (value.fget,)
    elif isinstance(value, np.ndarray):
        return value.dtype.str, value.shape, value.tobytes()
    elif _is_record(value):
        parts = _own(value), kind
    return kind if parts is None else tuple(frozen(one, deep - 1) for one in parts)


def is_users(module: str | None) -> bool:
    """Whether a module of this name is neither PyTorch's nor ours."""
    return (module or "").split(".")[0] not in ("torch", "fastunet")


def _is_plain(kind: type) -> bool:
    """Whether a class is one of records: of anybody's but PyTorch's, and without numbers of its own to compute with."""
    others = nn.Module, torch.Tensor, BaseException, enum.Enum
    return is_users(kind.__module__) and kind.__module__ != "builtins" and not issubclass(kind, others)


def _is_record(value: Any) -> bool:
    """Whether the attributes of an object are all that it says."""
    if isinstance(value, _OTHERS) or not is_users(type(value).__module__):
        return False
    return hasattr(value, "__dict__") or bool(_slots_of(value))


def _slots_of(value: object) -> tuple[str, ...]:
    kind: Any = type(value)
    return _slots(kind)


@functools.cache
def _slots(kind: Any) -> tuple[str, ...]:
    own = [vars(each).get("__slots__", ()) for each in kind.__mro__]
    names = [name for one in own for name in ((one,) if isinstance(one, str) else one)]
    return tuple(name for name in names if not name.startswith("__"))


def _own(value: Any) -> list[Any]:
    """The attributes of an object, in its dictionary and in slots."""
    slots = [(name, getattr(value, name, Missing)) for name in _slots_of(value)]
    return [getattr(value, "__dict__", None), slots]


def _attributes(kind: type, deep: int) -> tuple[Any, ...]:
    """What the classes that ``kind`` inherits from, itself first, say of it."""
    plain = [vars(each) for each in kind.__mro__ if _is_plain(each)]
    pairs = [(name, frozen(one, deep - 1)) for d in plain for name, one in d.items() if not name.startswith("__")]
    return tuple(pairs)


class Kept:
    """What values have in their containers, attributes, arrays and tensors, however deep, to be put back."""

    def __init__(self, values: Iterable[Any] = ()):
        self.seen = set[int]()
        self.containers: list[tuple[Any, Any]] = []
        for value in values:
            self.keep(value)

    def keep(self, value: Any) -> None:
        """Notes ``value`` as it is now, unless it was noted before."""
        for each in _containers(value, self.seen, _DEEP):
            self.containers.append((each, _copied(each)))

    def restore(self) -> bool:
        """Puts back what has changed, and tells whether anything had."""
        changed = [(now, before) for now, before in self.containers if not _same(now, before)]
        for now, before in changed:
            if isinstance(now, torch.Tensor):
                with torch.no_grad():
                    now.copy_(before[1])
            elif isinstance(now, np.ndarray):
                now[...] = before
            elif isinstance(now, types.CellType):
                now.cell_contents = before
            elif isinstance(before, _Slots):
                for name, value in before.items():
                    setattr(now, name, value) if value is not Missing else delattr(now, name)
            else:
                now.clear()
                now.update(before) if isinstance(now, dict | set) else now.extend(before)
        return bool(changed)


class _Slots(dict[str, Any]):
    """What an object has in its slots."""


def _containers(value: Any, seen: set[int], deep: int) -> Iterator[Any]:
    """The lists, dictionaries, sets, arrays, tensors and attributes of objects in ``value``, each once."""
    if isinstance(value, types.MethodType):
        value = value.__self__
    if isinstance(value, types.FunctionType):
        around = [value.__closure__, value.__defaults__, value.__kwdefaults__] if is_users(value.__module__) else []
        value = (*around, value.__dict__)
    if value is None or id(value) in seen or not deep:
        return
    if isinstance(value, np.ndarray) or (type(value) is torch.Tensor and not value.is_inference()):
        seen.add(id(value))
        yield value
        return
    if isinstance(value, types.CellType):
        if value != types.CellType():
            seen.add(id(value))
            yield value
            yield from _containers(value.cell_contents, seen, deep - 1)
        return
    if not isinstance(value, list | tuple | dict | set | deque):
        if not _is_record(value):
            return
        if _slots_of(value):
            seen.add(id(value))
            yield value
        values = [getattr(value, name, None) for name in _slots_of(value)]
        for one in (getattr(value, "__dict__", None), *values):
            yield from _containers(one, seen, deep - 1)
        return
    if not isinstance(value, tuple):
        seen.add(id(value))
        yield value
    for one in list(value.values() if isinstance(value, dict) else value):
        yield from _containers(one, seen, deep - 1)


def _copied(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value._version, value.detach().clone()
    if isinstance(value, types.CellType):
        return value.cell_contents
    if isinstance(value, list | dict | set | deque | np.ndarray):
        return value.copy()
    return _Slots((name, getattr(value, name, Missing)) for name in _slots_of(value))


def _same(now: Any, before: Any) -> bool:
    """Whether a container holds the same objects as before."""
    if isinstance(now, torch.Tensor):
        return bool(now._version == before[0])
    if isinstance(now, np.ndarray):
        return bool(now.tobytes() == before.tobytes())
    if isinstance(now, types.CellType):
        return now.cell_contents is before
    if isinstance(before, _Slots):
        return all(getattr(now, name, Missing) is value for name, value in before.items())
    if len(now) != len(before):
        return False
    if isinstance(now, dict):
        return all(key in now and now[key] is value for key, value in before.items())
    return bool(now == before) if isinstance(now, set) else all(map(operator.is_, now, before))
