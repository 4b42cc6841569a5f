"""Triton's interpreter without the work whose results it throws away: tests take half the time."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
from collections.abc import Iterator
from typing import Any
from unittest import mock

import triton.language as tl
from triton.runtime import interpreter


@functools.cache
def _builtins(owner: Any) -> list[tuple[str, Any]]:
    """What is replaced in a module or class while a kernel runs; asked first when nothing is."""
    return [(name, member) for name, member in inspect.getmembers(owner) if tl.core.is_builtin(member)]


def _patch_builtin(owner: Any, builder: Any, scope: Any) -> None:
    """As the interpreter's own, which looks through all members at every launch and every call of a function."""
    for name, member in _builtins(owner):
        interpreter._patch_attr(owner, name, member, builder, scope)


@contextlib.contextmanager
def brisk() -> Iterator[None]:
    """Inside, int32 sums are not repeated in int64 (that comparison counts with ``debug`` alone, which is off)."""
    options = dataclasses.replace(interpreter.interpreter_builder.options, sanitize_overflow=False)
    with (
        mock.patch.object(interpreter.interpreter_builder, "options", options),
        mock.patch.object(interpreter, "_patch_builtin", _patch_builtin),
    ):
        yield
