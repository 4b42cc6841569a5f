"""Slices with outlined classes, truth beside prediction, as PNG bytes."""

from __future__ import annotations

import io
from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from fastunet.errors import printable

CLASS_COLOURS = ("#d55e00", "#56b4e9", "#f0e442", "#cc79a7", "#009e73", "#0072b2", "#e69f00", "#ffffff")
"""Colours of the foreground classes in order, repeated if there are more (Okabe and Ito's colour-blind safe set)."""
BACKDROP, PALE = "#111418", "#e8ecef"
_LETTER = 0.09  # inches, in the legend


def class_colour(index: int) -> str:
    """The colour of foreground class ``index`` (1 is the first)."""
    return CLASS_COLOURS[(index - 1) % len(CLASS_COLOURS)]


def shown_name(name: str) -> str:
    """A name as pictures show it: what no font has is spelt out, and no legend leaves it out for its underscore."""
    text = printable(name)
    return f" {text}" if text.startswith("_") else text


@matplotlib.rc_context({"text.parse_math": False})  # a dollar in a name is no formula
def overlay(image: np.ndarray, panels: Sequence[tuple[str, np.ndarray | None]], class_names: Sequence[str]) -> bytes:
    """One slice drawn once for each of ``panels``, (title, labels), with every foreground class filled and outlined.

    Args:
        image: (H, W) intensities; the 1st to 99.5th percentile of what is not the minimum spans black to white.
        panels: labels are (H, W) class indices, of which those beyond the names are ignored ones, or None for the plain
            image.
        class_names: names by class index; the legend lists those of the foreground that panels show, if they fit.
    """
    rows, columns = _window(image)
    grey = _stretch(image)[rows, columns]
    height, width = grey.shape
    panel_width = 3.2
    panel_height = panel_width * height / width
    figure = Figure(figsize=(panel_width * len(panels), panel_height + 0.75), facecolor=BACKDROP)
    FigureCanvasAgg(figure)
    legend_share, title_share = 0.42 / (panel_height + 0.75), 0.33 / (panel_height + 0.75)
    shown: set[int] = set()
    for i, (title, labels) in enumerate(panels):
        place = (i / len(panels) + 0.004, legend_share, 1 / len(panels) - 0.008, 1 - legend_share - title_share)
        axes = figure.add_axes(place)
        axes.imshow(grey, cmap="gray", vmin=0, vmax=1, interpolation="bilinear")
        axes.set_title(shown_name(title), color=PALE, fontsize=12, pad=4)
        axes.axis("off")
        if labels is not None:
            shown |= _outline(axes, labels[rows, columns])
    names = {c: class_names[c] if c < len(class_names) else "ignored" for c in sorted(shown)}
    handles = [Line2D([], [], color=class_colour(c), linewidth=5, label=shown_name(name)) for c, name in names.items()]
    widths = np.cumsum([_LETTER * (len(str(handle.get_label())) + 6) for handle in handles])
    if handles:
        fit = max(1, int(np.count_nonzero(widths < panel_width * len(panels))))
        if handles[fit:]:
            handles[fit - 1 :] = [Line2D([], [], alpha=0, label=f"and {len(handles) - fit + 1} more")]
        figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, labelcolor=PALE,
                      fontsize=11, handlelength=1.0, columnspacing=1.6)  # fmt: skip
    return png(figure)


def best_slice(stack: np.ndarray) -> int:
    """The index of the slice of labels (n, H, W) that shows most: the largest sum of the square roots of class areas.

    The square root lets a slice with all classes win over one with much of a single class. Without any, the middle.
    """
    score = np.zeros(len(stack))
    for value in np.unique(stack):
        if value:
            score += np.sqrt((stack == value).sum(axis=(1, 2)))
    return int(score.argmax()) if score.any() else len(stack) // 2


def upright(plane: np.ndarray, axis: int) -> np.ndarray:
    """A slice as people look at it: the front or the top of the head above, its left side to the right.

    ``plane`` (H, W) comes from a volume whose axes run to the left, the back and the top, cut along ``axis``.
    """
    return plane.T if axis == 2 else plane.T[::-1]


def _outline(axes: Axes, labels: np.ndarray) -> set[int]:
    """Fills and outlines each foreground class, small ones on top; returns those present."""
    areas = np.bincount(labels.reshape(-1))
    present = {int(c) for c in np.flatnonzero(areas) if c}
    for c in sorted(present, key=lambda c: -areas[c]):
        mask = np.pad((labels == c).astype(np.float32), 1)
        grid = np.arange(-1, mask.shape[1] - 1), np.arange(-1, mask.shape[0] - 1)
        axes.contourf(*grid, mask, levels=[0.5, 1.5], colors=[class_colour(c)], alpha=0.28)
        axes.contour(*grid, mask, levels=[0.5], colors=[class_colour(c)], linewidths=1.5)
    axes.set_xlim(-0.5, labels.shape[1] - 0.5)
    axes.set_ylim(labels.shape[0] - 0.5, -0.5)
    return present


def _window(image: np.ndarray) -> tuple[slice, slice]:
    """The rows and columns around what is not background (the image's minimum), with a margin of 4 %."""
    inside = image > image.min()
    if not inside.any():
        return slice(None), slice(None)
    windows = []
    for axis in (1, 0):
        index = np.flatnonzero(inside.any(axis=axis))
        length = inside.shape[1 - axis]
        margin = max(2, round(0.04 * length))
        windows.append(slice(max(0, index[0] - margin), min(length, index[-1] + margin + 1)))
    return windows[0], windows[1]


def _stretch(image: np.ndarray) -> np.ndarray:
    image = np.asarray(image, dtype=np.float32)
    inside = image[image > image.min()]
    if inside.size == 0:
        return np.zeros_like(image)
    low, high = np.percentile(inside, (1, 99.5))
    low = min(low, float(np.percentile(image, 50)), float(inside.min()))
    return np.asarray(np.clip((image - low) / max(high - low, 1e-6), 0, 1))


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, facecolor=figure.get_facecolor(), metadata={"Software": None})
    return buffer.getvalue()
