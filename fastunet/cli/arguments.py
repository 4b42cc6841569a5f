"""Argument types and options that several subcommands share."""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from typing import TypeVar

from fastunet.errors import UserError, printable

Number = TypeVar("Number", int, float)
_MOST = 2**31
_MOST_THREADS = 1024
_MOST_FLOAT = 3.4e38  # what float32 holds


def positive_int(text: str) -> int:
    """An integer from one to what ``TrainConfig`` takes."""
    value = _number(int, text, "a whole number")
    if not 1 <= value <= _MOST:
        raise argparse.ArgumentTypeError(f"{text} is not from 1 to {_MOST}")
    return value


def label_value(text: str) -> int:
    """An integer that a label file can hold, of 32 bits, or a colour of masks such as "#e0e0c0"."""
    if re.fullmatch("#[0-9a-fA-F]{6}", text):
        from fastunet.data.labels import COLOUR

        return COLOUR + int(text[1:], 16)
    value = _number(int, text, "a whole number")
    if not -_MOST <= value < _MOST:
        raise argparse.ArgumentTypeError(f"{text} is not from {-_MOST} to {_MOST - 1}")
    return value


def positive_float(text: str) -> float:
    """A number above zero that float32 holds."""
    value = _number(float, text, "a number")
    if not 0 < value <= _MOST_FLOAT:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most {_MOST_FLOAT:g}")
    return value


def fraction(text: str) -> float:
    """A number from 0 to 1."""
    value = _number(float, text, "a number")
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def decay(text: str) -> float:
    """A number between 0 and 1, neither of them."""
    value = _number(float, text, "a number")
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def class_weights(text: str) -> list[float] | str:
    """Comma-separated numbers of at least zero, or "balanced"."""
    return text if text == "balanced" else [non_negative_float(part) for part in text.split(",")]


def two_numbers(text: str) -> tuple[float, float]:
    """Two comma-separated numbers of at least zero."""
    parts = text.split(",")
    if len(parts) != 2:
        raise argparse.ArgumentTypeError(f"{text!r} is not two numbers with a comma between")
    return non_negative_float(parts[0]), non_negative_float(parts[1])


def spacing(text: str) -> float | str:
    """A number above zero, or "median"."""
    return text if text == "median" else positive_float(text)


def non_negative_float(text: str) -> float:
    """A number of at least zero that float32 holds."""
    value = _number(float, text, "a number")
    if not 0 <= value <= _MOST_FLOAT:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to {_MOST_FLOAT:g}")
    return value


def seed(text: str) -> int:
    """An integer that every generator of random numbers takes as its seed."""
    value = _number(int, text, "a whole number")
    if not 0 <= value < 2**63:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 2**63 - 1")
    return value


def names(text: str) -> list[str]:
    """Comma-separated names, each once."""
    values = [name.strip() for name in text.split(",") if name.strip()]
    if not values or len(set(values)) < len(values):
        raise argparse.ArgumentTypeError(f"{text!r} are not different names with commas between")
    return values


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    """``--device`` and ``--threads``."""
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--threads", type=positive_int, help="CPU threads (default: PyTorch's choice)")


def add_nan_option(parser: argparse._ActionsContainer, default: str = "error") -> None:
    """``--on-nan``."""
    choices = ("error", "zero")
    parser.add_argument("--on-nan", choices=choices, default=default, help="NaN or infinity: stop, or replace by 0")


def set_threads(count: int | None) -> None:
    """Limits PyTorch to ``count`` CPU threads, if given."""
    import torch

    if count is not None:
        if count > _MOST_THREADS:  # OpenMP ends the process where it cannot start them
            raise UserError(f"--threads is {count}; expected 1 to {_MOST_THREADS}")
        torch.set_num_threads(count)
    elif "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


def say(*lines: object) -> None:
    """Prints each of ``lines``, however many it would be on a terminal; a reader that went away ends no work."""
    try:
        print(*map(printable, lines), sep="\n")
    except BrokenPipeError:
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w")


def progress_display(name: str = "", unit: str = "slice") -> Callable[[int, int], None]:
    """A function (units done, units) that shows a bar on a terminal and nothing elsewhere."""
    from tqdm import tqdm

    bar = tqdm(desc=printable(name), unit=unit, leave=False, delay=0.1, disable=not sys.stderr.isatty())

    def show(done: int, total: int) -> None:
        bar.total = total
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show


def _number(kind: Callable[[str], Number], text: str, description: str) -> Number:
    try:
        if not text.isascii() or "_" in text:  # which Python takes for digits, and to divide them
            raise ValueError
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {description}") from None
