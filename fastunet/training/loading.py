"""Batches prepared in a background thread while the device works, with the time spent waiting for them."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Generator, Iterable
from typing import Any

_END = object()
_DEPTH = 2


def prefetched(batches: Iterable[Any]) -> Generator[tuple[Any, float], None, None]:
    """Yields (batch, seconds waited for it), reading ahead by up to two batches in another thread.

    An exception in ``batches`` is raised here. Closing the iterator ends the thread.
    """
    ready: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(_DEPTH)
    stopped = threading.Event()

    def put(item: Any) -> bool:
        while not stopped.is_set():
            try:
                ready.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def read() -> None:
        try:
            for batch in batches:
                if not put((batch, None)):
                    return
            put((_END, None))
        except BaseException as error:
            put((None, error))

    thread = threading.Thread(target=read, name="prefetch", daemon=True)
    thread.start()
    try:
        while True:
            started = time.perf_counter()
            batch, error = ready.get()
            if error is not None:
                raise error
            if batch is _END:
                return
            yield batch, time.perf_counter() - started
    finally:
        stopped.set()
        thread.join()
