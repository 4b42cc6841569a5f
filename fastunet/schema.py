"""JSON from users and other programs, checked against a type in one place; what does not fit is one sentence.

msgspec rather than hand-written checks: it takes the project's own dataclasses as schemas, rejects NaN, huge numbers
and broken text by itself, says where in the document a value is wrong, and depends on nothing else.
"""

from __future__ import annotations

import codecs
import dataclasses
import functools
import json
import os
import re
import stat
from pathlib import Path
from typing import TypeVar

import msgspec

from fastunet.errors import UserError

T = TypeVar("T")

_SHOWN = 60
_COMMENT = re.compile(rb"^[^\"]*(\"[^\"]*\"[^\"]*)*(//|/\*|#)")  # outside of quotes
_HINTS = (
    ("trailing comma", "remove the comma before the closing bracket"),
    ("keys must be strings", "names and texts stand in double quotes"),
    ("expected ','", "a comma or a bracket is missing before it"),
)


def read_json(path: str | Path, kind: type[T]) -> T:
    """The content of a JSON file as ``kind``: a dataclass, a ``msgspec.Struct``, or a type such as ``dict[str, int]``.

    Raises:
        UserError: the file cannot be read, is no JSON, or does not fit; see :func:`parse_json`.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # a pipe would wait for its writer
            raise UserError(f"{path} is not a regular file")
        data = Path(path).read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {(error.strerror or str(error)).lower()}") from error
    return parse_json(data, kind, path)


def parse_json(data: bytes | str, kind: type[T], source: object) -> T:
    """JSON text as ``kind``; ``source`` names it in errors. A byte-order mark is skipped, and tells UTF-16.

    Fields are matched by name, types strictly (``true`` is no number); what a dataclass does not know is refused.

    Raises:
        UserError: broken JSON (the line is shown), or a value that does not fit (its place is shown).
    """
    data = data.encode(errors="surrogatepass") if isinstance(data, str) else data
    data = data.removeprefix(codecs.BOM_UTF8)
    try:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            data = data.decode("utf-16").encode()
        value = msgspec.json.decode(data)
        json.loads(data, object_pairs_hook=functools.partial(_without_repeats, source=source))
    except RecursionError as error:
        raise UserError(f"{source} nests brackets too deeply") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{source} is not UTF-8 text") from error
    except msgspec.ValidationError as error:
        raise UserError(f"{source} holds a number that is out of range") from error
    except msgspec.DecodeError as error:
        raise UserError(f"{source} is not valid JSON: {_syntax_problem(data, str(error))}") from error
    return to_type(value, kind, source)


def to_type(value: object, kind: type[T], source: object) -> T:
    """A value made of dicts, lists, texts and numbers as ``kind``; errors as in :func:`parse_json`.

    Keys may be texts of numbers where ``kind`` wants numbers, as JSON has no other keys.
    """
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        known = {field.name for field in dataclasses.fields(kind)}
        unknown = [str(name)[:_SHOWN] for name in value if name not in known]
        if unknown:
            raise UserError(f"{source} has entries that this version does not know: {', '.join(map(repr, unknown))}")
    try:
        return msgspec.convert(value, kind, str_keys=True)
    except RecursionError as error:
        raise UserError(f"{source} nests brackets too deeply") from error
    except (msgspec.ValidationError, TypeError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        problem, _, place = str(error).replace("`", "").partition(" - at ")
        place = f", at {place.removeprefix('key in ').removeprefix('$.')}" if place else ""
        raise UserError(f"{source} cannot be used: {problem[:1].lower()}{problem[1:]}{place}") from error


def _without_repeats(pairs: list[tuple[str, object]], source: object) -> dict[str, object]:
    """The object of ``pairs``; msgspec, as most readers, would keep the last of two entries without a word."""
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        repeated = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{source} has two entries called {repeated[:_SHOWN]!r} in one object")
    return table


def _syntax_problem(data: bytes, message: str) -> str:
    """What is wrong, the line where it is, and what to change."""
    if "truncated" in message:
        return "it ends too early, or an escape such as \\ud800 lacks its other half"
    problem = message.removeprefix("JSON is malformed: ")
    match = re.search(r" \(byte (\d+)\)$", problem)
    offset = int(match[1]) if match else 0
    problem = problem[: match.start()] if match else problem
    if "trailing comma" in problem:
        offset = data.rfind(b",", 0, offset + 1)
    number = data.count(b"\n", 0, offset) + 1
    start = max(data.rfind(b"\n", 0, offset) + 1, offset - _SHOWN // 2)
    line = data[start:].split(b"\n", 1)[0].strip()
    hint = next((hint for part, hint in _HINTS if part in problem), "")
    if _COMMENT.match(line):
        hint = "JSON has no comments, remove it"
    elif re.search(rb"\b(NaN|Infinity)\b", line):
        hint = "JSON has no NaN and no Infinity"
    elif re.search(rb"\b(True|False|None)\b", line):
        hint = "JSON writes true, false and null"
    shown = line[:_SHOWN].decode(errors="replace") + ("…" if len(line) > _SHOWN else "")
    return f"{problem} in line {number}: {shown!r}{'; ' + hint if hint else ''}"
