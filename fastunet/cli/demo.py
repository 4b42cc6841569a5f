"""``fastunet demo``: synthetic data, training, evaluation on unseen cases, a segmentation and a report."""

from __future__ import annotations

import argparse
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastunet.cli.arguments import add_machine_options, say, seed, set_threads
from fastunet.errors import UserError

if TYPE_CHECKING:
    import torch

    from fastunet.data import Case
    from fastunet.inference.scores import Score

_MARKER = "fastunet-demo"
_MADE = (_MARKER, "data", "run", "segmentation", "scores.csv", "network.svg", "network.png", "report.html")


@dataclass(frozen=True)
class Plan:
    """What a demo makes, learns and says.

    Attributes:
        maker: name of the function of ``fastunet.data`` that makes the cases.
        options: of the maker.
        training_cases, unseen_cases: how many of them.
        training: options of ``TrainConfig``.
        things: what the cases are called.
        title: of the report.
        note: printed at the start, "" for nothing.
        viewer: what opens a result.
        subjects: what the cases are no picture of.
    """

    maker: str
    options: dict[str, Any]
    training_cases: int
    unseen_cases: int
    training: dict[str, Any]
    things: str
    title: str
    note: str = ""
    viewer: str = "has the grid of its volumes; any NIfTI viewer opens it"
    subjects: str = "patients"


PLANS = {
    "brats": Plan(
        maker="make_phantoms",
        options=dict(shape=(80, 80, 40)),
        training_cases=27,
        unseen_cases=6,
        training=dict(width=16, depth=3, epochs=4, batch_size=8, learning_rate=2e-3, schedule="cosine",
                      val_fraction=0.11, augment=False),
        things="phantoms with a tumour of three parts",
        title="A U-Net learns to segment brain-like volumes",
    ),
    "isbi": Plan(
        maker="make_cells",
        options=dict(sizes=((144, 144), (128, 176))),
        training_cases=30,
        unseen_cases=6,
        training=dict(preset="isbi", width=8, depth=3, epochs=16, batch_size=4, learning_rate=3e-3, schedule="cosine",
                      val_fraction=0.1, border_weights=True),
        things="pictures of cells that touch",
        title="A U-Net learns to separate touching cells",
        note="the network is the preset's with width 8 and depth 3 in place of 64 and 4, so that two cores suffice",
        viewer="is a mask of the size of its image; any image viewer opens it",
        subjects="cells",
    ),
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", choices=tuple(PLANS), default="brats",
                        help="brain-like volumes (brats, default) or pictures of cells (isbi)")  # fmt: skip
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR",
                        help="where everything goes (default: demo); an earlier demo there is replaced")  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="of the data and the training (default: 0)")
    add_machine_options(parser)


def run(args: argparse.Namespace) -> None:
    import fastunet.data
    from fastunet.files import write_text
    from fastunet.training.config import TrainConfig
    from fastunet.training.distributed import process_group
    from fastunet.training.run import train

    started, plan = time.monotonic(), PLANS[args.preset]
    set_threads(args.threads)
    out = _fresh_folder(args.out)
    counts = f"{plan.training_cases} to learn from and {plan.unseen_cases} to be tested on"
    say(f"making {plan.things}: {counts}", *([plan.note] if plan.note else []))
    make = getattr(fastunet.data, plan.maker)
    # Seeds 2k and 2k + 1: no two runs, and never both sides of one run, share a case.
    make(out / "data" / "training", plan.training_cases, 2 * args.seed, **plan.options)
    unseen = make(out / "data" / "unseen", plan.unseen_cases, 2 * args.seed + 1, **plan.options)
    config = TrainConfig(data=str(out / "data" / "training"), seed=args.seed, device=args.device, **plan.training)
    with process_group(args.device) as processes:
        train(config, out / "run", processes)
        device = processes.device
    scores, pictures, segmented = _test(out, unseen, device)
    report = out / "report.html"
    write_text(report, _report(plan, out, scores, pictures, segmented, time.monotonic() - started, device))
    say(f"{time.monotonic() - started:.0f} s; open {report.resolve()}")


