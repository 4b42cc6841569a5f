"""``fastunet check``: what a data folder holds, and every reason why training would refuse it."""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastunet.cli.arguments import say
from fastunet.cli.train import add_options
from fastunet.errors import UserError

if TYPE_CHECKING:
    from fastunet.data.checks import CaseReport

_MOST_SIZES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", type=Path, help="a folder of cases; every file in it is read once")
    add_options(parser)


def run(args: argparse.Namespace) -> None:
    from tqdm import tqdm

    from fastunet.data.cases import discover_cases
    from fastunet.data.checks import inspect_case
    from fastunet.data.image_folders import no_labels
    from fastunet.training.config import TrainConfig
    from fastunet.training.plan import check_batch_size, plan_training, training_modalities

    given = {name: value for name, value in vars(args).items() if name not in ("run", "command")}
    config = TrainConfig(**given | {"data": str(args.data)})
    problems: list[str] = []
    try:
        cases = discover_cases(args.data, modalities=None, edition=config.edition, ignore=config.ignore_label,
                               refused=problems.append)  # fmt: skip
    except UserError as error:
        if not problems:
            raise
        cases = []
        problems.append(str(error))
    trainable = [case for case in cases if case.label is not None]
    modalities = config.modalities or (training_modalities(trainable or cases) if cases else ())
    bar = tqdm(cases, unit="case", leave=False, disable=not sys.stderr.isatty())
    reports = [inspect_case(case, modalities, on_nan=config.on_nan, axis=config.axis) for case in bar]
    labelled = [report for report in reports if report.case.label is not None]
    aside = [problem for report in reports if report not in labelled for problem in report.problems]
    remarks = [remark for report in reports for remark in report.remarks]
    problems += [problem for report in labelled for problem in report.problems]
    notes: list[str] = []
    if labelled:
        plan, found = plan_training(config, trainable, notes.append)
        problems += found
        trained = {case.label for case in plan.split.train} if plan else set()
        if plan and plan.tile is None and not problems:
            count = sum(report.slices for report in labelled if report.case.label in trained)
            try:
                check_batch_size(config, count, "slices")
            except UserError as error:
                problems.append(str(error))
        problems += _without_foreground([report for report in labelled if report.case.label in trained or not plan])
    elif cases:
        problems.append(no_labels(args.data))
    say(*_described(args.data, reports, modalities), *notes)
    every, problems = _without_repeats(problems + remarks), _without_repeats(problems)
    for title, found in (
        ("problems of cases without labels, which training leaves out", _without_repeats(aside)),
        ("what training does not need, or takes as it is", every[len(problems) :]),
        ("problems", problems),
    ):
        if found:
            say("", f"{title}:", *(f"- {problem}" for problem in found))
    if problems:
        raise UserError(f"{args.data} has {len(problems)} problem{'s'[: len(problems) > 1]}; training would refuse it")
    say("", "no problem found")


def _without_repeats(problems: Sequence[str]) -> list[str]:
    """Each problem once, and a library that many files need once for all of them."""
    alike: dict[str, list[str]] = {}
    for problem in dict.fromkeys(problems):
        _, found, advice = problem.partition("pip install")
        alike.setdefault(advice if found else problem, []).append(problem)
    return [same[0] + (f" (and {len(same) - 1} more files)" if same[1:] else "") for same in alike.values()]


def _without_foreground(trained: Sequence[CaseReport]) -> list[str]:
    from fastunet.data.checks import foreground

    readable = [report for report in trained if not report.problems]
    if readable and not any(map(foreground, readable)):
        return [f"none of {len(readable)} label files for training holds anything but background"]
    return []


def _described(data: Path, reports: Sequence[CaseReport], modalities: Sequence[str]) -> list[str]:
    """The report as lines: cases, then label values, intensities, and what differs between cases."""
    if not reports:
        return [f"{data} holds no case that can be used"]
    labelled = [report for report in reports if report.case.label is not None]
    patients = len({report.case.patient for report in reports})
    first = reports[0].case
    return [
        f"{data}: {len(reports)} cases of {patients} patients, {len(labelled)} labelled; {first.edition}",
        f"channels: {', '.join(first.modalities)}; training takes {', '.join(modalities)}",
        "",
        *_case_table(reports),
        "",
        *_label_table(labelled),
        *_intensity_table(reports),
        *_differences(reports),
    ]


def _case_table(reports: Sequence[CaseReport]) -> list[str]:
    from fastunet.data.checks import foreground

    rows = [("case", "size", "spacing in mm", "axes", "foreground")]
    for report in reports:
        size = "?" if report.geometry is None else " × ".join(map(str, report.geometry.shape[:3]))
        spacing = " × ".join(f"{length:.4g}" for length in report.spacing) or "?"
        share = "no labels" if report.case.label is None else f"{foreground(report)}"
        rows.append((report.case.name, size, spacing, report.axes or "?", share))
    return _aligned(rows)


def _label_table(labelled: Sequence[CaseReport]) -> list[str]:
    from fastunet.data.labels import value_name

    if not labelled:
        return []
    table = labelled[0].case.label_map
    named = dict(zip(table.values, table.class_names))
    named |= {
        alias: f"{table.class_names[index]} (for {table.values[index]})" for alias, index in table.aliases.items()
    }
    named |= {} if table.ignore is None else {table.ignore: "(ignored)"}
    voxels: Counter[int] = Counter()
    cases: Counter[int] = Counter()
    for report in labelled:
        voxels.update(report.values)
        cases.update(report.values.keys())
    total = max(voxels.total(), 1)
    rows = [("label", "class", "voxels", "share", "cases")]
    # A value that no file holds is listed too, unless it only stands in for another.
    for value in sorted({*voxels, *table.values}):
        share = f"{100 * voxels[value] / total:.3g} %"
        rows.append(
            (value_name(value), named.get(value, "NOT IN THE TABLE"), f"{voxels[value]}", share, f"{cases[value]}")
        )
    painted = f"regions, each painted over those before it (regions_class_order): {table.painting}"
    return [*_aligned(rows), *([painted] if table.region_order else []), ""]


def _intensity_table(reports: Sequence[CaseReport]) -> list[str]:
    rows = [("channel", "least", "mean", "greatest", "zeros")]
    for name in dict.fromkeys(name for report in reports for name in report.intensities):
        found = [report.intensities[name] for report in reports if name in report.intensities]
        mean, zeros = (sum(getattr(one, what) for one in found) / len(found) for what in ("mean", "zeros"))
        least, greatest = min(one.least for one in found), max(one.greatest for one in found)
        rows.append((name, f"{least:.4g}", f"{mean:.4g}", f"{greatest:.4g}", f"{100 * zeros:.3g} %"))
    return _aligned(rows)


def _differences(reports: Sequence[CaseReport]) -> list[str]:
    """Lines on what training allows to differ between cases, where it does."""
    lines = []
    for what, values in (
        ("sizes", [report.geometry.shape[:3] for report in reports if report.geometry]),
        ("spacings", [tuple(round(length, 3) for length in report.spacing) for report in reports if report.geometry]),
        ("axes", [report.axes for report in reports if report.geometry]),
    ):
        counted = Counter(values).most_common()
        if len(counted) > 1:
            shown = ", ".join(
                f"{value if isinstance(value, str) else ' × '.join(map(str, value))} ({count})"
                for value, count in counted[:_MOST_SIZES]
            )
            lines.append(f"{what} differ: {shown}{', …' if len(counted) > _MOST_SIZES else ''}")
    return ["", *lines] if lines else []


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
