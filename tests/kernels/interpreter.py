"""Triton's interpreter without the work whose results it throws away: tests take half the time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any
from unittest import mock

import triton.language as tl
from triton.language import core
from triton.runtime import interpreter

_np_dtype = functools.cache(interpreter._get_np_dtype)
_block_type = core.block_type.__init__
_equal = core.dtype.__eq__
_broadcast = interpreter.interpreter_semantic.broadcast_impl_value


@functools.cache
def _block(element: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """The attributes of a block's type."""
    found = object.__new__(core.block_type)
    _block_type(found, element, list(shape))
    return vars(found)


@functools.cache
def _shape(sizes: tuple[int, ...]) -> dict[str, Any]:
    """The attributes of a tensor that follow from its shape."""
    return {"shape": core.tuple([core.constexpr(size) for size in sizes]), "numel": core.constexpr(math.prod(sizes))}


def _init_block_type(self: Any, element_ty: Any, shape: Any) -> None:
    """As its own, each type once; a pointer's type has no hash."""
    if element_ty.is_ptr():
        _block_type(self, element_ty, shape)
    else:
        sizes = shape.values if isinstance(shape, core.tuple) else shape
        vars(self).update(_block(element_ty, tuple([size if type(size) is int else size.value for size in sizes])))


def _init_tensor(self: Any, handle: Any, type: Any) -> None:
    """As its own, each shape once."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    vars(self).update(_shape(tuple(type.shape.values) if type.is_block() else ()))


def _get_np_dtype(kind: Any) -> Any:
    """As its own, which makes a table of all types at every call."""
    kind = kind.scalar
    return interpreter.np.dtype("uint64") if kind.is_ptr() else _np_dtype(kind)


def _broadcast_impl_value(lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """As its own, which compares size by size; equal shapes are one object here."""
    return (lhs, rhs) if lhs.shape is rhs.shape else _broadcast(lhs, rhs)


def _patched(function: Any) -> Any:
    return interpreter._LangPatchScope()


@contextlib.contextmanager
def brisk() -> Iterator[None]:
    """Inside, the language is patched once and not at every launch and every call of a function, and int32 sums are not
    repeated in int64 (that comparison counts with ``debug`` alone, which is off)."""
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": core}))
    try:
        with (
            mock.patch.object(interpreter.interpreter_builder, "options", options),
            mock.patch.object(interpreter, "_patch_lang", _patched),
            mock.patch.object(interpreter, "_get_np_dtype", _get_np_dtype),
            mock.patch.object(core.block_type, "__init__", _init_block_type),
            mock.patch.object(core.tensor, "__init__", _init_tensor),
            mock.patch.object(core.dtype, "__eq__", lambda self, other: self is other or _equal(self, other)),
            mock.patch.object(interpreter.interpreter_semantic, "broadcast_impl_value", _broadcast_impl_value),
        ):
            yield
    finally:
        scope.restore()
