"""``fastunet warm-up``: a network's GPU kernels compiled ahead of their first use."""

from __future__ import annotations

import argparse
from pathlib import Path

from fastunet.architecture import PRESETS
from fastunet.cli.arguments import positive_int, progress_display, say
from fastunet.training.config import PRECISIONS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=Path, help="a run folder or checkpoint, in place of a preset")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: brats")
    parser.add_argument("--size", type=positive_int, help="side of the images (default: 240; isbi: 572)")
    parser.add_argument("--batch-size", type=positive_int, default=8, help="images of a step (default: 8)")
    parser.add_argument("--precision", choices=PRECISIONS, default="fp32", help="default: fp32")
    parser.add_argument("--architecture", type=positive_int, metavar="SM",
                        help="as 80 or 90 (default: the GPU's, or 90 without one)")  # fmt: skip
    parser.add_argument("--processes", type=positive_int, help="that compile (default: one for each core)")


def run(args: argparse.Namespace) -> None:
    import os

    import torch

    from fastunet.architecture import Architecture
    from fastunet.dispatch import triton_installed, triton_interpreted
    from fastunet.errors import UserError

    if not triton_installed() or triton_interpreted():
        reason = "TRITON_INTERPRET is set" if triton_installed() else "Triton is not installed"
        raise UserError(f"there is nothing to compile: {reason}")
    from fastunet.inspection.warm_up import Work, warm_up
    from fastunet.kernels import _launch
    from fastunet.training.checkpoint import load_model

    architecture = args.architecture or (_launch.architecture() if torch.cuda.is_available() else 90)
    if architecture not in (80, 86, 89, 90, 100, 120):
        raise UserError(f"--architecture is {architecture}; the kernels are for 80, 86, 89, 90, 100 and 120")
    if args.model and args.preset:
        raise UserError(f"--preset {args.preset} beside {args.model}: a run has a network of its own")
    if args.model:
        network = load_model(args.model)[0].architecture
    else:
        network = Architecture.from_preset(args.preset or "brats")
    size = args.size or (572 if args.preset == "isbi" else 240)
    work = Work(network, (size, size), args.batch_size, args.precision, architecture)
    try:
        number = warm_up([work], args.processes or os.cpu_count() or 1, progress_display(unit="kernel"))
    except ValueError as error:
        raise UserError(str(error)) from error
    say(f"{number} kernels for sm_{architecture} are in Triton's cache")
