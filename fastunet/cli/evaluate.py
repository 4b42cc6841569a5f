"""``fastunet evaluate``: scores of a model on labelled cases, or of label files against the truth."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from fastunet.cli.segment import VOLUME_SUFFIXES, add_model_options, make_segmenter, progress_display
from fastunet.errors import UserError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", type=Path, metavar="MODEL|PREDICTIONS",
                        help="a run folder or checkpoint; or a folder of <case>.nii.gz, or a label file")  # fmt: skip
    parser.add_argument("truth", type=Path, metavar="DATA|TRUTH",
                        help="a data folder with labels, a folder of <case>.nii.gz, or one label file")  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write every score as CSV")
    parser.add_argument("--empty", choices=("one", "skip"), default="one",
                        help="Dice of what the truth lacks: as in BraTS, or not scored (default: one)")  # fmt: skip
    parser.add_argument("--labels", metavar="EDITION", help="label table of plain label files, such as brats2021")
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    from fastunet.inference.scores import csv_table, text_table

    if not args.subject.exists():
        raise UserError(f"{args.subject}: there is no such file or folder")
    if args.csv:
        from fastunet.files import make_output_folder, write_text
        from fastunet.outputs import check_outputs

        check_outputs([args.csv], _inputs(args))
        make_output_folder(args.csv.parent)
    scores = list(_model_scores(args) if _is_model(args.subject) else _file_scores(args))
    print(text_table(scores, empty=args.empty))
    if args.csv:
        write_text(args.csv, csv_table(scores))


def _inputs(args: argparse.Namespace) -> list[Path]:
    """Every file that will be read."""
    from fastunet.training.checkpoint import checkpoint_file

    found = [args.truth / "dataset.json"]
    if not _is_model(args.subject):
        return found + [path for pair in _pairs(args) for path in pair[1:3]]
    cases = labelled_cases(args.truth, None, args.labels)
    return found + [checkpoint_file(args.subject), *(path for case in cases for path in case.files)]


def labelled_cases(root: Path, modalities, edition: str | None = None) -> list:
    """The cases of ``root`` that have a label; none at all is a ``UserError``."""
    from fastunet.data import discover_cases

    cases = [case for case in discover_cases(root, modalities=modalities, edition=edition) if case.label]
    if not cases:
        raise UserError(f"{root} holds no labelled cases")
    return cases


def evaluate_case(segmenter, case, *, empty: str = "one", on_nan: str = "error", progress=None) -> list:
    """Segments a labelled case and scores the result; also for other callers, such as the demo."""
    from fastunet.data import read_labels

    if case.label_map.class_names != tuple(segmenter.card.class_names):
        names, known = ", ".join(case.label_map.class_names), ", ".join(segmenter.card.class_names)
        raise UserError(f"{case.label}: its classes are {names}; the model knows {known}")
    slices = segmenter.open(case, on_nan=on_nan)
    truth = read_labels(case.label, case.label_map)
    if truth.shape != slices.like.data.shape:
        raise UserError(f"{case.label} has shape {truth.shape}, its volumes {slices.like.data.shape}")
    return _scored(case.name, segmenter.labels(slices, progress), truth, case.label_map, empty)


def _is_model(path: Path) -> bool:
    from fastunet.training.checkpoint import BEST, LAST

    return path.suffix == ".safetensors" or any((path / name).is_file() for name in (BEST, LAST))


def _model_scores(args: argparse.Namespace) -> Iterator:
    segmenter = make_segmenter(args, args.subject)
    for case in labelled_cases(args.truth, segmenter.card.modalities, args.labels):
        progress = progress_display(case.name)
        yield from evaluate_case(segmenter, case, empty=args.empty, on_nan=args.on_nan, progress=progress)


def _file_scores(args: argparse.Namespace) -> Iterator:
    from fastunet.data import read_geometry, read_labels

    for name, predicted_path, truth_path, labels in _pairs(args):
        truth = read_labels(truth_path, labels)
        predicted = read_labels(predicted_path, labels)
        if predicted.shape != truth.shape:
            raise UserError(f"{predicted_path} has shape {predicted.shape}, {truth_path} has {truth.shape}")
        if abs(read_geometry(predicted_path).affine - read_geometry(truth_path).affine).max() > 1e-3:
            raise UserError(f"{predicted_path} and {truth_path} differ in affine")
        yield from _scored(name, predicted, truth, labels, args.empty)


def _pairs(args: argparse.Namespace) -> list[tuple]:
    """(case, prediction, truth, label table) for every truth; each must have its prediction."""
    if args.truth.is_file() or args.subject.is_file():
        if not (args.truth.is_file() and args.subject.is_file()):
            raise UserError(f"{args.subject} and {args.truth} must both be label files, or both be folders")
        return [(_stem(args.truth), args.subject, args.truth, _named_table(args))]
    if not args.truth.is_dir():
        raise UserError(f"{args.truth}: there is no such file or folder")
    plain = sorted(path for path in args.truth.iterdir() if path.name.endswith(VOLUME_SUFFIXES))
    if plain and not (args.truth / "dataset.json").is_file():
        truths = [(_stem(path), path, _named_table(args)) for path in plain]
    else:
        cases = labelled_cases(args.truth, None, args.labels)
        truths = [(case.name, case.label, case.label_map) for case in cases]
    return [(name, _prediction(args.subject, name), path, labels) for name, path, labels in truths]


def _prediction(folder: Path, name: str) -> Path:
    for suffix in reversed(VOLUME_SUFFIXES):
        if (folder / (name + suffix)).is_file():
            return folder / (name + suffix)
    raise UserError(f"{folder} holds no prediction {name}.nii.gz")


def _named_table(args: argparse.Namespace):
    from fastunet.data import LABEL_MAPS

    if args.labels not in LABEL_MAPS:
        found = "missing" if args.labels is None else f"{args.labels!r}"
        raise UserError(f"--labels is {found}; plain label files need one of {', '.join(LABEL_MAPS)}")
    return LABEL_MAPS[args.labels]


def _scored(name: str, predicted, truth, labels, empty: str) -> list:
    import torch

    from fastunet.inference.scores import score_case
    from fastunet.metrics import SegmentationMetrics

    metrics = SegmentationMetrics(len(labels.class_names), labels.class_names, empty=empty, regions=labels.regions)
    for plane, true_plane in zip(predicted.swapaxes(0, -1), truth.swapaxes(0, -1), strict=True):
        metrics.update(torch.from_numpy(plane.copy())[None], torch.from_numpy(true_plane.copy())[None])
    return score_case(name, metrics)


def _stem(path: Path) -> str:
    return path.name.removesuffix(".gz").removesuffix(".nii")
