"""``fastunet demo``: phantoms, training, evaluation on unseen phantoms, a segmentation and a report."""

from __future__ import annotations

import argparse
import shutil
import time
from pathlib import Path

from fastunet.cli.arguments import add_machine_options, seed, set_threads
from fastunet.errors import UserError

SHAPE = (80, 80, 40)
TRAINING_CASES, UNSEEN_CASES = 27, 6
NETWORK = dict(width=16, depth=3)
TRAINING = dict(epochs=4, batch_size=8, learning_rate=2e-3, schedule="cosine", val_fraction=0.11, augment=False)
_MARKER = "fastunet-demo"
_MADE = (_MARKER, "data", "run", "segmentation", "scores.csv", "network.svg", "network.png", "report.html")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("demo"), metavar="DIR",
                        help="where everything goes (default: demo); an earlier demo there is replaced")  # fmt: skip
    parser.add_argument("--seed", type=seed, default=0, help="of the phantoms and the training (default: 0)")
    add_machine_options(parser)


def run(args: argparse.Namespace) -> None:
    from fastunet.data import make_phantoms
    from fastunet.files import write_text
    from fastunet.training.config import TrainConfig
    from fastunet.training.distributed import process_group
    from fastunet.training.loop import train

    started = time.monotonic()
    set_threads(args.threads)
    out = _fresh_folder(args.out)
    print(f"making {TRAINING_CASES} phantoms to learn from and {UNSEEN_CASES} to be tested on", flush=True)
    # Seeds 2k and 2k + 1: no two runs, and never both sides of one run, share a phantom.
    make_phantoms(out / "data" / "training", TRAINING_CASES, 2 * args.seed, shape=SHAPE)
    unseen = make_phantoms(out / "data" / "unseen", UNSEEN_CASES, 2 * args.seed + 1, shape=SHAPE)
    config = TrainConfig(data=str(out / "data" / "training"), seed=args.seed, device=args.device, **NETWORK, **TRAINING)
    with process_group(args.device) as processes:
        train(config, out / "run", processes)
        device = processes.device
    scores, pictures, segmented = _test(out, unseen, device)
    report = out / "report.html"
    write_text(report, _report(out, scores, pictures, segmented, time.monotonic() - started, device))
    print(f"{time.monotonic() - started:.0f} s; open {report.resolve()}")


def _test(out: Path, unseen: list, device) -> tuple[list, dict[str, bytes], Path]:
    """Scores of the unseen cases, a picture of each, and the label file written for the median one."""
    from fastunet.cli.evaluate import evaluate_case
    from fastunet.cli.segment import case_picture
    from fastunet.files import make_output_folder, write_bytes, write_text
    from fastunet.inference.scores import csv_table, mean_foreground_dice, text_table
    from fastunet.inference.segmenter import Segmenter, write_case
    from fastunet.training.checkpoint import load_model

    model, card = load_model(out / "run")
    segmenter = Segmenter(model.to(device), card, device, batch_size=8)
    by_case = {case.name: evaluate_case(segmenter, case) for case in unseen}
    scores = [score for case_scores in by_case.values() for score in case_scores]
    print(text_table(scores))
    write_text(out / "scores.csv", csv_table(scores))
    ranked = sorted(unseen, key=lambda case: mean_foreground_dice(by_case[case.name]))
    folder = make_output_folder(out / "segmentation")
    pictures, files = {}, {}
    for role, case in (("median", ranked[len(ranked) // 2]), ("best", ranked[-1]), ("worst", ranked[0])):
        slices = segmenter.open(case)
        files[role] = folder / f"{case.name}.nii.gz"
        labels = write_case(segmenter, slices, files[role], probabilities=False)
        dice = mean_foreground_dice(by_case[case.name])
        picture = case_picture(segmenter, slices, labels)
        write_bytes(folder / f"{case.name}.png", picture)
        pictures[f"{case.name}, the {role} of the unseen cases: mean foreground Dice {dice:.3f}."] = picture
    return scores, pictures, files["median"]


def _report(out: Path, scores: list, pictures: dict[str, bytes], segmented: Path, seconds: float, device) -> str:
    from fastunet.inference.scores import mean_foreground_dice
    from fastunet.pictures import report
    from fastunet.pictures.network import draw
    from fastunet.pictures.summary import layers
    from fastunet.training.checkpoint import load_model
    from fastunet.training.results import CURVES

    model, _ = load_model(out / "run")
    drawing = draw(layers(model, *SHAPE[:2]), out / "network", title="The network of the demo")[1].read_bytes()
    curves = (out / "run" / CURVES).read_bytes()
    parameters = sum(p.numel() for p in model.parameters())
    shown = [report.Picture(png, caption) for caption, png in pictures.items()]
    return report.page(
        title="A U-Net learns to segment brain-like volumes",
        lead="Phantoms with a tumour of three parts were made; a network was trained on some and then segmented others "
        "that it had never seen. Phantoms are synthetic: nothing here says anything about patients.",
        facts=[
            (f"{mean_foreground_dice(scores):.3f}", "mean foreground Dice, unseen cases"),
            (str(TRAINING_CASES), "phantoms for training and validation"),
            (str(UNSEEN_CASES), "unseen phantoms"),
            (f"{parameters:,}", "parameters"),
            (f"{seconds:.0f} s", f"from nothing to here, on {device}"),
        ],
        sections=[
            ("What it sees, and what it should see", shown),
            ("Every unseen case", [report.score_table(scores)]),
            ("How it learned", [report.Picture(curves, "Loss and Dice after each epoch.")]),
            ("Go on", [
                report.paragraph(f"{segmented} has the grid of its volumes; any NIfTI viewer opens it."),
                report.commands([
                    f"fastunet segment {out}/run {out}/data/unseen --out segmentations --overlay",
                    f"fastunet evaluate {out}/run {out}/data/unseen --csv scores.csv",
                    f"fastunet train {out}/data/training --out my-run",
                ]),
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
