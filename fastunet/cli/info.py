"""``fastunet info``: versions, devices, the backend of each operator, the fused blocks of a network, and why."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from fastunet.architecture import PRESETS, Architecture
from fastunet.cli.arguments import say

if TYPE_CHECKING:
    import torch

PACKAGES = ("fastunet", "torch", "triton", "numpy", "nibabel", "safetensors", "matplotlib")
DTYPES = ("float32", "float16", "bfloat16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", nargs="?", type=Path, help="a run folder or checkpoint: list its blocks")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="list the blocks of this network, untrained")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: auto)")
    parser.add_argument("--check", action="store_true", help="run every operator against plain PyTorch in float64")
    parser.add_argument("--kernels", action="store_true",
                        help="compile every kernel of the reference networks, or of --preset, for the GPU or sm_90, "
                        "and list its code")  # fmt: skip


def run(args: argparse.Namespace) -> None:
    from fastunet.errors import UserError
    from fastunet.training.distributed import pick_device

    if args.model and args.preset:
        raise UserError(f"--preset {args.preset} beside {args.model}: a run has a network of its own")
    say(f"Python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        say(f"{package} {_version(package)}")
    device = pick_device(args.device)
    say(f"device: {device} ({_describe(device)})")
    say(f"FASTUNET_BACKEND: {os.environ.get('FASTUNET_BACKEND', 'not set (auto)')}")
    say("")
    _operators(device)
    if args.check:
        say("")
        _check(device)
    if args.model or args.preset:
        say("")
        _blocks(args.model, args.preset)
    if args.kernels:
        say("")
        _kernels(args.preset)


def _operators(device: torch.device) -> None:
    """A row per operator: the backend for each dtype; below, why Triton is not used where it is not."""
    import torch

    from fastunet import functional
    from fastunet.dispatch import BACKENDS, why_not_triton
    from fastunet.errors import UserError

    forced = os.environ.get("FASTUNET_BACKEND", "auto")
    if forced not in BACKENDS:
        raise UserError(f"FASTUNET_BACKEND is {forced!r}; expected one of {', '.join(BACKENDS)}")
    choices: dict[str, str] = {}
    reasons: dict[str, list[str]] = {}
    for name in DTYPES:
        reason = why_not_triton(device, getattr(torch, name))
        if forced == "torch":
            choices[name], reason = "torch", "FASTUNET_BACKEND asks for torch"
        elif forced == "auto" and device.type == "cpu":
            choices[name] = "torch"
            reason = reason or "auto takes Triton on a GPU only; backend='triton' runs the interpreter here"
        else:
            choices[name] = "triton" if reason is None else ("error" if forced == "triton" else "torch")
        if reason:
            reasons.setdefault(reason, []).append(name)
    operators = sorted(functional.__all__)
    width = max(map(len, operators)) + 2
    say("operator".ljust(width) + "".join(name.ljust(11) for name in DTYPES).rstrip())
    for operator in operators:
        say(operator.ljust(width) + "".join(choices[name].ljust(11) for name in DTYPES).rstrip())
    for reason, dtypes in reasons.items():
        say(f"not Triton for {', '.join(dtypes)}: {reason}")


def _blocks(run: Path | None, preset: str) -> None:
    """A row per part of a network: fused, or through its modules, and why."""
    from fastunet import UNet
    from fastunet.training.checkpoint import load_model

    model = load_model(run)[0] if run else UNet(**Architecture.from_preset(preset).as_dict())
    reasons = model.why_not_fused()
    say(f"{run or preset}: {model.config}")
    for name in ("encoders", "bottleneck", "dropout", "decoders", "head"):
        part = getattr(model, name)
        for each in [f"{name}.{i}" for i in range(len(part))] if name.endswith("ders") else [name]:
            say(f"{each:12}{'through its modules: ' + reasons[each] if each in reasons else 'fused'}")


def _check(device: torch.device) -> None:
    """A line per operator and dtype, with its error and what is allowed."""
    import torch

    from fastunet.errors import UserError
    from fastunet.inspection.selfcheck import check_operators

    checks = [c for name in DTYPES for c in check_operators(device, getattr(torch, name))]
    for check in checks:
        result = "passes" if check.passed else "FAILS"
        found = check.problem or f"error {check.error:.1e}, allowed {check.allowed:.1e}"
        say(f"{check.operator:27}{check.dtype.removeprefix('torch.'):10}{result}  {found}")
    failed = sorted({check.operator for check in checks if not check.passed})
    if failed:
        advice = "FASTUNET_BACKEND=torch runs the same on PyTorch's operators"
        raise UserError(f"{', '.join(failed)} cannot be trusted on {device}; {advice}")


def _kernels(preset: str | None) -> None:
    from fastunet.dispatch import triton_installed
    from fastunet.errors import UserError

    if not triton_installed():
        raise UserError("--kernels needs Triton, which is not installed")
    from fastunet.inspection.kernel_table import kernel_table

    say(*kernel_table(preset).splitlines())


def _describe(device: torch.device) -> str:
    import torch

    if device.type != "cuda":
        return f"{torch.get_num_threads()} threads; CUDA {'is available' if torch.cuda.is_available() else 'not found'}"
    properties = torch.cuda.get_device_properties(device)
    capability, memory = f"{properties.major}.{properties.minor}", properties.total_memory / 2**30
    return f"{properties.name}, compute capability {capability}, {memory:.0f} GiB, CUDA {torch.version.cuda}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"
