"""Puts the newest committed rows into README and ``docs/benchmarks.md`` and draws them: ``python -m bench.report``.

The text between ``<!-- bench:begin -->`` and ``<!-- bench:end -->`` is replaced; nothing in it is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measuring.rows import RESULTS, Results, devices, newest
from bench.pages.tables import device_report, headlines

_REPOSITORY = Path(__file__).parent.parent
README, PAGE = _REPOSITORY / "README.md", _REPOSITORY / "docs" / "benchmarks.md"
PICTURES = PAGE.parent / "pictures"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_CAPTIONS = {"rivals": "times against the rivals", "waterfall": "what each fusion brings", "roofline": "roofline"}


def section(root: Path = RESULTS) -> str:
    """The page of all devices with committed results: every table and the pictures; empty without any."""
    return "\n\n".join(f"{device_report(results)}\n\n{_pictures(results)}".strip() for results in _newest(root))


def front(root: Path = RESULTS) -> str:
    """The README's one table: networks and losses on the device measured last; empty without results."""
    found = _newest(root)
    return headlines(max(found, key=lambda results: results.environment.date)) if found else ""


def _newest(root: Path) -> list[Results]:
    return [results for slug in devices(root) if (results := newest(slug, root)) is not None]


def replaced(text: str, content: str, begin: str = BEGIN, end: str = END) -> str:
    """``text`` with ``content`` between its two markers.

    Raises:
        ValueError: the text does not hold the markers once each, in order.
    """
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise ValueError(f"expected {begin} and, after it, {end}, once each")
    head, rest = text.split(begin)
    return "\n".join(filter(None, [head + begin, content, end + rest.split(end)[1]]))


def between(text: str, begin: str = BEGIN, end: str = END) -> str:
    """What stands between the markers, without the line breaks around it."""
    return text.split(begin)[1].split(end)[0].strip("\n")


def _pictures(results: Results) -> str:
    """Links to those pictures of a device that exist."""
    slug = results.environment.slug
    lines = [f"![{caption}](pictures/{slug}-{name}.svg)" for name, caption in _CAPTIONS.items()
             if (PICTURES / f"{slug}-{name}.svg").is_file()]  # fmt: skip
    return "\n\n".join(lines)


def draw(root: Path = RESULTS, folder: Path = PICTURES) -> list[Path]:
    """Draws the pictures of every device's newest results."""
    # matplotlib is needed for nothing else here, and absent on a bare GPU machine
    from bench.pages.pictures import draw_all

    return [path for results in _newest(root) for path in draw_all(results, folder)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; exit code 2 where README or page lacks its markers."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--print", action="store_true", help="print the tables and leave the files alone")
    options = parser.parse_args(arguments)
    try:
        if options.print:
            print(section(options.results))
            return 0
        for path in draw(options.results):
            print(f"drew {path.relative_to(_REPOSITORY)}")
        for path, content in ((README, front(options.results)), (PAGE, section(options.results))):
            path.write_text(replaced(path.read_text(), content))
            print(f"wrote {path.relative_to(_REPOSITORY)}")
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
