"""Puts tables of the newest committed rows into the README and draws their pictures: ``python -m bench.report``.

The text between ``<!-- bench:begin -->`` and ``<!-- bench:end -->`` is replaced; nothing in it is typed by hand.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from bench.measuring.rows import RESULTS, Results, devices, newest
from bench.pages.tables import device_report

_REPOSITORY = Path(__file__).parent.parent
README, PICTURES = _REPOSITORY / "README.md", _REPOSITORY / "docs" / "pictures"
BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"
_CAPTIONS = {
    "rivals": "times against the rivals",
    "waterfall": "what each fusion brings",
    "roofline": "roofline",
}


def section(root: Path = RESULTS) -> str:
    """The README's performance section of all devices with committed results; empty without any."""
    parts = []
    for slug in devices(root):
        results = newest(slug, root)
        if results is not None:
            parts.append(f"{device_report(results)}\n\n{_pictures(slug)}".strip())
    return "\n\n".join(parts)


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


def _pictures(slug: str) -> str:
    """Links to those pictures of a device that exist."""
    lines = [f"![{caption}](docs/pictures/{slug}-{name}.svg)" for name, caption in _CAPTIONS.items()
             if (PICTURES / f"{slug}-{name}.svg").is_file()]  # fmt: skip
    return "\n\n".join(lines)


def draw(root: Path = RESULTS, folder: Path = PICTURES) -> list[Path]:
    """Draws the pictures of every device's newest results."""
    # matplotlib is needed for nothing else here, and absent on a bare GPU machine
    from bench.pages.pictures import draw_all

    found: list[Results] = [r for slug in devices(root) if (r := newest(slug, root)) is not None]
    return [path for results in found for path in draw_all(results, folder)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; exit code 2 where the README lacks its markers."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.split("\n\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of result files")
    parser.add_argument("--print", action="store_true", help="print the tables and leave README and pictures alone")
    options = parser.parse_args(arguments)
    try:
        if options.print:
            print(section(options.results))
            return 0
        for path in draw(options.results):
            print(f"drew {path.relative_to(_REPOSITORY)}")
        README.write_text(replaced(README.read_text(), section(options.results)))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"wrote {README.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
