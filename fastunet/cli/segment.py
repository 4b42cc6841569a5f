"""``fastunet segment``: label files for cases, volumes and images."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastunet.cli.arguments import add_machine_options, add_nan_option, positive_int, progress_display, say, set_threads
from fastunet.errors import UserError
from fastunet.training.config import PRECISIONS

if TYPE_CHECKING:
    import numpy as np

    from fastunet.data import Case, CaseSlices, LabelMap
    from fastunet.inference.segmenter import Segmenter

ARRAY_SUFFIX = ".npy"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", type=Path, help="a run folder, or a checkpoint in it")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT",
                        help="a data folder, a case folder, volumes, or 2-D images (.png, .tif, .npy, …)")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="where the label files go")
    parser.add_argument("--probabilities", action="store_true", help="also write a probability map per class or region")
    parser.add_argument("--overlay", action="store_true", help="also write a picture of the most telling slice")
    parser.add_argument("--tile", type=positive_int, metavar="SIDE",
                        help="run in overlapping tiles of this input size, with mirrored borders")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")
    add_model_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """How to run a network, shared with ``fastunet evaluate``."""
    parser.add_argument("--tta", action="store_true", help="average the probabilities of mirrored slices")
    parser.add_argument("--batch-size", type=positive_int, default=4, help="slices at a time (default: 4)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    parser.add_argument("--backend", choices=("auto", "triton", "torch"), default="auto", help="default: auto")
    add_machine_options(parser)
    add_nan_option(parser)


def run(args: argparse.Namespace) -> None:
    from fastunet.cli.arrays import segment_arrays
    from fastunet.files import make_output_folder
    from fastunet.outputs import check_outputs

    segmenter = make_segmenter(args, args.model)
    arrays = [path for path in args.inputs if path.suffix.lower() == ARRAY_SUFFIX]
    cases = find_cases([path for path in args.inputs if path not in arrays], segmenter)
    check_outputs(_outputs(cases, arrays, segmenter, args), _inputs(cases, args), overwrite=args.overwrite)
    make_output_folder(args.out)
    for case in cases:
        _segment_case(segmenter, case, label_path(args.out, case, segmenter.label_map), args)
    segment_arrays(segmenter, arrays, args)


def label_path(folder: Path, case: Case, labels: LabelMap) -> Path:
    """Where the labels of a case go, in the values of the table ``labels``."""
    from fastunet.data.image_files import mask_suffix

    return folder / f"{case.name}{mask_suffix(case, labels) if case.is_image else '.nii.gz'}"


def picture_path(folder: Path, case: Case) -> Path:
    """Where the picture of a case goes."""
    return folder / (f"{case.name}_overlay.png" if case.is_image else f"{case.name}.png")


def _inputs(cases: list[Case], args: argparse.Namespace) -> list[Path]:
    from fastunet.training.checkpoint import checkpoint_file

    folders = [path / "dataset.json" for path in args.inputs]
    return [checkpoint_file(args.model), *args.inputs, *folders, *(path for case in cases for path in case.files)]


def _outputs(cases: list[Case], arrays: list[Path], segmenter: Segmenter, args: argparse.Namespace) -> list[Path]:
    from fastunet.cli.arrays import overlay_path
    from fastunet.inference.segmenter import probability_path

    labels = [label_path(args.out, case, segmenter.label_map) for case in cases]
    outputs = labels + [args.out / path.name for path in arrays]
    if args.probabilities:
        outputs += [probability_path(path, name) for path in labels for name in segmenter.label_map.outputs]
    if args.overlay:
        outputs += [picture_path(args.out, case) for case in cases]
        outputs += [overlay_path(args.out, path) for path in arrays]
    return outputs


def make_segmenter(args: argparse.Namespace, source: Path) -> Segmenter:
    """The network in ``source`` on the device that ``args`` name."""
    from fastunet.inference.segmenter import Segmenter
    from fastunet.training.checkpoint import load_model
    from fastunet.training.distributed import pick_device
    from fastunet.training.precision import prepare

    set_threads(args.threads)
    device = pick_device(args.device)
    prepare(device, args.precision)
    model, card = load_model(source, backend=args.backend)
    options = dict(tile=getattr(args, "tile", None), tta=args.tta)
    return Segmenter(model.to(device), card, device, args.batch_size, args.precision, **options)


def find_cases(inputs: list[Path], segmenter: Segmenter) -> list[Case]:
    """The cases of folders, volumes and images, in order, with names that occur once; bare folders of images count."""
    from fastunet.data import cases_from_files, discover_cases
    from fastunet.data.formats import IMAGE_SUFFIXES, SUFFIXES, is_listed, suffix_of
    from fastunet.data.image_folders import image_folder_cases

    modalities = segmenter.card.modalities
    cases, files = [], []
    for path in inputs:
        if path.is_dir():
            images = sorted(p for p in path.iterdir() if is_listed(p, IMAGE_SUFFIXES) and not p.is_dir())
            if segmenter.card.images and images and not image_folder_cases(path):
                files += _without_masks(path, images)
            else:
                cases += discover_cases(path, modalities=modalities)
        elif suffix_of(path):
            files.append(path)
        elif path.exists():
            raise UserError(f"{path} is neither a folder nor a file of {', '.join((*SUFFIXES, ARRAY_SUFFIX))}")
        else:
            raise UserError(f"{path}: there is no such file or folder")
    return cases + (cases_from_files(files, modalities) if files else [])


def _without_masks(folder: Path, images: list[Path]) -> list[Path]:
    """The images of a folder without those that are, by their names, masks of others in it."""
    from fastunet.data.formats import stem_of
    from fastunet.data.image_folders import unmarked_mask
    from fastunet.errors import warn_once

    names = {stem_of(path) for path in images}
    masks = [path for path in images if unmarked_mask(stem_of(path)) in names - {stem_of(path)}]
    if masks:
        text = f"{len(masks)} files of {folder}, such as {masks[0].name}, are masks of others by their names: left out"
        warn_once(f"masks in {folder}", text)
    return [path for path in images if path not in masks]


def _segment_case(segmenter: Segmenter, case: Case, target: Path, args: argparse.Namespace) -> None:
    from fastunet.inference.segmenter import write_case

    slices = segmenter.open(case, on_nan=args.on_nan)
    labels = write_case(
        segmenter, slices, target, probabilities=args.probabilities, progress=progress_display(case.name)
    )
    say(target)
    if args.overlay:
        from fastunet.files import write_bytes

        picture = picture_path(args.out, case)
        write_bytes(picture, case_picture(segmenter, slices, labels))
        say(picture)


def case_picture(segmenter: Segmenter, slices: CaseSlices, labels: np.ndarray) -> bytes:
    """The slice of a case that shows most of ``labels``: image, truth if there is one, and prediction."""
    import numpy as np

    from fastunet.data.single_masks import case_labels
    from fastunet.pictures.overlay import best_slice, overlay, upright

    case, axis = slices.case, segmenter.card.axis
    panels = [("prediction", slices.stack(labels))]
    if case.label is not None and (table := segmenter.truth_table(case)) is not None:
        panels.insert(0, ("truth", slices.stack(case_labels(case, table))))
    index = best_slice(panels[0][1])
    image, name = slices.restore(slices.read(index, index + 1))[0], segmenter.card.modalities[0]
    page = f"{case.name if case.is_image else name}, slice {index + 1} of {len(slices)}"
    if case.is_image:
        drawn = [(case.name if len(slices) == 1 else page, None), *((title, stack[index]) for title, stack in panels)]
        return overlay(image.mean(0), drawn, segmenter.card.class_names)
    # Outside the head slices are exactly 0, the mean of the inside: show it black.
    shown = upright(np.where(image[0] == 0, image[0].min(), image[0]), axis)
    drawn = [(page, None), *((title, upright(stack[index], axis)) for title, stack in panels)]
    return overlay(shown, drawn, segmenter.card.class_names)
