"""Draws the figures of ``docs/kernels.md``: ``python docs/figures.py`` writes ``docs/pictures/kernel-*.svg``."""

from __future__ import annotations

import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

FOLDER = Path(__file__).parent / "pictures"
INK, INPUT, OUTPUT, WEIGHT, HALO, FAINT = "#22303c", "#56b4e9", "#e69f00", "#009e73", "#cfe8f7", "#eef1f4"


def grid(axes: Axes, x: float, y: float, columns: int, rows: int, colour: str, side: float = 1.0) -> None:
    """``rows`` × ``columns`` squares whose upper left corner is (x, y); y grows downwards."""
    for i in range(rows):
        for j in range(columns):
            corner = x + j * side, y + i * side
            axes.add_patch(Rectangle(corner, side, side, facecolor=colour, edgecolor="white", lw=1.2))


def bar(axes: Axes, x: float, y: float, width: float, height: float, colour: str, text: str = "",
        size: float = 9) -> None:
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, lw=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=INK)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float], colour: str = INK, **style) -> None:
    axes.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=colour, lw=1.1, **style))


def note(axes: Axes, x: float, y: float, text: str, **style) -> None:
    axes.text(x, y, text, **{"color": INK, "fontsize": 9, "ha": "left", "va": "center", **style})


def row_name(map_name: str, offset: int) -> str:
    return f"{map_name} row h" + (f" {'+' if offset > 0 else '−'} {abs(offset)}" if offset else "")


