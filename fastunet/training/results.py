"""What a run shows for itself: a row of the log per epoch, ``log.csv`` and ``curves.png``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from fastunet.data import LabelMap
from fastunet.files import write_bytes, write_text
from fastunet.metrics import SegmentationMetrics

LOG, CURVES = "log.csv", "curves.png"
Row = dict[str, int | float]
"""Of the log: the numbers of an epoch by column."""


def metric_columns(metrics: SegmentationMetrics) -> dict[str, float]:
    """The metrics of all pixels as columns of the log.

    "dice" is the mean over all classes as in the Keras source; "dice_foreground", precision, sensitivity and
    specificity are means over the foreground classes, "dice_regions" is that over the regions, if there are any;
    "dice_<region>" and "dice_<class>" follow, " (region)" or " (class)" behind a name that is taken.
    """
    result = metrics.compute()
    foreground = [result["classes"][name] for name in metrics.class_names[1:]]
    columns = {key: result[key] for key in ("accuracy", "mean_iou", "dice")}
    columns["dice_foreground"] = fmean(scores["dice"] for scores in foreground)
    if metrics.regions:
        columns["dice_regions"] = fmean(scores["dice"] for scores in result["regions"].values())
    for key in ("precision", "sensitivity", "specificity"):
        columns[key] = fmean(scores[key] for scores in foreground)
    for kind, names in (("region", metrics.regions), ("class", metrics.class_names)):
        for name in names:
            column = f"dice_{name}"
            scores = result["regions" if kind == "region" else "classes"][name]
            columns[f"{column} ({kind})" if column in columns else column] = scores["dice"]
    return columns


def judged_by(row: Row) -> float:
    """The Dice of a row of the log by which epochs are compared: the mean over the regions, else over the classes."""
    return row.get("dice_regions", row["dice_foreground"])


def write_log(run: Path, history: Sequence[Row]) -> None:
    """Writes ``log.csv``, a row per finished epoch."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(history[0]) if history else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(run / LOG, stream.getvalue())


def write_curves(run: Path, history: Sequence[Row], labels: LabelMap) -> None:
    """Writes ``curves.png``, of the regions if these were trained, else of the foreground classes."""
    from fastunet.pictures.curves import curves

    kind, names, mean = "class", labels.class_names[1:], "foreground"
    if labels.region_order:
        kind, names, mean = "region", labels.outputs, "regions"
    known = history[0] if history else ()
    columns = {name: f"dice_{name}" for name in names}
    columns = {name: own if (own := f"{column} ({kind})") in known else column for name, column in columns.items()}
    write_bytes(run / CURVES, curves(history, columns, (f"mean of the {mean}", f"dice_{mean}")))
