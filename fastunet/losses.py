"""Loss modules over :mod:`fastunet.functional.dice`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastunet.arguments import checked
from fastunet.functional import dice
from fastunet.functional.dice_rule import check_rule, check_tversky
from fastunet.functional.weighted_cross_entropy import weighted_cross_entropy


@checked
class DiceCrossEntropyLoss(nn.Module):
    """``dice_weight · Dice loss + ce_weight · cross-entropy`` of logits and labels.

    The options are those of :func:`fastunet.functional.dice.dice_cross_entropy`. ``class_weights``, a sequence or
    tensor of one weight per class, becomes a buffer that moves with the module and is not saved with its state.
    """

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
        super().__init__()
        check_rule(empty, smooth)
        check_tversky(tversky)
        if class_weights is not None:
            class_weights = torch.as_tensor(class_weights, dtype=torch.float32)
        self.class_weights: torch.Tensor | None
        self.register_buffer("class_weights", class_weights, persistent=False)
        self.options = dict(
            ce_weight=ce_weight,
            dice_weight=dice_weight,
            smooth=smooth,
            include_background=include_background,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            tversky=tversky,
            reduction=reduction,
            empty=empty,
            check_labels=check_labels,
            sync=sync,
            process_group=process_group,
            grad_reduction=grad_reduction,
            backend=backend,
        )

    def forward(
        self, logits: torch.Tensor, labels: torch.Tensor, pixel_weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """The loss, a scalar, of (N, C, H, W) ``logits`` and ``labels``, (N, H, W) or in another form.

        ``pixel_weights`` (N, H, W) weigh the pixels of the cross-entropy in place of ``class_weights``, which then
        weigh the classes of the Dice loss alone. The cross-entropy so weighted is not fused: it runs in plain PyTorch,
        and the logits are read once more.
        """
        if pixel_weights is None:
            return dice.dice_cross_entropy(logits, labels, class_weights=self.class_weights, **self.options)
        mine = self.options | dict(ce_weight=0.0, label_smoothing=0.0)
        overlap = dice.dice_cross_entropy(logits, labels, class_weights=self.class_weights, **mine)
        shared = ("ignore_index", "label_smoothing", "sync", "process_group", "grad_reduction")
        options = {name: self.options[name] for name in shared}
        likelihood = weighted_cross_entropy(logits, labels, pixel_weights, **options)
        return torch.add(overlap, likelihood, alpha=self.options["ce_weight"])

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.options.items())


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
