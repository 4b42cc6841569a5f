"""``fastunet train``: a run folder with weights, log and curves from a folder of labelled cases."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fastunet.architecture import ACTIVATIONS, NORMS, PRESETS
from fastunet.cli.arguments import (
    add_nan_option,
    class_weights,
    decay,
    fraction,
    label_value,
    names,
    non_negative_float,
    positive_float,
    positive_int,
    say,
    seed,
    spacing,
    two_numbers,
)
from fastunet.data.label_tables import LABEL_MAPS
from fastunet.training.config import LOSSES, PRECISIONS, SCHEDULES, TrainConfig


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("data", help="a folder of labelled cases")
    parser.add_argument("--out", type=Path, required=True, metavar="RUN", help="the run folder")
    parser.add_argument("--resume", action="store_true", default=False, help="continue the run in RUN exactly")
    add_options(parser)


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``TrainConfig``; absent unless given, so that --resume can tell what the user asked for."""
    parser.argument_default = argparse.SUPPRESS
    network = parser.add_argument_group("network")
    network.add_argument("--preset", choices=tuple(PRESETS), help="default: brats")
    network.add_argument("--width", type=positive_int, help="channels of the first level (default: the preset's)")
    network.add_argument("--depth", type=positive_int, help="number of poolings (default: the preset's)")
    network.add_argument("--dropout", type=fraction, help="after the bottleneck (default: the preset's)")
    network.add_argument("--norm", choices=("none", *NORMS), help="behind 3×3 convolutions (default: the preset's)")
    network.add_argument("--activation", choices=ACTIVATIONS, help="default: the preset's")
    data = parser.add_argument_group("data")
    data.add_argument("--modalities", type=names, metavar="A,B",
                      help="channels, in order (default: flair,t1ce where most cases have them, else all)")  # fmt: skip
    data.add_argument("--edition", choices=tuple(LABEL_MAPS), help="of the data, where its folders do not tell")
    data.add_argument("--ignore-label", type=label_value, metavar="VALUE", help="of the label files, counted nowhere")
    data.add_argument("--regions", choices=("brats", "none"),
                      help="overlapping outputs: BraTS' regions, or none (default: those of dataset.json)")  # fmt: skip
    data.add_argument("--size", type=positive_int, help="crop or pad slices, or cut images into tiles, of this side")
    data.add_argument("--axis", type=int, choices=(0, 1, 2), help="slice along this axis (default: 2, axial)")
    data.add_argument("--spacing", type=spacing, metavar="MM|median",
                      help="resample slices to this pixel size (default: as they are)")  # fmt: skip
    data.add_argument("--val-fraction", type=fraction, help="share of the patients kept for validation (default: 0.2)")
    data.add_argument("--foreground-fraction", type=fraction,
                      help="least share of training slices with foreground (default: 0.5)")  # fmt: skip
    data.add_argument("--augment", action=argparse.BooleanOptionalAction,
                      help="random flips, small rotations, zooms and moves, contrast, noise (default)")  # fmt: skip
    data.add_argument("--turns", action=argparse.BooleanOptionalAction,
                      help="augment with quarter turns and flips of both axes (default: of images alone)")  # fmt: skip
    data.add_argument("--elastic", action=argparse.BooleanOptionalAction,
                      help="augment with smooth deformations (default: of images alone)")  # fmt: skip
    add_nan_option(data, default=argparse.SUPPRESS)
    training = parser.add_argument_group("training")
    training.add_argument("--epochs", type=positive_int, help="default: 20")
    training.add_argument("--batch-size", type=positive_int, help="slices per step and process (default: 8)")
    training.add_argument("--loss", choices=LOSSES, help="default: dice_ce")
    training.add_argument("--tversky", type=two_numbers, metavar="FP,FN",
                          help="of false positives and negatives in the Dice loss (default: 0.5,0.5)")  # fmt: skip
    training.add_argument("--class-weights", type=class_weights, metavar="A,B,…|balanced",
                          help="factors of the classes, or inverse to their pixels (default: all 1)")  # fmt: skip
    training.add_argument("--border-weights", action="store_true",
                          help="of images: weigh the gaps between touching objects in the cross-entropy")  # fmt: skip
    training.add_argument("--learning-rate", type=positive_float, help="of AdamW (default: 0.001)")
    training.add_argument("--schedule", choices=SCHEDULES, help="of the learning rate (default: constant)")
    training.add_argument("--warm-up", type=non_negative_float, metavar="EPOCHS",
                          help="in which the learning rate rises, such as 0.5 (default: 0)")  # fmt: skip
    training.add_argument("--weight-decay", type=non_negative_float, help="of AdamW (default: 0)")
    training.add_argument("--clip-norm", type=positive_float, metavar="NORM", help="the gradient's greatest norm")
    training.add_argument("--ema", type=decay, metavar="DECAY", help="validate and save averaged weights, such as 0.99")
    training.add_argument("--patience", type=positive_int, metavar="EPOCHS",
                          help="stop after so many without a better validation Dice")  # fmt: skip
    training.add_argument("--precision", choices=PRECISIONS, help="default: fp32")
    training.add_argument("--seed", type=seed, help="default: 0")
    training.add_argument("--deterministic", action="store_true", help="only algorithms that repeat exactly on a GPU")
    training.add_argument("--device", help="auto (default), cpu, cuda or cuda:N")
    training.add_argument("--threads", type=positive_int, help="CPU threads (default: PyTorch's choice)")
    training.add_argument("--checkpoint-every", type=non_negative_float, metavar="SECONDS",
                          help="between saves within an epoch (default: 300; 0: each step)")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    from fastunet.cli.arguments import set_threads
    from fastunet.errors import said_once
    from fastunet.training.distributed import process_group
    from fastunet.training.run import train

    given = {name: value for name, value in vars(args).items() if name not in ("out", "resume", "run", "command")}
    with said_once():
        config = configuration(args.out, args.resume, given)
        set_threads(config.threads)
    with process_group(config.device) as processes:
        train(config, args.out, processes, resume=args.resume)
    if processes.leader:
        say(args.out)


def configuration(out: Path, resume: bool, given: dict[str, Any]) -> TrainConfig:
    """The options of the run: those given, or on ``resume`` those stored, checked against those given."""
    from fastunet.training.config import FILE_NAME

    if resume and (out / FILE_NAME).is_file():
        return TrainConfig.read(out).resumed_with(given)
    return TrainConfig(**given)
