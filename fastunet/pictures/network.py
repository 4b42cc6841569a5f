"""A drawing of a U-Net in the manner of Keras' ``plot_model``: a box per layer, its shapes, arrows, skips across."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from fastunet.errors import printable
from fastunet.files import write_bytes
from fastunet.pictures.summary import Layer, Shape

BOX_WIDTH, BOX_HEIGHT, ROW, GAP = 3.3, 0.66, 0.92, 0.5
COLOURS = {
    "Input": "#e8e8e8",
    "Conv": "#dbe9f6",
    "Max-pool": "#fbe3d0",
    "Transposed": "#dff0d8",
    "Upsample": "#dff0d8",
    "Concat": "#efe3f5",
    "Softmax": "#f6e3e3",
}
INK = "#22303c"


def drawing_paths(path: str | Path) -> list[Path]:
    """The files that :func:`draw` writes."""
    return [Path(f"{path}{suffix}") for suffix in (".svg", ".png")]


def draw(rows: list[Layer], path: str | Path, *, title: str = "") -> list[Path]:
    """Writes the drawing of ``rows`` (:func:`.summary.layers`) as ``path`` with suffixes .svg and .png."""
    # Text stays text in the SVG: it can be searched, and the file is a fifth of the size.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "fastunet", "text.parse_math": False}):
        figure = _figure(rows, printable(title))
        for target in drawing_paths(path):
            buffer = io.BytesIO()
            metadata = {"Date": None} if target.suffix == ".svg" else None
            figure.savefig(buffer, format=target.suffix[1:], dpi=110, metadata=metadata)
            write_bytes(target, buffer.getvalue())
    return drawing_paths(path)


def _figure(rows: list[Layer], title: str) -> Figure:
    places = _places(rows)
    top = max(y for _, y in places.values()) + BOX_HEIGHT
    right = max(x for x, _ in places.values()) + BOX_WIDTH / 2
    figure = Figure(figsize=(right + GAP, top + 2 * GAP))
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(0, right + GAP)
    axes.set_ylim(-GAP, top + GAP)
    axes.axis("off")
    axes.text((right + GAP) / 2, top + GAP / 3, title, ha="center", va="center", fontsize=11, color=INK, weight="bold")
    by_name = {row.name: row for row in rows}
    for row in rows:
        _box(axes, row, *places[row.name])
        for source in row.inputs:
            _arrow(axes, by_name[source], row, places)
    return figure


def _places(rows: list[Layer]) -> dict[str, tuple[float, float]]:
    """The centre of each box: the contracting path goes down on the left, the expanding one up on the right.

    A level is as many rows high as its tallest side, and both sides stand on its lowest row: there the encoder's
    pooling is beside the decoder's upsampling, so that each skip runs level to its concatenation.
    """
    depth = max(row.level for row in rows)
    by_place: dict[tuple[int, int], list[Layer]] = {}
    for row in rows:
        by_place.setdefault((row.level, row.column), []).append(row)
    heights = [max(len(by_place.get((level, column), [])) for column in range(3)) for level in range(depth + 1)]
    left, middle, right = GAP + BOX_WIDTH / 2, GAP + 1.5 * BOX_WIDTH + GAP, GAP + 2.5 * BOX_WIDTH + 2 * GAP
    places: dict[str, tuple[float, float]] = {}
    bottom = 0.0
    for level in range(depth, -1, -1):
        for column, x in ((0, left), (1, middle)):
            for i, row in enumerate(reversed(by_place.get((level, column), []))):
                places[row.name] = x, bottom + i * ROW
        for i, row in enumerate(by_place.get((level, 2), [])):
            places[row.name] = right, bottom + i * ROW
        bottom += heights[level] * ROW + GAP / 2
    return places


def _box(axes: Axes, row: Layer, x: float, y: float) -> None:
    colour = next((c for prefix, c in COLOURS.items() if row.kind.startswith(prefix)), "#f4f4f4")
    corner = (x - BOX_WIDTH / 2, y - BOX_HEIGHT / 2)
    style: dict[str, Any] = {"boxstyle": "round,pad=0,rounding_size=0.06", "linewidth": 0.9, "edgecolor": INK}
    axes.add_patch(FancyBboxPatch(corner, BOX_WIDTH, BOX_HEIGHT, facecolor="white", **style))
    axes.add_patch(Rectangle((corner[0], y), BOX_WIDTH, BOX_HEIGHT / 2, facecolor=colour, edgecolor="none", zorder=1.5))
    axes.add_patch(FancyBboxPatch(corner, BOX_WIDTH, BOX_HEIGHT, facecolor="none", zorder=2, **style))
    axes.plot([corner[0], corner[0] + BOX_WIDTH], [y, y], color=INK, linewidth=0.6, zorder=2)
    text: dict[str, Any] = {"ha": "center", "va": "center", "color": INK, "zorder": 3}
    label = row.kind if row.name.lower() == row.kind.lower() else f"{row.name}  ({row.kind})"
    axes.text(x, y + BOX_HEIGHT / 4, label, fontsize=7.6 if len(label) < 44 else 6.6, weight="bold", **text)
    inputs = ", ".join(_shape(s) for s in row.input_shapes)
    shapes = f"in: {inputs}   out: {_shape(row.shape)}" if inputs else f"out: {_shape(row.shape)}"
    axes.text(x, y - BOX_HEIGHT / 4, shapes, fontsize=7.4 if len(shapes) < 46 else 6.4, **text)


def _arrow(axes: Axes, source: Layer, target: Layer, places: dict[str, tuple[float, float]]) -> None:
    (x0, y0), (x1, y1) = places[source.name], places[target.name]
    if x0 == x1:
        side = BOX_HEIGHT / 2 if y1 > y0 else -BOX_HEIGHT / 2
        start, end = (x0, y0 + side), (x1, y1 - side)
    else:
        start, end = (x0 + BOX_WIDTH / 2, y0), (x1 - BOX_WIDTH / 2, y1)
    skip = source.column == 0 and target.column == 2
    axes.add_patch(
        FancyArrowPatch(
            start, end, arrowstyle="-|>", mutation_scale=9, linewidth=1.1, color="#8a5aa8" if skip else INK,
            linestyle=(0, (4, 2)) if skip else "-", shrinkA=0, shrinkB=0, zorder=1,
        )
    )  # fmt: skip


def _shape(shape: Shape) -> str:
    return "×".join(map(str, shape))
