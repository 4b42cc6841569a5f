"""Loss modules over :mod:`fastunet.functional.dice`."""

from __future__ import annotations

import reprlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastunet.arguments import checked
from fastunet.functional import dice, dice_regions
from fastunet.functional._checks import check_tensors
from fastunet.functional.dice_rule import check_rule, check_tversky
from fastunet.functional.weighted_cross_entropy import weighted_cross_entropy


class _LossOfSums(nn.Module):
    """A loss whose options are those of a function, and whose ``weights`` are a buffer that no state dict holds."""

    def __init__(self, name: str, weights: Any, **options: Any):
        super().__init__()
        check_rule(options["empty"], options["smooth"])
        check_tversky(options["tversky"])
        self.register_buffer(name, None if weights is None else _weights(name, weights), persistent=False)
        self.options = options

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


def _weights(name: str, given: Any) -> torch.Tensor:
    """Float32 (C,) of a sequence, array or tensor of finite numbers of at least 0."""
    try:
        weights = torch.as_tensor(given, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        weights = None
    if weights is None or weights.ndim != 1 or not (weights.is_meta or (weights.isfinite() & (weights >= 0)).all()):
        raise ValueError(f"{name} is {reprlib.repr(given)}; expected finite numbers of at least 0")
    return weights


@checked
class DiceCrossEntropyLoss(_LossOfSums):
    """``dice_weight · Dice loss + ce_weight · cross-entropy`` of logits and labels.

    The options are those of :func:`fastunet.functional.dice.dice_cross_entropy`. ``class_weights``, a sequence or
    tensor of one weight per class, becomes a buffer that moves with the module and is not saved with its state.
    """

    class_weights: torch.Tensor | None

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        smooth: float = 1.0,
        include_background: bool = True,
        ignore_index: int | None = None,
        class_weights: Any = None,
        label_smoothing: float = 0.0,
        tversky: Sequence[float] = (0.5, 0.5),
        reduction: str = "batch",
        empty: str = "smooth",
        check_labels: bool = True,
        sync: bool = False,
        process_group: Any = None,
        grad_reduction: str = "mean",
        backend: str | None = None,
    ):
        super().__init__(
            "class_weights", class_weights, ce_weight=ce_weight, dice_weight=dice_weight, smooth=smooth,
            include_background=include_background, ignore_index=ignore_index,
            label_smoothing=label_smoothing, tversky=tversky, reduction=reduction, empty=empty,
            check_labels=check_labels, sync=sync, process_group=process_group,
            grad_reduction=grad_reduction, backend=backend,
        )  # fmt: skip

    def forward(
        self, logits: torch.Tensor, labels: torch.Tensor, pixel_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss, a scalar, of (N, C, H, W) ``logits`` and ``labels``, (N, H, W) or in another form.

        ``pixel_weights``, (N, H, W) or (N, 1, H, W), weigh the pixels of the cross-entropy in place of
        ``class_weights``, which then weigh the classes of the Dice loss alone. The cross-entropy so weighted is not
        fused: it runs in plain PyTorch, and the logits are read once more.
        """
        if pixel_weights is None:
            return dice.dice_cross_entropy(logits, labels, class_weights=self.class_weights, **self.options)
        mine = self.options | dict(ce_weight=0.0, label_smoothing=0.0)
        overlap = dice.dice_cross_entropy(logits, labels, class_weights=self.class_weights, **mine)
        shared = ("ignore_index", "label_smoothing", "sync", "process_group", "grad_reduction")
        options = {name: self.options[name] for name in shared}
        likelihood = weighted_cross_entropy(logits, labels, pixel_weights, **options)
        return torch.add(overlap, likelihood, alpha=self.options["ce_weight"])


@checked
class DiceLoss(DiceCrossEntropyLoss):
    """The soft Dice loss alone: ``1 - mean over classes of (2 I + s) / (P + T + s)``.

    Takes the options of :class:`DiceCrossEntropyLoss` except those of the cross-entropy and ``dice_weight``.
    """

    def __init__(self, **options: Any):
        for name in ("ce_weight", "dice_weight", "label_smoothing"):
            if name in options:
                raise TypeError(f"DiceLoss has no cross-entropy term and takes no {name}")
        super().__init__(ce_weight=0.0, **options)


@checked
class RegionDiceCrossEntropyLoss(_LossOfSums):
    """``dice_weight · Dice loss + ce_weight · binary cross-entropy`` of overlapping regions of classes.

    ``regions`` gives for each output of the network the class indices that it stands for, as ``[(1, 2, 3), (1, 3),
    (3,)]`` for BraTS. The options are those of
    :func:`fastunet.functional.dice_regions.region_dice_cross_entropy`; ``region_weights`` may be a sequence. The table
    of regions and the weights are buffers that move with the module and are not saved with its state.
    """

    table: torch.Tensor
    region_weights: torch.Tensor | None

    def __init__(
        self,
        regions: Sequence[Sequence[int]],
        *,
        num_classes: int | None = None,
        region_weights: Any = None,
        ce_weight: float = 1.0,
        dice_weight: float = 1.0,
        smooth: float = 1.0,
        tversky: Sequence[float] = (0.5, 0.5),
        ignore_index: int | None = None,
        reduction: str = "batch",
        empty: str = "smooth",
        check_labels: bool = True,
        sync: bool = False,
        process_group: Any = None,
        grad_reduction: str = "mean",
        backend: str | None = None,
    ):
        super().__init__(
            "region_weights", region_weights, ce_weight=ce_weight, dice_weight=dice_weight, smooth=smooth,
            tversky=tversky, ignore_index=ignore_index, reduction=reduction, empty=empty,
            check_labels=check_labels, sync=sync, process_group=process_group,
            grad_reduction=grad_reduction, backend=backend,
        )  # fmt: skip
        self.regions = [tuple(members) for members in regions]
        self.register_buffer("table", dice_regions.region_table(self.regions, num_classes), persistent=False)

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The loss, a scalar, of (N, R, H, W) ``logits`` of R regions and (N, H, W) class indices."""
        check_tensors("RegionDiceCrossEntropyLoss", logits=logits, labels=labels)
        if logits.ndim < 2 or logits.shape[1] != len(self.regions):
            raise ValueError(f"logits have shape {tuple(logits.shape)}, for {len(self.regions)} regions")
        return dice_regions.region_dice_cross_entropy(
            logits, labels, self.table, region_weights=self.region_weights, **self.options
        )

    def extra_repr(self) -> str:
        return f"{self.regions}, {super().extra_repr()}"
