"""Scores of one segmented case: overlap and distance per class and region, one stated rule for empty structures."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fastunet.metrics import SegmentationMetrics

EMPTY_RULES = {
    "one": "A structure empty in truth and prediction scores 1; one empty in the truth only scores 0.",
    "skip": "A structure that the truth does not contain is not scored (–) and left out of the means.",
}
"""What Dice and IoU are where the truth is empty (the rules of :class:`SegmentationMetrics`), in words."""
DISTANCE_RULES = {
    "one": "0 where a structure is empty in truth and prediction, the volume's diagonal where it is in one of them",
    "skip": "the volume's diagonal where the prediction is empty, – where the truth is",
}
"""What HD95 is where a structure is empty, in words."""
COLUMNS = ("dice", "iou", "precision", "sensitivity", "specificity")


@dataclass(frozen=True)
class Score:
    """Scores of one ``structure`` (a class or a region) of one case; NaN where a score is not defined."""

    case: str
    structure: str
    kind: str
    dice: float
    iou: float
    precision: float
    sensitivity: float
    specificity: float
    truth_voxels: int
    predicted_voxels: int
    hd95: float = float("nan")


def score_case(
    case: str, metrics: SegmentationMetrics, distance: Callable[[list[int]], float] | None = None
) -> list[Score]:
    """A score for each foreground class, then for each region, of ``metrics`` that have counted this case alone.

    ``distance`` gives the HD95 of the structure that some classes make up.
    """
    result, matrix = metrics.compute(), metrics.matrix
    structures = [(name, "class", [index]) for index, name in enumerate(metrics.class_names) if index]
    structures += [(name, "region", list(classes)) for name, classes in metrics.regions.items()]
    scores = []
    for name, kind, classes in structures:
        values = dict(result["classes" if kind == "class" else "regions"][name])
        truth, predicted = int(matrix[classes].sum()), int(matrix[:, classes].sum())
        # The metrics give 0 for 0 / 0, as Keras does; in a table that would read as a failure.
        values["precision"] = values["precision"] if predicted else float("nan")
        values["sensitivity"] = values["sensitivity"] if truth else float("nan")
        columns = {column: float(values[column]) for column in COLUMNS}
        columns |= {} if distance is None else {"hd95": distance(classes)}
        scores.append(Score(case, name, kind, truth_voxels=truth, predicted_voxels=predicted, **columns))
    return scores


def mean_scores(scores: Sequence[Score]) -> list[Score]:
    """The mean over the cases of each structure's scores, each over the cases in which it is defined."""
    grouped: dict[tuple[str, str], list[Score]] = {}
    for score in scores:
        grouped.setdefault((score.kind, score.structure), []).append(score)
    return [
        Score("mean", structure, kind, truth_voxels=sum(s.truth_voxels for s in group),
              predicted_voxels=sum(s.predicted_voxels for s in group), **column_means(group))
        for (kind, structure), group in grouped.items()
    ]  # fmt: skip


def column_means(scores: Sequence[Score]) -> dict[str, float]:
    """The mean of each column over the scores for which it is defined."""
    return {column: _mean([getattr(score, column) for score in scores]) for column in (*COLUMNS, "hd95")}


def mean_foreground_dice(scores: Sequence[Score]) -> float:
    """The mean Dice over all cases and foreground classes (regions left out)."""
    return _mean([s.dice for s in scores if s.kind == "class"])


def mean_region_dice(scores: Sequence[Score]) -> float:
    """The mean Dice over all cases and regions; NaN if there are none."""
    return _mean([s.dice for s in scores if s.kind == "region"])


def text_table(scores: Sequence[Score], *, empty: str = "one") -> list[str]:
    """Lines: Dice per case (rows) and structure (columns), the means below, and the rule for empty structures.

    If there are any, HD95 follows in the same way.
    """
    lines = _text_table(scores, "Dice", "dice")
    regions = mean_region_dice(scores)
    over_regions = "" if math.isnan(regions) else f" Mean region Dice: {cell(regions)}."
    lines.append(f"Mean foreground Dice: {cell(mean_foreground_dice(scores))}.{over_regions} {EMPTY_RULES[empty]}")
    if _has_distances(scores):
        lines += ["", *_text_table(scores, "HD95", "hd95")]
        lines.append(f"HD95 is in millimetres (of images in pixels); {DISTANCE_RULES[empty]}.")
    return lines


def _text_table(scores: Sequence[Score], title: str, column: str) -> list[str]:
    means = mean_scores(scores)
    structures = [(s.kind, s.structure) for s in means]
    by_case: dict[str, dict[tuple[str, str], Score]] = {}
    for score in [*scores, *means]:
        by_case.setdefault(score.case, {})[score.kind, score.structure] = score
    # A class and a region may share a name ("enhancing tumour"), so the header says which is which.
    header = [["", *(kind for kind, _ in structures)], [title, *(name for _, name in structures)]]
    body = [[case, *(cell(getattr(row[s], column)) for s in structures)] for case, row in by_case.items()]
    widths = [max(len(row[i]) for row in header + body) for i in range(len(structures) + 1)]

    def line(row: Sequence[str]) -> str:
        return "  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:]))])

    rule = "-" * (sum(widths) + 2 * len(structures))
    return [*map(line, header), rule, *map(line, body[:-1]), rule, line(body[-1])]


def _has_distances(scores: Sequence[Score]) -> bool:
    return not all(math.isnan(score.hd95) for score in scores)


def csv_table(scores: Sequence[Score]) -> str:
    """Every score of every case and structure, then the means, as CSV; undefined scores are empty cells.

    If there are regions, a last row has the means over all cases and regions: structure "regions", kind "mean".
    """
    columns = (*COLUMNS, "hd95") if _has_distances(scores) else COLUMNS
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(["case", "structure", "kind", *columns, "truth_voxels", "predicted_voxels"])
    for s in [*scores, *mean_scores(scores)]:
        values = [_number(getattr(s, column)) for column in columns]
        writer.writerow([s.case, s.structure, s.kind, *values, s.truth_voxels, s.predicted_voxels])
    if regions := [s for s in scores if s.kind == "region"]:
        means = column_means(regions)
        writer.writerow(["mean", "regions", "mean", *(_number(means[column]) for column in columns), "", ""])
    return stream.getvalue()


def _mean(values: Sequence[float]) -> float:
    defined = [v for v in values if not math.isnan(v)]
    return sum(defined) / len(defined) if defined else float("nan")


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6f}"


def cell(value: float) -> str:
    """A score as tables show it."""
    return "–" if math.isnan(value) else f"{value:.3f}"
