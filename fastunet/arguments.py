"""Arguments of public functions against their annotations: what does not fit is refused in one sentence."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import os
import reprlib
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing  # what annotations name, which NumPy before 2 does not import by itself
import torch
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

Thing = TypeVar("Thing", bound=Callable[..., Any])
Problem = type[TypeError] | type[ValueError] | None
_MOST = 2**63 - 1
"""The greatest whole number that PyTorch and NumPy take."""
_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.bool, torch.uint8, torch.int8,
           torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)  # fmt: skip
"""Of real numbers: not those of complex and quantised ones, nor what is only stored, as 8-bit floating point."""


def checked(thing: Thing) -> Thing:
    """``thing``, a function or a class with its public methods, that refuses what its annotations do not allow.

    ``int`` is a whole number of at most 64 bits, ``float`` any finite number; True and False are neither, and NumPy's
    scalars become Python's. A tensor is dense and real, an array holds numbers, a path may be any ``os.PathLike``
    that a file can be called, a tuple of any length also a list, what is iterated over once becomes a tuple, and text
    is no sequence of texts. Nothing is checked under ``torch.compile``, and under ``torch.jit.trace``, for which sizes
    are tensors.

    Raises:
        TypeError: (the call) an argument of another type; the message shows it.
        ValueError: a number that is not finite or too large, a tensor or array of another kind.
    """
    if inspect.isclass(thing):
        for name, member in list(vars(thing).items()):
            # the methods of a network stay as they are, for all that traces and compiles them
            if name == "__init__" or not (name.startswith("_") or issubclass(thing, torch.nn.Module)):
                if isinstance(member, classmethod):
                    setattr(thing, name, classmethod(checked(member.__func__)))
                elif inspect.isfunction(member):
                    setattr(thing, name, checked(member))
        return thing
    names = [p.name for p in inspect.signature(thing).parameters.values() if p.kind is not p.VAR_POSITIONAL]

    @functools.cache
    def hints() -> dict[str, Any]:
        return typing.get_type_hints(thing)  # at the first call: it may name what comes later in its module

    def fitting(name: str, value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        hint = hints().get(name, Any)
        if isinstance(value, Iterator) and typing.get_origin(hint) is Iterable:
            value = tuple(value)
        problem = mismatch(value, hint)
        if problem is not None:
            where = thing.__qualname__.split("._")[0]  # a class, for what it does for itself
            raise problem(f"{where}: {name} is {_shown(value)}; expected {thing.__annotations__[name]}")
        return value

    @functools.wraps(thing)
    def call(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing():  # type: ignore[no-untyped-call, attr-defined]
            return thing(*args, **kwargs)
        args = *map(fitting, names, args), *args[len(names) :]
        return thing(*args, **{name: fitting(name, value) for name, value in kwargs.items()})

    # torch.compile counts recompilations by code object, which all calls would share
    function: Any = call
    function.__code__ = function.__code__.replace(co_name=thing.__name__)
    return cast(Thing, function)


def mismatch(value: object, hint: Any) -> Problem:
    """The error that ``value`` deserves where ``hint`` is asked for, or None if it fits."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if Path in inner and isinstance(value, str | os.PathLike):
            return _path(value)
        found = [mismatch(value, one) for one in inner]
        return None if None in found else ValueError if ValueError in found else TypeError
    kind = dict if typing.is_typeddict(hint) else origin or hint
    if kind in _RULES:
        return _RULES[kind](value)
    if kind is Any or not isinstance(kind, type):
        return None
    accepted = (kind, list) if kind is tuple and Ellipsis in inner else kind
    if not isinstance(value, accepted) or (isinstance(value, (str, bytes)) and issubclass(kind, Iterable)):
        return TypeError if kind not in (str, bytes) or not isinstance(value, kind) else None
    if isinstance(value, Mapping) and inner:
        return _first(mismatch(each, part) for pair in value.items() for each, part in zip(pair, inner))
    if isinstance(value, tuple) and kind is tuple and inner and Ellipsis not in inner:
        return ValueError if len(value) != len(inner) else _first(map(mismatch, value, inner))
    if isinstance(value, Collection) and inner and issubclass(kind, Iterable):
        if getattr(value, "ndim", 1) == 0:  # a tensor or array of one number has nothing to go through
            return TypeError
        return _first(mismatch(each, inner[0]) for each in value)
    return None


def _first(problems: Iterable[Problem]) -> Problem:
    return next((problem for problem in problems if problem is not None), None)


def _whole(value: object) -> Problem:
    if isinstance(value, torch.SymInt):
        return None
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Integral):
        return TypeError
    return None if abs(int(value)) <= _MOST else ValueError


def _real(value: object) -> Problem:
    if isinstance(value, numbers.Integral):
        return _whole(value)
    if not isinstance(value, numbers.Real):
        return TypeError
    try:
        return None if math.isfinite(value) else ValueError
    except OverflowError:  # a fraction
        return ValueError


def _tensor(value: object) -> Problem:
    if not isinstance(value, torch.Tensor):
        return TypeError
    return None if is_dense(value) else ValueError


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` holds numbers that PyTorch's operators compute with, each in its place in memory."""
    if isinstance(tensor, UninitializedTensorMixin) or tensor.is_nested:
        return False
    return tensor.layout == torch.strided and tensor.dtype in _DTYPES


def _path(value: str | os.PathLike[str]) -> Problem:
    try:
        return ValueError if b"\0" in os.fsencode(value) else None
    except UnicodeEncodeError:
        return ValueError


def _array(value: object) -> Problem:
    if not isinstance(value, np.ndarray):
        return TypeError
    return None if value.dtype.kind in "biuf" else ValueError


_RULES: dict[Any, Callable[[object], Problem]] = {
    int: _whole,
    float: _real,
    bool: lambda value: None if isinstance(value, bool | np.bool_) else TypeError,
    torch.Tensor: _tensor,
    np.ndarray: _array,
    Path: lambda value: _path(value) if isinstance(value, os.PathLike) else TypeError,
    object: lambda value: None,
}


_SHORT = reprlib.Repr()
_SHORT.maxlevel = 2  # six of each of six levels would be thousands


def _shown(value: object) -> str:
    """``value`` in a few words."""
    if isinstance(value, UninitializedTensorMixin):
        return f"a tensor without a shape, {type(value).__name__}"
    if isinstance(value, torch.Tensor):
        shape = "nested" if value.is_nested else f"shape {tuple(value.shape)}"
        return f"a tensor of {value.dtype}, {value.layout}, {shape}"
    if isinstance(value, np.ndarray):
        return f"an array of {value.dtype}, shape {value.shape}"
    if isinstance(value, torch.nn.Module):  # which tells itself in a line for each layer
        return f"a module, {type(value).__name__}"
    return " ".join(_SHORT.repr(value).split())  # a table, say, takes many lines
