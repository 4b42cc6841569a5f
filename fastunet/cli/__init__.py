"""The ``fastunet`` command: one module per subcommand, each with ``add_arguments`` and ``run``.

Modules here import nothing heavy at their top, so that ``fastunet --help`` and argument errors come at once.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn, TextIO

from fastunet import allocator
from fastunet.cli import check, demo, evaluate, info, segment, summary, train, warm_up
from fastunet.errors import DataWarning, UserError, is_out_of_memory, is_speaker, printable, said_once
from fastunet.files import reason
from fastunet.signals import Interrupted, handled

COMMANDS = {
    "demo": (demo, "learn to segment phantoms or cells, from nothing to a report, in three minutes", "--out demo"),
    "check": (check, "read a data folder once: what it holds, and what training would refuse", "DATA"),
    "train": (train, "train a U-Net on a folder of cases", "DATA --out RUN"),
    "evaluate": (evaluate, "score a model, or predictions, against the truth", "RUN DATA"),
    "segment": (segment, "segment cases, volumes or images", "RUN DATA --out LABELS --overlay"),
    "summary": (summary, "list the layers of a network and draw it", "--preset brats --size 240"),
    "warm-up": (warm_up, "compile a network's GPU kernels ahead of their first use", "--preset brats --size 240"),
    "info": (info, "versions, device, and which backend each operator would use", ""),
}
"""Each subcommand's module, what it does, and the arguments of its example."""


class _Parser(argparse.ArgumentParser):
    """Help begins with an example; a wrong argument is reported as any other bad input: one line, exit code 2."""

    example = ""

    def format_help(self) -> str:
        return f"example: {self.example}\n\n{super().format_help()}"

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line ``argv`` (default: this process's) and returns the exit code.

    0 is success; 2 is bad input or a system that refuses (a full disk), with one line on stderr; 130, 143 and 129 mean
    that SIGINT, SIGTERM or SIGHUP ended it. Anything else is a defect and raises.
    """
    # Streams that were closed (`>&-`) would be None, and the next file that is opened would take their number.
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), "r" if name == "stdin" else "w"))
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # file names may hold bytes that are no text
    if argv is None:  # the process is the command's
        allocator.keep_freed_memory()
    try:
        with handled():
            parser = _parser()
            with contextlib.suppress(ImportError):  # the extra "completion"
                import argcomplete

                argcomplete.autocomplete(parser)
            with said_once():
                args = _parsed(parser, sys.argv[1:] if argv is None else argv)
            with warnings.catch_warnings():
                for library in ("PIL", "nibabel"):  # what matters of their doubts about a file is said or refused here
                    warnings.filterwarnings("ignore", module=library)
                warnings.filterwarnings("ignore", "Glyph .* missing")  # from the font, of a name in a picture
                warnings.simplefilter("always", DataWarning)
                warnings.showwarning = _show_warning
                args.run(args)
            sys.stdout.flush()
    except UserError as error:
        _complain(str(error))
        return 2
    except KeyboardInterrupt as stop:
        stop = stop if isinstance(stop, Interrupted) else Interrupted(signal.SIGINT)
        _complain(stop.message)
        return stop.exit_code
    except BrokenPipeError:
        # The reader of a pipe went away (`| head`); point stdout elsewhere so that its flush at exit stays quiet.
        sys.stdout = None
        return 0
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _complain("out of memory; a smaller --batch-size, --size or --tile needs less")
        return 2
    except OSError as error:
        sys.stdout = None
        place = "the current folder" if isinstance(error, FileNotFoundError) else "the standard output"
        place = "temporary files" if "temporary directory" in str(error) else place
        _complain(f"{error.filename or place}: {reason(error)}")
        return 2
    return 0


def _parsed(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.Namespace:
    for before, word in zip(["fastunet", *words], words):
        if not word or (word.startswith("--") and word.endswith("=")):  # an empty path is the current folder
            name = word.rstrip("=") or f"the argument after {before}"
            raise UserError(f"{name} is empty; is the variable set that it comes from?")
    return parser.parse_args([_at_home(word) for word in words])


def _at_home(word: str) -> str:
    """``word`` with the home folder for a ``~/`` that no shell replaced, as in ``--out=~/run``."""
    option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
    return option + equals + (os.path.expanduser(value) if value.startswith("~/") else value)


def _show_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: TextIO | None = None,
    line: str | None = None,
) -> None:  # fmt: skip
    """A warning about the data is one line; others look as Python has them."""
    if issubclass(category, DataWarning):
        if is_speaker():  # of several processes each reads the same data
            print(f"warning: {printable(message)}", file=sys.stderr)
    else:
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))


def _complain(message: str) -> None:
    """Prints the message as one line; an empty one means that another process says it."""
    if message:
        with contextlib.suppress(OSError):  # the exit code says it where nothing can be written
            print(f"fastunet: {printable(message)}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastunet", description="U-Nets on PyTorch and Triton for images and slices of volumes.")
    parser.example = "fastunet train DATA --out RUN"
    parser.add_argument("--version", action="version", version=_version())
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, about, arguments) in COMMANDS.items():
        command = commands.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        command.example = f"fastunet {name} {arguments}".rstrip()
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    return parser


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return f"fastunet {version('fastunet')}"
    except PackageNotFoundError:
        return "fastunet (not installed)"
