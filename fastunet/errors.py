"""What users are told: ``UserError`` for input that is wrong, ``DataWarning`` for input that is odd."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any


class UserError(ValueError):
    """Bad input, described in one sentence that names the file, shape or value; the command line exits with 2."""


Refusal = Callable[[str], Any]
"""What is called with a sentence about one case among many: ``refuse``, or the ``append`` of a list of problems."""


def refuse(text: str) -> None:
    """Raises ``UserError(text)``."""
    raise UserError(text)


class DataWarning(UserWarning):
    """Input that is usable but not as its writer meant it, in one sentence; the command line prints it on stderr."""


_said: set[str] = set()


def warn_once(kind: str, text: str) -> None:
    """Warns with ``text`` the first time that ``kind`` comes up in this process: a folder has a thousand such files."""
    if kind not in _said:
        _said.add(kind)
        warnings.warn(text, DataWarning, stacklevel=3)
