"""A one-page HTML report that needs nothing but itself: styles and pictures are inside the file."""

from __future__ import annotations

import base64
import html
import shlex
from collections.abc import Sequence
from dataclasses import dataclass

from fastunet.inference.scores import EMPTY_RULES, Score, cell, mean_foreground_dice, mean_scores
from fastunet.pictures.overlay import class_colour

_STYLE = """
body { margin: 0; background: #f5f6f8; color: #22303c; font: 16px/1.5 system-ui, "DejaVu Sans", sans-serif; }
main { max-width: 62rem; margin: 0 auto; padding: 2rem 1.5rem 4rem; }
h1 { font-size: 1.9rem; margin: 0 0 .3rem; } h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; }
p { margin: .4rem 0; } .muted { color: #5b6b78; font-size: .92rem; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.4rem 0; padding: 0; list-style: none; }
.facts li { background: white; border-radius: .5rem; padding: .7rem 1rem; box-shadow: 0 1px 3px #0002; }
.facts b { display: block; font-size: 1.5rem; }
figure { margin: 1rem 0; background: white; border-radius: .5rem; box-shadow: 0 1px 3px #0002; overflow: hidden; }
figure img { display: block; width: 100%; } figcaption { padding: .6rem 1rem; font-size: .92rem; }
.small { max-width: 34rem; }
table { border-collapse: collapse; background: white; border-radius: .5rem; box-shadow: 0 1px 3px #0002; width: 100%; }
th, td { padding: .45rem .8rem; text-align: right; vertical-align: bottom; border-bottom: 1px solid #e6e9ec; }
th:first-child, td:first-child { text-align: left; } tr:last-child td { font-weight: bold; border: 0; }
.chip { display: inline-block; width: .8em; height: .8em; border-radius: .2em; margin-right: .4em; }
pre { background: #22303c; color: #eef; padding: .8rem 1rem; border-radius: .5rem; white-space: pre-wrap; }
"""


@dataclass(frozen=True)
class Picture:
    """A PNG with its caption."""

    png: bytes
    caption: str
    small: bool = False


def page(
    *,
    title: str,
    lead: str,
    facts: Sequence[tuple[str, str]],
    sections: Sequence[tuple[str, Sequence[Picture | str]]],
) -> str:
    """The HTML of a report.

    Args:
        title: the heading.
        lead: a sentence below it.
        facts: (number, what it is) shown large.
        sections: (heading, parts); a part is a picture or HTML made by the functions below.
    """
    body = [f"<h1>{html.escape(title)}</h1>", paragraph(lead), '<ul class="facts">']
    body += [f"<li><b>{html.escape(number)}</b>{html.escape(name)}</li>" for number, name in facts]
    body.append("</ul>")
    for heading, parts in sections:
        body.append(f"<h2>{html.escape(heading)}</h2>")
        body += [_figure(part) if isinstance(part, Picture) else part for part in parts]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{_STYLE}</style></head>\n'
        f"<body><main>\n{chr(10).join(body)}\n</main></body></html>\n"
    )


def paragraph(text: str, *, muted: bool = False) -> str:
    """A paragraph of plain text."""
    return f"<p{' class=muted' if muted else ''}>{html.escape(text)}</p>"


def commands(*lines: Sequence[str]) -> str:
    """Command lines to copy, each given as its words."""
    return f"<pre>{html.escape(chr(10).join(map(shlex.join, lines)))}</pre>"


def score_table(scores: Sequence[Score]) -> str:
    """Dice per case (rows) and structure (columns), the mean below, and the rule for empty structures."""
    means = mean_scores(scores)
    cases = list(dict.fromkeys(s.case for s in scores))
    cells = {(s.case, s.kind, s.structure): s.dice for s in [*scores, *means]}
    classes = [s.structure for s in means if s.kind == "class"]

    def heading(score: Score) -> str:
        chip = ""
        if score.kind == "class":
            chip = f'<span class="chip" style="background:{class_colour(classes.index(score.structure) + 1)}"></span>'
        region = " <small>(region)</small>" if score.kind == "region" else ""
        return f"<th>{chip}&#8288;{html.escape(score.structure)}{region}</th>"

    rows = ["<tr><th>Dice</th>" + "".join(map(heading, means)) + "</tr>"]
    for case in [*cases, "mean"]:
        values = (cells[case, s.kind, s.structure] for s in means)
        rows.append(f"<tr><td>{html.escape(case)}</td>{''.join(f'<td>{cell(v)}</td>' for v in values)}</tr>")
    note = f"Mean over cases and foreground classes: {cell(mean_foreground_dice(scores))}. {EMPTY_RULES['one']}"
    return f"<table>{''.join(rows)}</table>" + paragraph(note, muted=True)


def _figure(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    caption = html.escape(picture.caption)
    kind = ' class="small"' if picture.small else ""
    image = f'<img alt="{caption}" src="data:image/png;base64,{data}">'
    return f"<figure{kind}>{image}<figcaption>{caption}</figcaption></figure>"
