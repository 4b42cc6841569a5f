"""SIGINT, SIGTERM and SIGHUP: an exception at once, or, while there is something to save first, a note."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator

_HANDLED = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]

_PATIENCE_SECONDS = 5.0
"""How long one signal counts as the same request: `torchrun` and schedulers send each signal more than once."""

_IMPORT_SECONDS = 0.1
"""After which a signal that came during an import is sent again."""

_imports_outside = 0
"""Frames of imports around the ``handled`` block: a script may itself be run by an import."""

_noted: list[tuple[int, float]] | None = None
"""What has come in a ``deferred`` block: signal numbers and times. None outside of one."""


class Interrupted(KeyboardInterrupt):
    """The process was asked to end by ``number``; ``message`` tells the user what that means."""

    def __init__(self, number: int, message: str | None = None) -> None:
        super().__init__()
        if message is None:
            message = f"stopped by {signal.Signals(number).name}; every file written so far is whole"
        self.number, self.message = number, message

    @property
    def exit_code(self) -> int:
        """130 for SIGINT, 143 for SIGTERM, 129 for SIGHUP."""
        return 128 + self.number


@contextlib.contextmanager
def handled() -> Iterator[None]:
    """Turns the signals into ``Interrupted`` inside the block; ignored ones, as under ``nohup``, stay ignored."""
    global _imports_outside
    previous, outside, _imports_outside = {}, _imports_outside, _imports(sys._getframe())
    if threading.current_thread() is threading.main_thread():
        for number in _HANDLED:
            if signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                previous[number] = signal.signal(number, _handle)
    try:
        yield
    finally:
        _imports_outside = outside
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], int]]:
    """Notes the signals that :func:`handled` would raise; the function yielded returns the number of the first, or 0.

    A signal that nobody has asked for is raised at the end of the block; one that comes again after five seconds, at
    once.
    """
    global _noted
    noted = _noted = []
    asked = False

    def requested() -> int:
        nonlocal asked
        asked = bool(noted)
        return noted[0][0] if noted else 0

    try:
        yield requested
    finally:
        _noted = None
    if noted and not asked:
        raise Interrupted(noted[0][0])


def _handle(number: int, frame: types.FrameType | None) -> None:
    now = time.monotonic()
    if _noted is not None and (not _noted or now - _noted[0][1] <= _PATIENCE_SECONDS):
        _noted.append((number, now))
    elif _imports(frame) > _imports_outside:
        # an exception that comes through the start of a compiled module ends the process with SIGABRT
        threading.Timer(_IMPORT_SECONDS, os.kill, (os.getpid(), number)).start()
    else:
        raise Interrupted(number)


def _imports(frame: types.FrameType | None) -> int:
    """The frames of Python's import below ``frame``: more than before while a module is being imported there."""
    count = 0
    while frame is not None:
        count += frame.f_code.co_filename == "<frozen importlib._bootstrap>"
        frame = frame.f_back
    return count
