"""Which workloads a run measures: a quick choice for a CPU, a wide one for a GPU, everything with ``full``."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

import torch

from bench.measuring.precision import PRECISIONS
from bench.workloads.any_unet import any_unet_workload, installed
from bench.workloads.losses import loss_workload
from bench.workloads.networks import LABELS, LOGITS, TRAINING, network_workload
from bench.workloads.operators import SUBJECTS, operator_workloads
from bench.workloads.workload import Workload
from fastunet.architecture import Architecture

_BRATS, _ISBI = Architecture.from_preset("brats"), Architecture.from_preset("isbi")
_NO_COMPILER = tuple(
    (name, "compilation takes longer than the rest of a quick run; --full measures it")
    for name in ("compiled", "compiled, max-autotune", "nnU-Net style, compiled")
)
_NO_AUTOTUNER = _NO_COMPILER[1:2]
_QUICK_LAYERS = {
    "conv_relu": ("encoders.0.conv1", "decoders.3.conv1", "bottleneck.conv2"),
    "conv_relu_pool": ("encoders.0.conv2",),
    "max_pool2d": ("encoders.0.conv2",),
    "upsample_conv_relu": ("decoders.0.up", "decoders.3.up"),
    "conv_transpose2d": ("decoders.3.up",),
    "segmentation_head": ("head",),
}
ISBI_QUICK_SIDE = 284
"""A size that fits the "valid" network and takes a CPU a quarter of the time of 572."""


def operators(subjects: Iterable[str], device: torch.device, full: bool) -> list[Workload]:
    """Single operators. Quick on a CPU: batch 4, 128×128, fp32, a few layers. On a GPU without ``full``: batch 16 of
    every layer in bf16. With ``full``: batch 1, 16, 64 and every size and precision."""
    if full:
        cases = itertools.product(PRECISIONS, (1, 16, 64), ((_BRATS, 128), (_BRATS, 240), (_ISBI, 572)))
        return [w for precision, batch, (network, side) in cases
                for w in operator_workloads(network, batch, side, precision, subjects=subjects)]  # fmt: skip
    if device.type == "cuda":
        return [w for network, batch, side in ((_BRATS, 16, 240), (_ISBI, 1, 572))
                for w in operator_workloads(network, batch, side, "bf16", subjects=subjects,
                                            without=_NO_AUTOTUNER)]  # fmt: skip
    found = []
    for subject in subjects:
        network, batch, side = (_ISBI, 1, ISBI_QUICK_SIDE) if subject == "conv_transpose2d" else (_BRATS, 4, 128)
        found += operator_workloads(network, batch, side, "fp32", subjects=[subject],
                                    layers=_QUICK_LAYERS[subject], without=_NO_COMPILER)  # fmt: skip
    return found


def networks(device: torch.device, full: bool) -> list[Workload]:
    """Whole networks, those of the README's table first."""
    if device.type == "cpu" and not full:
        return [
            *(network_workload("brats", step, 4, 128, "fp32", without=_NO_AUTOTUNER)
              for step in (LOGITS, LABELS, TRAINING)),
            *(network_workload("isbi", step, 1, ISBI_QUICK_SIDE, "fp32", without=_NO_COMPILER)
              for step in (LOGITS, TRAINING)),
        ]  # fmt: skip
    without = () if full else _NO_AUTOTUNER
    head = [
        network_workload("brats", LOGITS, 16, 240, "bf16"),
        network_workload("brats", TRAINING, 16, 240, "bf16"),
        network_workload("isbi", LOGITS, 16, 572, "bf16"),
        network_workload("isbi", TRAINING, 8, 572, "bf16", without=without),
        network_workload("brats", LABELS, 1, 240, "bf16", without=without),
        network_workload("brats", LOGITS, 1, 128, "bf16", without=without),
        network_workload("brats", TRAINING, 16, 128, "bf16", without=without),
        network_workload("brats", LOGITS, 16, 240, "tf32", without=without),
        network_workload("brats", TRAINING, 16, 240, "tf32", without=without),
    ]
    if not full:
        return head
    cases = itertools.product(PRECISIONS, (1, 16, 64), (LOGITS, LABELS, TRAINING),
                              (("brats", 128), ("brats", 240), ("isbi", 572)))  # fmt: skip
    every = [network_workload(preset, step, batch, side, precision)
             for precision, batch, step, (preset, side) in cases]  # fmt: skip
    return _without_repeats([*head, *every])


def losses(device: torch.device, full: bool) -> list[Workload]:
    """The losses alone, of the four classes of a BraTS batch and, where there is time, of a hundred."""
    if device.type == "cpu" and not full:
        return [loss_workload(16, 4, 240, "fp32", cross_entropy=cross_entropy, without=_NO_COMPILER)
                for cross_entropy in (True, False)]  # fmt: skip
    precisions = PRECISIONS if full else ("bf16", "fp32")
    found = [loss_workload(128, 4, 240, "bf16", cross_entropy=False)]
    for precision, backward in itertools.product(precisions, (True, False)):
        found.append(loss_workload(128, 4, 240, precision, backward=backward))
        found.append(loss_workload(8, 100, 240, precision, backward=backward))
    return found


def any_unets(device: torch.device, full: bool) -> list[Workload]:
    """Other people's networks: on a CPU small ones in fp32, on a GPU in bf16."""
    quick = device.type == "cpu" and not full
    batch, side, precision = (2, 128, "fp32") if quick else (16, 256, "bf16")
    return [any_unet_workload(name, step, batch, side, precision, without=_NO_COMPILER if quick else ())
            for name in installed() for step in (LOGITS, TRAINING)]  # fmt: skip


def everything(device: torch.device, full: bool) -> list[Workload]:
    """All of it, what the README shows first, since a run may end by its time limit."""
    return [*networks(device, full), *losses(device, full), *any_unets(device, full),
            *operators(SUBJECTS, device, full)]  # fmt: skip


def _without_repeats(workloads: list[Workload]) -> list[Workload]:
    return list({workload.name: workload for workload in reversed(workloads)}.values())[::-1]
