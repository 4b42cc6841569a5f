"""What a person sees during training: a progress bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TextIO

from tqdm.auto import tqdm

from fastunet.errors import printable

_SECONDS_BETWEEN_LINES = 30.0


class Display:
    """Shows the batches of an epoch with loss, slices per second, time left and the share of time spent on data."""

    def __init__(self, *, quiet: bool = False, stream: TextIO | None = None) -> None:
        self._quiet = quiet
        self._stream = stream or sys.stderr
        # a notebook is no terminal, but shows a bar all the same
        self._terminal = self._stream.isatty() or "ipykernel" in sys.modules
        self._bar: tqdm | None = None

    def message(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self._quiet:
            return
        with contextlib.suppress(OSError):  # a log that nobody reads any more, or a full disk, ends no training
            if self._bar is not None:
                self._bar.write(printable(text), file=self._stream)
            else:
                print(printable(text), file=self._stream, flush=True)

    def start(self, title: str, total: int, done: int = 0) -> None:
        """Begins a stretch of ``total`` batches of which ``done`` are done already."""
        self._title, self._total, self._done, self._first = title, total, done, done
        self._slices, self._waited, self._started = 0, 0.0, time.perf_counter()
        self._next_line = self._started + _SECONDS_BETWEEN_LINES
        if self._terminal and not self._quiet:
            self._bar = tqdm(total=total, initial=done, desc=title, unit="batch", file=self._stream, leave=False,
                             dynamic_ncols=True)  # fmt: skip

    def step(self, slices: int, waited: float, loss: float | None = None) -> None:
        """Counts a batch of ``slices`` for which ``waited`` seconds were spent waiting for data."""
        self._done += 1
        self._slices += slices
        self._waited += waited
        if self._quiet:
            return
        elapsed = max(time.perf_counter() - self._started, 1e-9)
        facts = f"{self._slices / elapsed:.1f} slices/s, data {100 * self._waited / elapsed:.0f} %"
        facts = facts if loss is None else f"loss {loss:.4f}, {facts}"
        if self._bar is not None:
            self._bar.set_postfix_str(facts, refresh=False)
            self._bar.update()
        elif time.perf_counter() >= self._next_line and self._done < self._total:
            left = elapsed / (self._done - self._first) * (self._total - self._done)
            self.message(f"{self._title}: batch {self._done}/{self._total}, {facts}, {left:.0f} s left")
            self._next_line = time.perf_counter() + _SECONDS_BETWEEN_LINES

    def stop(self) -> None:
        """Ends the stretch and clears its bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None
