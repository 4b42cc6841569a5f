"""What a run shows for itself: a row of the log per epoch, ``log.csv`` and ``curves.png``."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path

from fastunet.files import write_bytes, write_text
from fastunet.metrics import SegmentationMetrics

LOG, CURVES = "log.csv", "curves.png"


def metric_columns(metrics: SegmentationMetrics) -> dict[str, float]:
    """The metrics of all pixels as columns of the log.

    "dice" is the mean over all classes as in the Keras source; "dice_foreground", precision, sensitivity and
    specificity are means over the foreground classes; "dice_<class>" follow, " (class)" behind a name that is taken.
    """
    result = metrics.compute()
    foreground = [result["classes"][name] for name in metrics.class_names[1:]]
    columns = {key: result[key] for key in ("accuracy", "mean_iou", "dice")}
    columns["dice_foreground"] = _mean([scores["dice"] for scores in foreground])
    for key in ("precision", "sensitivity", "specificity"):
        columns[key] = _mean([scores[key] for scores in foreground])
    for name in metrics.class_names:
        column = f"dice_{name}"
        columns[f"{column} (class)" if column in columns else column] = result["classes"][name]["dice"]
    return columns


def write_log(run: Path, history: Sequence[dict]) -> None:
    """Writes ``log.csv``, a row per finished epoch."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(history[0]) if history else ["epoch"], lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    write_text(run / LOG, stream.getvalue())


def write_curves(run: Path, history: Sequence[dict], class_names: Sequence[str]) -> None:
    """Writes ``curves.png``."""
    from fastunet.pictures.curves import curves

    write_bytes(run / CURVES, curves(history, class_names))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
