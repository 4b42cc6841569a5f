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
_unwrap = core._unwrap_if_constexpr
_PLAIN = frozenset({core.tensor, core.dtype, core.block_type, bool, int, float, str, type(None)})
_semantic = interpreter.interpreter_semantic
_broadcast, _operands = _semantic.broadcast_impl_value, _semantic.binary_op_type_checking_impl


@functools.cache
def _block(element: Any, shape: tuple[int, ...]) -> dict[str, Any]:
    """The attributes of a block's type, and those that a tensor of it has by its shape."""
    found = object.__new__(core.block_type)
    _block_type(found, element, list(shape))
    return {**vars(found), "of_tensors": _shape(shape)}


@functools.cache
def _common(lhs: tuple[int, ...], rhs: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape to which blocks of two are broadcast, if those have as many dimensions and fit, or one is a scalar."""
    if not lhs or not rhs:
        return lhs or rhs
    fit = len(lhs) == len(rhs) and all(a == b or 1 in (a, b) for a, b in zip(lhs, rhs))
    return tuple(max(sides) for sides in zip(lhs, rhs)) if fit else None


@functools.cache
def _shape(sizes: tuple[int, ...]) -> dict[str, Any]:
    """The attributes of a tensor that follow from its shape."""
    shape = core.tuple([core.constexpr(size) for size in sizes])
    return {"shape": shape, "numel": core.constexpr(math.prod(sizes)), "sizes": sizes}


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
    own = vars(self)
    own.update(vars(type).get("of_tensors") or _shape(tuple(type.shape.values) if type.is_block() else ()))


def _get_np_dtype(kind: Any) -> Any:
    """As its own, which makes a table of all types at every call."""
    kind = kind.scalar
    return interpreter.np.dtype("uint64") if kind.is_ptr() else _np_dtype(kind)


def _unwrap_if_constexpr(value: Any) -> Any:
    """As its own, which asks first whether it is a list or a tuple."""
    kind = type(value)
    return value.value if kind is core.constexpr else value if kind in _PLAIN else _unwrap(value)


def _broadcast_impl_value(lhs: Any, rhs: Any) -> tuple[Any, Any]:
    """As its own, which compares size by size; equal shapes are one object here."""
    if lhs.shape is rhs.shape:
        return lhs, rhs
    if shape := _common(lhs.sizes, rhs.sizes):
        return _stretched(lhs, shape), _stretched(rhs, shape)
    return _broadcast(lhs, rhs)


def _stretched(value: Any, shape: tuple[int, ...]) -> Any:
    if value.sizes == shape:
        return value
    data = interpreter.np.empty(shape, value.handle.data.dtype)
    data[...] = value.handle.data
    return core.tensor(interpreter.TensorHandle(data, value.dtype), core.block_type(value.dtype, list(shape)))


def _binary_op_type_checking_impl(lhs: Any, rhs: Any, *allowed: bool, **options: bool) -> Any:
    """As its own, which asks ten questions to keep two of one type, and to take an integer in the type of the other."""
    # pointers may not be allowed, and float16 is divided in float32: the fourth of the flags
    if type(lhs) is core.tensor and not lhs.dtype.is_ptr() and len(allowed) < 4 and "div_or_mod" not in options:
        if type(rhs) is int and lhs.dtype.name in ("int32", "int64", "fp32") and abs(rhs) < 2**31:
            rhs = _semantic.scalar_constant(rhs, lhs.dtype)
        if type(rhs) is core.tensor and lhs.dtype is rhs.dtype:
            return _broadcast_impl_value(lhs, rhs)
    return _operands(lhs, rhs, *allowed, **options)


def _materialize_pointers(self: Any, offsets: list[Any]) -> tuple[Any, Any]:
    """As its own, which adds each dimension's offsets to all of the block."""
    scalar, np = self.base.dtype.element_ty, interpreter.np
    itemsize = scalar.primitive_bitwidth // 8
    assert (offsets[-1].data * itemsize) % 16 == 0, "block offset start must be 16-byte aligned"
    pointers, inside = self.base.data[0], np.True_
    for offset, stride, bound, length in zip(offsets, self.strides, self.shape, self.block_shape, strict=True):
        places = offset.data + np.arange(length)
        pointers = pointers[..., None] + (itemsize * places * stride.data).astype(np.uint64)
        inside = inside[..., None] & (places >= 0) & (places < bound.data)
    return interpreter.TensorHandle(pointers, self.base.dtype.scalar), interpreter.TensorHandle(inside, tl.int1)


def _create_and(self: Any, lhs: Any, rhs: Any) -> Any:
    """As its own, which takes masks to integers and back, as sums of them need it."""
    return interpreter.TensorHandle(lhs.data & rhs.data, lhs.dtype.scalar)


def _create_addptr(self: Any, ptr: Any, offset: Any) -> Any:
    """As its own, which makes three arrays."""
    places = offset.data.astype(interpreter.np.uint64)
    places *= max(1, ptr.get_element_ty().primitive_bitwidth // 8)
    places += ptr.data
    return interpreter.TensorHandle(places, ptr.dtype)


def _patch_attr(owner: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """As its own, without the wrapper in which a function of the language asks whether a kernel calls it."""
    inner = getattr(member, "__wrapped__", member)

    def call(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **{**kwargs, "_semantic": _semantic})

    scope.set_attr(owner, name, call)


def _patched(function: Any) -> Any:
    return interpreter._LangPatchScope()


@contextlib.contextmanager
def brisk() -> Iterator[None]:
    """Inside, the language is patched once and not at every launch and every call of a function, and int32 sums are not
    repeated in int64 (that comparison counts with ``debug`` alone, which is off)."""
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    with mock.patch.object(interpreter, "_patch_attr", _patch_attr):
        scope = interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": core}))
    try:
        with (
            mock.patch.object(interpreter.interpreter_builder, "options", options),
            mock.patch.object(interpreter, "_patch_lang", _patched),
            mock.patch.object(interpreter, "_get_np_dtype", _get_np_dtype),
            mock.patch.object(core.block_type, "__init__", _init_block_type),
            mock.patch.object(core.tensor, "__init__", _init_tensor),
            mock.patch.object(core.dtype, "__eq__", lambda self, other: self is other or _equal(self, other)),
            mock.patch.object(interpreter.InterpreterBuilder, "create_and", _create_and),
            mock.patch.object(interpreter.InterpreterBuilder, "create_addptr", _create_addptr),
            mock.patch.object(interpreter.TensorDescHandle, "materialize_pointers", _materialize_pointers),
            mock.patch.object(core, "_unwrap_if_constexpr", _unwrap_if_constexpr),
            mock.patch.object(core.dtype, "__hash__", lambda self: hash(self.name)),
            mock.patch.object(_semantic, "broadcast_impl_value", _broadcast_impl_value),
            mock.patch.object(_semantic, "binary_op_type_checking_impl", _binary_op_type_checking_impl),
            mock.patch.object(_semantic, "computation_type_impl", functools.cache(_semantic.computation_type_impl)),
        ):
            yield
    finally:
        scope.restore()
