"""Soft Dice and binary cross-entropy of overlapping regions, from one read of the logits and integer labels.

As in nnU-Net's region-based training (Isensee et al. 2021, for BraTS) a network has one sigmoid output a region, and a
region is a union of classes. The labels stay class indices: which regions hold a class is looked up for each pixel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fastunet import autograd
from fastunet.arguments import checked
from fastunet.functional._checks import check_classes
from fastunet.functional.dice_arguments import MOST_CLASSES, class_indices, moved
from fastunet.functional.dice_operators import loss_of_sums

MOST_REGIONS = 32


@checked
def region_table(regions: Sequence[Sequence[int]], num_classes: int | None = None) -> torch.Tensor:
    """(num_classes,) int32: bit r of entry k says whether region r holds class k.

    Args:
        regions: class indices of each region; at most 32 regions, none of them empty or with the background, class 0.
        num_classes: of the labels, background included; by default one more than the greatest index in ``regions``.

    Raises:
        ValueError: regions or a number of classes that do not fit; the message names them.
    """
    regions = [tuple(members) for members in regions]
    if not 1 <= len(regions) <= MOST_REGIONS:
        raise ValueError(f"{len(regions)} regions; expected 1 to {MOST_REGIONS}")
    greatest = max((max(members) for members in regions if members), default=0)
    classes = greatest + 1 if num_classes is None else num_classes
    check_classes(classes, MOST_CLASSES)
    for members in regions:
        if not members or not all(1 <= index < classes for index in members):
            raise ValueError(f"region {members} is made of other classes than 1 to {classes - 1}")
    words = [sum(1 << r for r, members in enumerate(regions) if k in members) for k in range(classes)]
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)  # bit 31 is the sign


@checked
def region_dice_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    regions: Sequence[Sequence[int]] | torch.Tensor,
    *,
    num_classes: int | None = None,
    ce_weight: float = 1.0,
    dice_weight: float = 1.0,
    smooth: float = 1.0,
    tversky: Sequence[float] = (0.5, 0.5),
    ignore_index: int | None = None,
    region_weights: torch.Tensor | None = None,
    reduction: str = "batch",
    empty: str = "smooth",
    check_labels: bool = True,
    sync: bool = False,
    process_group: Any = None,
    grad_reduction: str = "mean",
    backend: str | None = None,
) -> torch.Tensor:
    """``dice_weight · Dice loss + ce_weight · binary cross-entropy`` of overlapping regions of classes.

    With z the logit of a region, p = sigmoid(z) and t = 1 where the region holds the pixel's class, else 0, per region
    I = sum(p t), P = sum(p) and T = sum(t) over the pixels of the batch (or of each sample). The Dice loss is
    ``1 - mean((2 I + s) / (P + T + s))`` over regions, the cross-entropy the mean of ``log(1 + exp(z)) - t z`` over
    pixels and regions. The derivative with respect to z is ``p (1 - p) (dL/dI t + dL/dP) + n w (p - t)``.

    Args:
        logits: (N, R, H, W) for R regions, or any number of pixel axes; NCHW or channels_last; R from 1 to 32.
        labels: (N, H, W) or (N, 1, H, W) class indices in any integer dtype, or floating point as whole numbers.
        regions: for each region the class indices that it holds, as ``[(1, 2, 3), (1, 3), (3,)]`` for BraTS; or what
            :func:`region_table` makes of them, on the logits' device.
        num_classes: labels are from 0 to num_classes - 1; by default the greatest index in ``regions`` is the last.
        region_weights: (R,) weights of the regions in both means.
        ce_weight, dice_weight, smooth, tversky, ignore_index, reduction, empty, check_labels, sync, process_group,
            grad_reduction, backend: as in :func:`fastunet.functional.dice.dice_cross_entropy`, of regions in place of
            classes.

    Returns:
        A scalar in float32 (float64 for float64 logits).

    Raises:
        ValueError: shapes, dtypes, regions or options that do not fit, or a label out of range; the message names it.
    """
    table = regions if isinstance(regions, torch.Tensor) else region_table(regions, num_classes).to(logits.device)
    if table.dtype != torch.int32 or table.ndim != 1 or table.device != logits.device:
        raise ValueError(
            f"regions are a {table.dtype} table of shape {tuple(table.shape)} on {table.device}; expected what "
            f"region_table() makes, on {logits.device}"
        )
    shape = tuple(logits.shape)
    count = shape[1] if table is regions else len(regions)
    if len(shape) < 3 or shape[1] != count or count > MOST_REGIONS:
        raise ValueError(f"logits have shape {shape}; expected (N, {count}, H, W), at most {MOST_REGIONS} regions")
    if region_weights is not None:
        if tuple(region_weights.shape) != (count,):
            raise ValueError(f"region_weights have shape {tuple(region_weights.shape)}; expected ({count},)")
        region_weights = moved(region_weights, logits)
    if not logits.dtype.is_floating_point or labels.device != logits.device:
        raise ValueError(f"logits are {logits.dtype} on {logits.device}, labels on {labels.device}")
    targets, ignore_index = class_indices(labels, logits.ndim - 1, ignore_index)
    if tuple(targets.shape) != (shape[0], *shape[2:]):
        raise ValueError(f"labels have shape {tuple(labels.shape)}, which does not fit logits of shape {shape}")
    targets = targets.flatten(1)
    if autograd.tracked(region_weights):
        raise ValueError("region_weights require a gradient, which the Dice losses do not give; detach() them")
    return loss_of_sums(
        "region_dice_cross_entropy", logits, (targets, region_weights, table), len(table), ignore_index, (),
        (smooth, empty, True, dice_weight, ce_weight), tversky=tversky, reduction=reduction, check_labels=check_labels,
        sync=sync, process_group=process_group, grad_reduction=grad_reduction, backend=backend,
    )  # fmt: skip
