"""What users are told: ``UserError`` for input that is wrong, ``DataWarning`` for input that is odd."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Callable, Iterator
from typing import Any


class UserError(ValueError):
    """Bad input, described in one sentence that names the file, shape or value; the command line exits with 2."""


Refusal = Callable[[str], Any]
"""What is called with a sentence about one case among many: ``refuse``, or the ``append`` of a list of problems."""


def refuse(text: str) -> None:
    """Raises ``UserError(text)``."""
    raise UserError(text)


def is_speaker() -> bool:
    """Whether this process is the one on its machine that tells what all of a ``torchrun`` group there find."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("LOCAL_RANK", "0") == "0"


@contextlib.contextmanager
def said_once() -> Iterator[None]:
    """Errors of the block are those of every process on this machine: one tells, others raise an empty error."""
    try:
        yield
    except UserError as error:
        raise (error if is_speaker() else UserError("")) from error.__cause__


class DataWarning(UserWarning):
    """Input that is usable but not as its writer meant it, in one sentence; the command line prints it on stderr."""


def printable(text: object) -> str:
    """``text`` in one line, with what a name from a file could make a terminal do spelt out."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in str(text))


_NO_MEMORY = ("out of memory", "can't allocate memory", "not enough memory: you tried to allocate", "_ALLOC_FAILED")
"""How allocators of CUDA, PyTorch on a CPU, cuBLAS and cuDNN say it; other errors speak of memory, too."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether there was too little memory, on whatever device."""
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )


_said: set[str] = set()


def warn_once(kind: str, text: str) -> None:
    """Warns with ``text`` the first time that ``kind`` comes up in this process: a folder has a thousand such files."""
    if kind not in _said:
        _said.add(kind)
        warnings.warn(text, DataWarning, stacklevel=3)
