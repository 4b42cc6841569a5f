"""``fastunet evaluate``: scores of a model on labelled cases, or of label files against the truth."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastunet.cli.arguments import progress_display, say
from fastunet.cli.segment import add_model_options, make_segmenter
from fastunet.errors import UserError

if TYPE_CHECKING:
    import numpy as np

    from fastunet.data import Case, LabelMap
    from fastunet.data.volumes import Geometry
    from fastunet.inference.scores import Score
    from fastunet.inference.segmenter import Segmenter

    Pair = tuple[str, Path, Path, LabelMap, Case | None]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", type=Path, metavar="MODEL|PREDICTIONS",
                        help="a run folder or checkpoint; or a folder of label files, or one of them")  # fmt: skip
    parser.add_argument("truth", type=Path, metavar="DATA|TRUTH",
                        help="a data folder with labels, a folder of label files, or one of them")  # fmt: skip
    parser.add_argument("--csv", type=Path, metavar="FILE", help="also write every score as CSV")
    parser.add_argument("--overwrite", action="store_true", help="replace a FILE that exists")
    parser.add_argument("--empty", choices=("one", "skip"), default="one",
                        help="Dice of what the truth lacks: as in BraTS, or not scored (default: one)")  # fmt: skip
    parser.add_argument("--hd95", action="store_true",
                        help="also the 95th percentile of the surfaces' distance, in millimetres")  # fmt: skip
    parser.add_argument("--labels", metavar="TABLE",
                        help="of plain label files: an edition such as brats2021, a dataset.json, or a run "
                        "(default: a dataset.json beside them, else the values found)")  # fmt: skip
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    from fastunet.inference.scores import csv_table, text_table

    if not args.subject.exists():
        raise UserError(f"{args.subject}: there is no such file or folder")
    pairs = [] if _is_model(args.subject) else _pairs(args)
    if pairs and args.subject.is_dir():
        _note_unscored(args.subject, [predicted for _, predicted, *_ in pairs])
    if args.csv:
        from fastunet.files import make_output_folder, write_text
        from fastunet.outputs import check_outputs

        check_outputs([args.csv], _inputs(args, pairs), overwrite=args.overwrite)
        make_output_folder(args.csv.parent)
    scores = list(_file_scores(pairs, args.empty, args.hd95) if pairs else _model_scores(args))
    say(*text_table(scores, empty=args.empty))
    if args.csv:
        write_text(args.csv, csv_table(scores))


def _inputs(args: argparse.Namespace, pairs: list[Pair]) -> list[Path]:
    """Every file that will be read."""
    from fastunet.training.checkpoint import checkpoint_file

    found = [args.truth / "dataset.json"]
    if pairs:
        return found + [path for _, *both, _, case in pairs for path in [*both, *(case.masks if case else ())]]
    cases = labelled_cases(args.truth, None, args.labels)
    return found + [checkpoint_file(args.subject), *(path for case in cases for path in case.files)]


def labelled_cases(root: Path, modalities: Sequence[str] | None, edition: str | None) -> list[Case]:
    """The cases of ``root`` that have a label; none at all is a ``UserError``."""
    from fastunet.data import discover_cases
    from fastunet.data.image_folders import no_labels

    cases = [case for case in discover_cases(root, modalities=modalities, edition=edition) if case.label]
    if not cases:
        raise UserError(no_labels(root))
    return cases


def evaluate_case(
    segmenter: Segmenter, case: Case, *, empty: str = "one", on_nan: str = "error", hd95: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> list[Score]:
    """Segments a labelled case and scores the result; also for other callers, such as the demo."""
    from fastunet.data import check_geometry
    from fastunet.data.single_masks import case_labels

    table = segmenter.truth_table(case)
    if table is None:
        names, known = ", ".join(case.label_map.class_names), ", ".join(segmenter.card.class_names)
        raise UserError(f"{case.label}: its classes are {names}; the model knows {known}")
    grid = check_geometry(case, segmenter.card.modalities)
    slices = segmenter.open(case, on_nan=on_nan)
    truth = case_labels(case, table)
    return _scored(case.name, segmenter.labels(slices, progress), truth, table, empty, grid if hd95 else None)


def _is_model(path: Path) -> bool:
    from fastunet.training.checkpoint import BEST, LAST

    return path.suffix == ".safetensors" or any((path / name).is_file() for name in (BEST, LAST))


def _model_scores(args: argparse.Namespace) -> Iterator[Score]:
    segmenter = make_segmenter(args, args.subject)
    for case in labelled_cases(args.truth, segmenter.card.modalities, args.labels):
        progress = progress_display(case.name)
        yield from evaluate_case(segmenter, case, empty=args.empty, on_nan=args.on_nan, hd95=args.hd95,
                                 progress=progress)  # fmt: skip


def _file_scores(pairs: list[Pair], empty: str, hd95: bool) -> Iterator[Score]:
    from fastunet.data import IGNORED, read_geometry, read_labels
    from fastunet.data.grids import check_same_grid
    from fastunet.data.single_masks import case_labels

    for name, predicted_path, truth_path, labels, case in pairs:
        grid = read_geometry(truth_path)
        check_same_grid(grid, read_geometry(predicted_path))
        truth = case_labels(case, labels) if case else read_labels(truth_path, labels)
        predicted = read_labels(predicted_path, labels)
        if (predicted == IGNORED).any():
            raise UserError(
                f"{predicted_path} holds {labels.ignore}, the label that is ignored, which predicts nothing"
            )
        yield from _scored(name, predicted, truth, labels, empty, grid if hd95 else None)


def _pairs(args: argparse.Namespace) -> list[Pair]:
    """(case, prediction, truth, label table) for every truth; each must have its prediction."""
    from fastunet.data import LABEL_MAPS
    from fastunet.data.formats import is_listed, stem_of
    from fastunet.data.image_folders import MARKED

    if args.truth.is_file() or args.subject.is_file():
        if not (args.truth.is_file() and args.subject.is_file()):
            raise UserError(f"{args.subject} and {args.truth} must both be label files, or both be folders")
        table = _table([args.truth], [args.subject], args)
        return [(stem_of(args.truth), args.subject, args.truth, table, None)]
    if not args.truth.is_dir():
        raise UserError(f"{args.truth}: there is no such file or folder")
    plain = sorted(path for path in args.truth.iterdir() if is_listed(path) and path.is_file())
    masks = [path for path in plain if MARKED.fullmatch(stem_of(path))]
    inner = any(path.is_dir() and MARKED.fullmatch(path.name) for path in args.truth.iterdir())
    if not plain or (args.truth / "dataset.json").is_file() or 0 < len(masks) < len(plain) or inner:
        named = None if args.labels is None or args.labels in LABEL_MAPS else _table([], [], args)
        cases = labelled_cases(args.truth, None, None if named else args.labels)
        own = cases[0].label_map
        if cases[0].masks and named is None:
            say(f"labels by the names in {args.truth}: {own}; with --labels RUN as a model numbers them")
        elif cases[0].masks and named and (unknown := {*own.class_names} - {*named.class_names}):
            raise UserError(f"{args.labels} has no classes {', '.join(sorted(unknown))}, which {args.truth} has")
        return [(case.name, _prediction(args.subject, case.name, truth), truth, named or case.label_map, case)
                for case in cases if (truth := case.label)]  # fmt: skip
    predictions = [_prediction(args.subject, stem_of(path), path) for path in plain]
    table = _table(plain, predictions, args)
    return [(stem_of(path), predicted, path, table, None) for path, predicted in zip(plain, predictions, strict=True)]


def _note_unscored(folder: Path, scored: list[Path]) -> None:
    """Says which predictions have no truth; what ``segment`` writes beside the label files is none."""
    from fastunet.data.formats import stem_of, suffix_of
    from fastunet.errors import warn_once

    suffixes, beside = {suffix_of(path) for path in scored}, tuple(f"{stem_of(path)}_" for path in scored)
    rest = sorted(path.name for path in {*folder.iterdir()} - {*scored} if suffix_of(path) in suffixes)
    if rest := [name for name in rest if not name.startswith((".", *beside))]:
        warn_once("unscored", f"{len(rest)} files of {folder}, such as {rest[0]}, have no truth, and are not scored")


def _prediction(folder: Path, name: str, truth: Path) -> Path:
    """The prediction of a case: an image if the truth is one, for ``segment`` writes pictures beside volumes."""
    from fastunet.data.formats import is_image, is_listed, stem_of
    from fastunet.data.image_folders import image_finder

    files = sorted(path for path in folder.iterdir() if is_listed(path) and is_image(path) == is_image(truth))
    stems, matches = dict.fromkeys(map(stem_of, files)), image_finder([name])
    named = image_finder(stems)(name)
    found = [path for path in files if (stem_of(path) == named if named else matches(stem_of(path)))]
    if len(found) != 1:
        several = f"{len(found)} predictions" if found else "no prediction"
        raise UserError(f"{folder} holds {several} of the name {name}; one label file is wanted")
    return found[0]


def _table(truths: list[Path], predictions: list[Path], args: argparse.Namespace) -> LabelMap:
    """The table of plain label files: the one that is named, that of a ``dataset.json`` nearby, or the values found."""
    from fastunet.data import LABEL_MAPS, LabelMap
    from fastunet.data.dataset_json import read_label_map
    from fastunet.data.masks import found_table
    from fastunet.training.checkpoint import load_model

    if args.labels in LABEL_MAPS:
        return LABEL_MAPS[args.labels]
    if args.labels is not None:
        named = Path(args.labels)
        if named.name == "dataset.json":
            return read_label_map(named)
        if not named.exists():
            raise UserError(
                f"--labels is {args.labels!r}; it names a dataset.json, a run or one of {', '.join(LABEL_MAPS)}"
            )
        return LabelMap.from_dict(load_model(named)[1].labels, named)
    files = [*reversed(truths), *reversed(predictions)]
    folders = list(dict.fromkeys(parent for path in files for parent in (path.parent, path.parent.parent)))
    file = next((folder / "dataset.json" for folder in folders if (folder / "dataset.json").is_file()), None)
    table = found_table(truths, predictions) if file is None else read_label_map(file)
    say(f"labels as {'found' if file is None else f'{file} has them'}: {table}")
    return table


def _scored(
    name: str, predicted: np.ndarray, truth: np.ndarray, labels: LabelMap, empty: str, grid: Geometry | None
) -> list[Score]:
    """Scores of class indices; on a ``grid`` with HD95, for which what is ignored belongs to no structure."""
    import numpy as np
    import torch

    from fastunet.data import IGNORED
    from fastunet.inference.scores import score_case
    from fastunet.inference.surface import hd95
    from fastunet.metrics import SegmentationMetrics

    ignored = None if labels.ignore is None else IGNORED
    metrics = SegmentationMetrics(
        len(labels.class_names), labels.class_names, empty=empty, regions=labels.regions, ignore_index=ignored
    )
    for plane, true_plane in zip(predicted.swapaxes(0, -1), truth.swapaxes(0, -1), strict=True):
        metrics.update(torch.from_numpy(plane.copy())[None], torch.from_numpy(true_plane.copy())[None])
    if grid is None:
        return score_case(name, metrics)
    spacing = np.linalg.norm(grid.affine[:3, :3], axis=0).tolist()
    counted = truth != IGNORED

    def distance(classes: list[int]) -> float:
        return hd95(np.isin(truth, classes), np.isin(predicted, classes) & counted, spacing, empty=empty)

    return score_case(name, metrics, distance)
