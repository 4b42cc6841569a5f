"""How a workload can be run: eager or compiled, in either memory layout, launched one by one or as a CUDA graph."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from bench.measuring.rows import OTHER, OURS, RIVAL
from bench.workloads import engines


@dataclass(frozen=True)
class Variant:
    """A ``form`` of the workload's code ("plain", "fastunet", …) and how it is run."""

    name: str
    form: str
    role: str = RIVAL
    channels_last: bool = True
    compile_mode: str | None = None
    graph: bool = False

    def why_not(self, device: torch.device) -> str | None:
        """Why this variant cannot run here, or None."""
        if self.graph and device.type != "cuda":
            return "CUDA graphs need a CUDA device"
        if (reason := engines.why_not(self.form, device)) is not None:
            return reason
        if "MONAI" in self.form and importlib.util.find_spec("monai") is None:
            return "MONAI is not installed"
        if self.compile_mode and device.type == "cuda" and importlib.util.find_spec("triton") is None:
            return "torch.compile needs Triton on a CUDA device"
        return None

    def wrap(self, function: Callable) -> Callable:
        """``function`` compiled, if this variant compiles."""
        if self.compile_mode is None:
            return function
        mode = "max-autotune-no-cudagraphs" if self.compile_mode == "max-autotune" else self.compile_mode
        return torch.compile(function, dynamic=False, mode=mode)

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """An image tensor in this variant's memory layout; others as they are."""
        if tensor.dim() != 4:
            return tensor
        memory_format = torch.channels_last if self.channels_last else torch.contiguous_format
        return tensor.contiguous(memory_format=memory_format)


def _with_graphs(*variants: Variant) -> tuple[Variant, ...]:
    graphs = (Variant(f"{v.name}, graph", v.form, v.role, v.channels_last, v.compile_mode, True) for v in variants)
    return (*variants, *graphs)


PLAIN = Variant("plain", "plain", channels_last=False)
CHANNELS_LAST = Variant("plain, channels_last", "plain")
COMPILED = Variant("compiled", "plain", compile_mode="default")
AUTOTUNED = Variant("compiled, max-autotune", "plain", compile_mode="max-autotune")
FASTUNET = Variant("fastunet", "fastunet", OURS)
FROZEN = Variant("fastunet, frozen", "fastunet frozen", OURS)
"""Weights packed once on a CPU, a CUDA graph per shape on a GPU; for inference."""

ENGINES = tuple(Variant(form, form, channels_last=False) for form in (engines.OPENVINO, engines.ONNX_RUNTIME))
"""The plain build in inference engines; in float32."""

NETWORK_VARIANTS = (
    *_with_graphs(PLAIN, CHANNELS_LAST, COMPILED, AUTOTUNED),
    *ENGINES,
    Variant("MONAI BasicUNet", "MONAI BasicUNet", OTHER),
    *_with_graphs(FASTUNET),
    FROZEN,
)
OPERATOR_VARIANTS = (*_with_graphs(PLAIN, CHANNELS_LAST, COMPILED, AUTOTUNED), *_with_graphs(FASTUNET))
LOSS_VARIANTS = (
    *_with_graphs(PLAIN, COMPILED),
    Variant("scattered", "scattered", channels_last=False),
    Variant("nnU-Net style", "nnU-Net style", channels_last=False),
    Variant("nnU-Net style, compiled", "nnU-Net style", channels_last=False, compile_mode="default"),
    Variant("MONAI", "MONAI", channels_last=False),
    *_with_graphs(replace(FASTUNET, channels_last=False), replace(FASTUNET, name="fastunet, channels_last")),
)
