"""``fastunet summary``: the layer table of a network, and its drawing."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from fastunet.architecture import ACTIVATIONS, NORMS, PRESETS, Architecture
from fastunet.cli.arguments import positive_int, say
from fastunet.errors import UserError

if TYPE_CHECKING:
    from fastunet.reference import UNet

ELEMENT_SIZES = {"fp32": 4, "fp16": 2, "bf16": 2}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", help="a run folder or checkpoint (default: a preset, untrained)")
    parser.add_argument("--preset", choices=tuple(PRESETS), help="default: brats")
    parser.add_argument("--width", type=positive_int, help="channels of the first level")
    parser.add_argument("--depth", type=positive_int, help="number of poolings")
    parser.add_argument("--norm", choices=("none", *NORMS), help="behind 3×3 convolutions")
    parser.add_argument("--activation", choices=ACTIVATIONS)
    parser.add_argument("--size", type=positive_int, nargs="+", metavar="N",
                        help="input height and width, or one number for both (default: 128, isbi 572)")  # fmt: skip
    parser.add_argument("--precision", choices=tuple(ELEMENT_SIZES), default="fp32", help="for the activation memory")
    parser.add_argument("--out", type=Path, metavar="NAME", help="write the drawing as NAME.svg and NAME.png")
    parser.add_argument("--overwrite", action="store_true", help="replace files that exist")


def run(args: argparse.Namespace) -> None:
    from fastunet.data.slices import slice_size
    from fastunet.pictures import summary

    model, title, usual = _network(args)
    size = args.size or [usual]
    if len(size) > 2:
        raise UserError(f"--size takes one or two numbers, got {len(size)}")
    height, width = slice_size(size if len(size) == 2 else size * 2)
    try:
        rows = summary.layers(model, height, width)
    except ValueError as error:
        raise UserError(str(error)) from error
    say(f"{title}, one image of {height}×{width}, {args.precision}")
    say(*summary.table(rows, ELEMENT_SIZES[args.precision]).splitlines())
    peak, plain = _peaks(model.architecture, height, width, ELEMENT_SIZES[args.precision])
    say(f"Inference holds at most {peak:.2f} MiB of activations at a time, the plain build {plain:.2f}.")
    if args.out:
        from fastunet.files import make_output_folder
        from fastunet.outputs import check_outputs
        from fastunet.pictures.network import draw, drawing_paths
        from fastunet.training.checkpoint import checkpoint_file

        if args.out.is_dir():
            raise UserError(f"--out {args.out} is a folder; give the drawing a name in it, such as {args.out / 'unet'}")
        inputs = [checkpoint_file(args.model)] if args.model else []
        check_outputs(drawing_paths(args.out), inputs, overwrite=args.overwrite)
        make_output_folder(args.out.parent)
        written = draw(rows, args.out, title=f"{title}, {height}×{width}")
        say("wrote " + " and ".join(map(str, written)))


def _peaks(architecture: Architecture, height: int, width: int, element_size: int) -> tuple[float, float]:
    """MiB of activations alive at once during inference on one image: of ``fastunet.UNet`` and of the plain build."""
    import torch

    from fastunet import UNet, reference
    from fastunet.inspection.memory import inference_bytes

    dtype = torch.float32 if element_size == 4 else torch.bfloat16
    image = torch.empty(1, architecture.in_channels, height, width, dtype=dtype, device="meta")
    found = []
    for kind in (UNet, reference.UNet):
        with torch.device("meta"):
            model = kind(**architecture.as_dict()).to(dtype).eval()
        found.append(inference_bytes(model, image)[0] / 2**20)
    return found[0], found[1]


def _network(args: argparse.Namespace) -> tuple[UNet, str, int]:
    """The network, what to call it, and its usual input side."""
    if args.model:
        if args.preset or args.width or args.depth or args.norm or args.activation:
            raise UserError("--preset, --width, --depth, --norm and --activation describe an untrained network; they "
                            "cannot be given with a checkpoint")  # fmt: skip
        from fastunet.training.checkpoint import load_model

        model, card = load_model(args.model)
        return model, str(args.model), card.size or 240
    import torch

    from fastunet.reference import UNet

    preset = args.preset or "brats"
    given = {name: getattr(args, name) for name in ("width", "depth", "norm", "activation") if getattr(args, name)}
    given = {name: None if value == "none" else value for name, value in given.items()}
    try:
        with torch.device("meta"):
            planned = UNet.from_preset(preset, **given)
    except ValueError as error:
        raise UserError(str(error)) from error
    return planned, f"preset {preset}", 572 if preset == "isbi" else 128