def _test(out: Path, unseen: list[Case], device: torch.device) -> tuple[list[Score], dict[str, bytes], Path]:
    """Scores of the unseen cases, a picture of each, and the label file written for the median one."""
    from fastunet.cli.evaluate import evaluate_case
    from fastunet.cli.segment import case_picture, label_path, picture_path
    from fastunet.files import make_output_folder, write_bytes, write_text
    from fastunet.inference.scores import csv_table, mean_foreground_dice, text_table
    from fastunet.inference.segmenter import Segmenter, write_case
    from fastunet.training.checkpoint import load_model

    model, card = load_model(out / "run")
    segmenter = Segmenter(model.to(device), card, device, batch_size=8)
    by_case = {case.name: evaluate_case(segmenter, case) for case in unseen}
    scores = [score for case_scores in by_case.values() for score in case_scores]
    say(*text_table(scores))
    write_text(out / "scores.csv", csv_table(scores))
    ranked = sorted(unseen, key=lambda case: mean_foreground_dice(by_case[case.name]))
    folder = make_output_folder(out / "segmentation")
    pictures, files = {}, {}
    for role, case in (("median", ranked[len(ranked) // 2]), ("best", ranked[-1]), ("worst", ranked[0])):
        slices = segmenter.open(case)
        files[role] = label_path(folder, case, segmenter.label_map)
        labels = write_case(segmenter, slices, files[role], probabilities=False)
        dice = mean_foreground_dice(by_case[case.name])
        picture = case_picture(segmenter, slices, labels)
        write_bytes(picture_path(folder, case), picture)
        pictures[f"{case.name}, the {role} of the unseen cases: mean foreground Dice {dice:.3f}."] = picture
    return scores, pictures, files["median"]


def _report(
    plan: Plan, out: Path, scores: list[Score], pictures: dict[str, bytes], segmented: Path, seconds: float,
    device: torch.device,
) -> str:
    from fastunet.inference.scores import mean_foreground_dice
    from fastunet.pictures import report
    from fastunet.pictures.network import draw
    from fastunet.pictures.summary import layers
    from fastunet.training.checkpoint import load_model
    from fastunet.training.results import CURVES

    model, card = load_model(out / "run")
    size = (card.size, card.size) if card.images else plan.options["shape"][:2]
    drawing = draw(layers(model, *size), out / "network", title="The network of the demo")[1].read_bytes()
    curves = (out / "run" / CURVES).read_bytes()
    parameters = sum(p.numel() for p in model.parameters())
    shown = [report.Picture(png, caption) for caption, png in pictures.items()]
    return report.page(
        title=plan.title,
        lead=f"{plan.things.capitalize()} were made; a network was trained on some and then segmented others that it "
        f"had never seen. They are synthetic: nothing here says anything about real {plan.subjects}.",
        facts=[
            (f"{mean_foreground_dice(scores):.3f}", "mean foreground Dice, unseen cases"),
            (str(plan.training_cases), "cases for training and validation"),
            (str(plan.unseen_cases), "unseen cases"),
            (f"{parameters:,}", "parameters"),
            (f"{seconds:.0f} s", f"from nothing to here, on {device}"),
        ],
        sections=[
            ("What it sees, and what it should see", shown),
            ("Every unseen case", [report.score_table(scores)]),
            ("How it learned", [report.Picture(curves, "Loss and Dice after each epoch.")]),
            ("Go on", [
                report.paragraph(f"{segmented} {plan.viewer}."),
                report.commands(
                    ["fastunet", "segment", f"{out}/run", f"{out}/data/unseen", "--out", "segmentations", "--overlay"],
                    ["fastunet", "evaluate", f"{out}/run", f"{out}/data/unseen", "--csv", "scores.csv"],
                    ["fastunet", "train", f"{out}/data/training", "--out", "my-run"],
                ),
            ]),
            ("The network", [report.Picture(drawing, "Shapes are channels × height × width.", small=True)]),
        ],
    )  # fmt: skip


def _fresh_folder(out: Path) -> Path:
    """``out`` with nothing in it; only what an earlier demo made is removed."""
    from fastunet.files import make_output_folder, reason, write_text

    make_output_folder(out)
    found = sorted(path for path in out.iterdir())
    foreign = [path for path in found if path.name not in _MADE]
    if foreign or (found and out / _MARKER not in found):
        raise UserError(f"{out} holds other files ({(foreign or found)[0].name}); choose an empty or new folder")
    try:
        # The marker goes last: a removal that is cut short can be taken up again.
        for path in sorted(found, key=lambda path: path.name == _MARKER):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    except OSError as error:
        raise UserError(f"cannot replace {out}: {reason(error)}") from error
    write_text(out / _MARKER, "Made by `fastunet demo`, which replaces its files here when it runs again.\n")
    return out
