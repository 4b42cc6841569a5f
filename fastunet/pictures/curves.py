"""Training curves as PNG bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from fastunet.pictures.overlay import class_colour, png, shown_name

_MOST_NAMED = 12  # the legend has room for


@matplotlib.rc_context({"text.parse_math": False})  # a dollar in a name is no formula
def curves(history: Sequence[Mapping[str, int | float]], structures: Mapping[str, str], mean: tuple[str, str]) -> bytes:
    """Loss (left) and validation Dice (right) over the epochs of ``history``, the rows of the CSV log.

    ``structures`` and ``mean`` say which Dice: name → column of each thin line, and both of the thick one.
    Of many structures the legend names only the mean.
    """
    epochs = [row["epoch"] for row in history]
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, dice_axes = figure.subplots(1, 2)
    marker = "o" if len(epochs) < 25 else None
    for key, label, colour in (("train_loss", "training", "#0072b2"), ("val_loss", "validation", "#d55e00")):
        values = [_number(row.get(key)) for row in history]
        loss_axes.plot(epochs, values, color=colour, label=label, marker=marker, ms=3)
    loss_axes.set_title("Loss")
    for index, (name, column) in enumerate(structures.items(), start=1):
        values = [_number(row.get(column)) for row in history]
        legend = shown_name(name) if len(structures) <= _MOST_NAMED else None
        dice_axes.plot(epochs, values, color=_darker(class_colour(index)), label=legend, marker=marker, ms=3)
    values = [_number(row.get(mean[1])) for row in history]
    dice_axes.plot(epochs, values, color="#22303c", linewidth=2.4, label=mean[0])
    dice_axes.set_title("Dice on validation cases")
    dice_axes.set_ylim(0, 1)
    for axes in (loss_axes, dice_axes):
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
        axes.xaxis.get_major_locator().set_params(integer=True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
    return png(figure)


def _darker(colour: str) -> str:
    """``colour`` dark enough for a line on white."""
    channels = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    factor = 0.8 if sum(channels) > 480 else 1.0
    return "#" + "".join(f"{int(c * factor):02x}" for c in channels)


def _number(value: float | None) -> float:
    return float("nan") if value is None else float(value)