def canvas(height: float, right: float, bottom: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(9.4, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlim=(0, right), ylim=(bottom, 0), aspect="equal")
    axes.axis("off")
    return figure, axes


def box() -> Figure:
    """The box tiling: one bulk copy a tap, the pixels as operand B."""
    figure, axes = canvas(3.9, 37, 15)
    grid(axes, 0.5, 2, 10, 10, HALO)
    grid(axes, 1.5, 3, 8, 8, INPUT)
    axes.add_patch(Rectangle((2.5, 2), 8, 8, fill=False, edgecolor=WEIGHT, lw=2.2))
    note(axes, 0.5, 1.1, "input: box [1, 8, 8, C] of tap (r, s) = (0, 2)")
    note(axes, 0.5, 12.9, "The copy starts at (h + r − 1, w + s − 1);\nwhat lies outside of the image is zero.")
    arrow(axes, (11.2, 6.5), (13.6, 6.5))
    bar(axes, 14, 3.2, 3.4, 6.6, WEIGHT, "weights\nof the tap\n[K, C]")
    note(axes, 18, 6.5, "×", fontsize=16)
    bar(axes, 19.4, 4.8, 7.2, 3.4, INPUT, "pixels [C, 64]")
    note(axes, 27.1, 6.5, "+=", fontsize=14)
    bar(axes, 29, 3.2, 7.2, 6.6, OUTPUT, "accumulator\n[K, 64 pixels]\nfp32, registers")
    note(axes, 14, 1.1, "one of 9 · C / BLOCK_C steps: weights × pixels")
    note(axes, 14, 12.9, "Pixels are operand B, read by the tensor core from shared memory as they were copied;\n"
                         "bias, ReLU, mask and the 2×2 maximum follow in registers.")  # fmt: skip
    return figure


def rows() -> Figure:
    """Row reuse: six input rows feed four output rows."""
    figure, axes = canvas(4.6, 34, 16.5)
    taps = [("top", "#009e73"), ("middle", "#d55e00"), ("bottom", "#cc79a7")]
    colours = ["#d7ecfa", "#b4dbf4", "#8cc8ee", "#63b4e6", "#3a9fdc", "#1f86c7"]
    note(axes, 0.5, 0.8, "six input rows, loaded once for each column shift")
    note(axes, 21, 0.8, "four output rows")
    for i, colour in enumerate(colours):
        bar(axes, 0.5, 2 + 2.1 * i, 9, 1.5, colour, row_name("x", i - 1))
    for i in range(4):
        bar(axes, 21, 3.9 + 2.1 * i, 9, 1.5, OUTPUT, row_name("y", i))
        for r, (_, colour) in enumerate(taps):
            arrow(axes, (9.7, 2.75 + 2.1 * (i + r)), (20.8, 4.65 + 2.1 * i), colour)
    for r, (name, colour) in enumerate(taps):
        note(axes, 11.3 + 3.3 * r, 15.7, name, color=colour, fontsize=9, weight="bold")
    note(axes, 0.5, 15.7, "weights of the tap's row:")
    note(axes, 21.3, 15.7, "12 products for 9 loads (6 rows, 3 weights)")
    return figure


def stacked_columns() -> Figure:
    """Two output columns stacked on the M axis, for 32 channels."""
    figure, axes = canvas(4.3, 36, 15)
    note(axes, 0.5, 0.8, "operand A [64, C] for each input column: the weights of two output columns, stacked")
    names = [("w left", "zero"), ("w middle", "w left"), ("w right", "w middle"), ("zero", "w right")]
    for i, (upper, lower) in enumerate(names):
        y = 2 + 3.1 * i
        bar(axes, 0.5, y, 5, 1.25, WEIGHT if upper != "zero" else FAINT, upper)
        bar(axes, 0.5, y + 1.25, 5, 1.25, WEIGHT if lower != "zero" else FAINT, lower)
        note(axes, 6.2, y + 1.25, "×", fontsize=13)
        bar(axes, 7.5, y + 0.5, 9, 1.5, INPUT, f"x columns 2j {'−' if i == 0 else '+'} {abs(i - 1)}" if i != 1
            else "x columns 2j")
        arrow(axes, (16.8, y + 1.25), (21.6, 7.9), connectionstyle="arc3,rad=0")
    bar(axes, 22, 5.5, 9, 2.4, OUTPUT, "y columns 2j: 32 channels")
    bar(axes, 22, 7.9, 9, 2.4, OUTPUT, "y columns 2j + 1: 32 channels")
    note(axes, 22, 4.6, "one accumulator [64, pairs of columns]")
    note(axes, 22, 12.2, "6 of 8 halves are weights: 75 % of the products\ncount; of a tile padded to 64 rows, 50 %.")
    return figure


def sub_pixel() -> Figure:
    """Nearest ×2 and a 2×2 convolution as four phases on the small map."""
    figure, axes = canvas(4.4, 38, 16.5)
    note(axes, 0.5, 0.9, "low resolution, x")
    grid(axes, 0.5, 2, 3, 3, HALO, 2.4)
    for (i, j), text in {(0, 0): "i, j", (0, 1): "i, j+1", (1, 0): "i+1, j", (1, 1): "i+1, j+1"}.items():
        bar(axes, 0.5 + 2.4 * j, 2 + 2.4 * i, 2.4, 2.4, INPUT, text, 8)
    note(axes, 0.5, 11.2, "beyond the bottom and right\nedge x is zero")
    note(axes, 11.5, 0.9, "output (2i + a, 2j + b)")
    for a in range(2):
        for b in range(2):
            bar(axes, 11.5 + 3.6 * b, 2 + 3.6 * a, 3.6, 3.6, OUTPUT, f"a={a}, b={b}", 9)
    note(axes, 22, 0.9, "taps on x, each a sum of entries of w")
    phases = [("a=0, b=0", "1 tap: w00 + w01 + w10 + w11 on (i, j)"),
              ("a=0, b=1", "2 taps: w00 + w10 on (i, j), w01 + w11 on (i, j+1)"),
              ("a=1, b=0", "2 taps: w00 + w01 on (i, j), w10 + w11 on (i+1, j)"),
              ("a=1, b=1", "4 taps: w as it is")]  # fmt: skip
    for k, (phase, text) in enumerate(phases):
        note(axes, 20.2, 2.8 + 1.9 * k, phase, weight="bold", fontsize=8.5)
        note(axes, 24, 2.8 + 1.9 * k, text, fontsize=8.5)
    note(axes, 11.5, 11.9, "9 multiply-adds for each pixel of x and pair of channels; upsampling first\n"
                           "costs 16. The upsampled map is never written, and w is summed in fp32.")  # fmt: skip
    return figure


def masks() -> Figure:
    """Where the ReLU masks are applied in the backward pass of an encoder block."""
    figure, axes = canvas(4.0, 40, 16)
    note(axes, 0.5, 0.9, "forward: what is kept is written in bold")
    places = [(0.5, "x", True), (9.5, "y1", True), (18.5, "y2 = skip", True), (29.5, "pooled", False)]
    for x, name, kept in places:
        axes.add_patch(Rectangle((x, 2), 5.5, 2.2, facecolor=INPUT if kept else FAINT, edgecolor=INK, lw=0.8))
        note(axes, x + 2.75, 3.1, name, ha="center", weight="bold" if kept else "normal")
    for start, end, text in ((6, 9.5, "conv\nReLU"), (15, 18.5, "conv\nReLU"), (24, 29.5, "max, same\nlaunch")):
        arrow(axes, (start, 3.1), (end, 3.1))
        note(axes, (start + end) / 2, 5.3, text, ha="center", fontsize=8)
    note(axes, 0.5, 7.9, "backward: dz is the gradient before the ReLU")
    for x, name in ((29.5, "d pooled"), (18.5, "dz2"), (9.5, "dz1"), (0.5, "dx")):
        bar(axes, x, 9, 5.5, 2.2, OUTPUT, name)
    for start, end in ((29.5, 24), (18.5, 15), (9.5, 6)):
        arrow(axes, (start, 10.1), (end, 10.1))
    join = "dz2 = (d skip + unpool(d pooled, y2)) · (y2 > 0)\none pass, the maximum found again in y2"
    note(axes, 26.8, 12.6, join, ha="center", fontsize=8)
    note(axes, 16.8, 14.7, "dz1 = convᵀ(dz2) · (y1 > 0), masked in the kernel's last step", ha="center", fontsize=8)
    note(axes, 7.8, 12.6, "dx = convᵀ(dz1)", ha="center", fontsize=8)
    return figure


FIGURES = {"box": box, "rows": rows, "stacked-columns": stacked_columns, "sub-pixel": sub_pixel, "masks": masks}


def svg(figure: Figure) -> bytes:
    """The figure as SVG, the same bytes each time; text stays text."""
    buffer = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "fastunet", "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()


if __name__ == "__main__":
    for name, draw in FIGURES.items():
        path = FOLDER / f"kernel-{name}.svg"
        path.write_bytes(svg(draw()))
        print(f"drew {path.name}")
