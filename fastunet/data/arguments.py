"""Validation at the public functions of ``fastunet.data``: one sentence that shows the offending value."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Iterable
from typing import Any

import numpy as np


def expect(value: object, kind: type | tuple[type, ...], name: str) -> Any:
    """``value``; raises ``TypeError`` unless it is a ``kind``."""
    if not isinstance(value, kind):
        wanted = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"{name} is {reprlib.repr(value)}; expected {wanted}")
    return value


def expect_all(values: Iterable, kind: type, name: str) -> list:
    """``values`` as a list; raises ``TypeError`` unless each is a ``kind``."""
    expect(values, Iterable, name)
    return [expect(value, kind, f"an element of {name}") for value in values]


def expect_flag(value: object, name: str) -> bool:
    """``value``; raises ``TypeError`` unless it is true or false."""
    return bool(expect(value, (bool, np.bool_), name))


def slice_size(size: Any) -> tuple[int, int]:
    """(height, width) of an integer or a pair of them; raises ``ValueError`` for anything else."""
    try:
        sides = (size, size) if np.ndim(size) == 0 else tuple(size)
        height, width = (operator.index(side) for side in sides)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"the slice size is {reprlib.repr(size)}; expected a whole number or two") from None
    return height, width
