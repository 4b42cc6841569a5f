"""Workloads of the losses: Dice alone and + cross-entropy, with the gradient, beside the ways they are usually written.

All compute ``1 - mean((2 I + 1) / (P + T + 1))``, and with cross-entropy its sum, with sums over the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from bench.measuring import floors
from bench.measuring.precision import DTYPES
from bench.workloads.variants import LOSS_VARIANTS, Variant
from bench.workloads.workload import Workload
from fastunet.inspection.repeats import Function

_AXES = (0, 2, 3)

Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def one_hot_dice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The usual way: softmax, a one-hot tensor of the logits' size, and a pass for each sum."""
    probabilities = _wide(logits).softmax(dim=1)
    one_hot = F.one_hot(labels.long(), logits.shape[1]).movedim(-1, 1).to(probabilities.dtype)
    return _dice(probabilities, one_hot)


def one_hot_dice_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """:func:`one_hot_dice` and PyTorch's cross-entropy."""
    return one_hot_dice(logits, labels) + F.cross_entropy(_wide(logits), labels.long())


def scattered_dice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The leanest eager form that we know: the one-hot tensor is scattered in the dtype in which it is multiplied."""
    probabilities = _wide(logits).softmax(dim=1)
    one_hot = torch.zeros_like(probabilities).scatter_(1, labels.long().unsqueeze(1), 1.0)
    return _dice(probabilities, one_hot)


def nnunet_style_dice(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """After nnU-Net's memory-efficient soft Dice: a boolean one-hot scattered without gradient, three reductions."""
    probabilities = _wide(logits).softmax(dim=1)
    with torch.no_grad():
        one_hot = torch.zeros(logits.shape, device=logits.device, dtype=torch.bool)
        one_hot.scatter_(1, labels.long().unsqueeze(1), 1)
        truth = one_hot.sum(_AXES)
    intersection, predicted = (probabilities * one_hot).sum(_AXES), probabilities.sum(_AXES)
    return 1 - ((2 * intersection + 1) / torch.clip(truth + predicted + 1, 1e-8)).mean()


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _dice(probabilities: torch.Tensor, one_hot: torch.Tensor) -> torch.Tensor:
    intersection = (probabilities * one_hot).sum(_AXES)
    return 1 - ((2 * intersection + 1) / (probabilities.sum(_AXES) + one_hot.sum(_AXES) + 1)).mean()


def _eager(dice: Loss) -> Callable[[bool], Loss]:
    def build(cross_entropy: bool) -> Loss:
        if not cross_entropy:
            return dice
        return lambda logits, labels: dice(logits, labels) + F.cross_entropy(_wide(logits), labels.long())

    return build


def _monai_loss(cross_entropy: bool) -> Loss:
    from monai.losses import DiceCELoss, DiceLoss

    options = dict(to_onehot_y=True, softmax=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)
    loss = DiceCELoss(**options) if cross_entropy else DiceLoss(**options)
    return lambda logits, labels: loss(logits.float(), labels.unsqueeze(1).long())


def _fastunet_loss(cross_entropy: bool) -> Loss:
    from fastunet.functional import dice

    # trusting the labels, as the others do: no variant waits for the device
    loss = dice.dice_cross_entropy if cross_entropy else dice.dice_loss
    return lambda logits, labels: loss(logits, labels, check_labels=False)


_FORMS = {
    "plain": _eager(one_hot_dice),
    "scattered": _eager(scattered_dice),
    "nnU-Net style": _eager(nnunet_style_dice),
    "MONAI": _monai_loss,
    "fastunet": _fastunet_loss,
}


def loss_workload(batch: int, classes: int, side: int, precision: str, *, cross_entropy: bool = True,
                  backward: bool = True, without: tuple[tuple[str, str], ...] = ()) -> Workload:
    """Dice (+ cross-entropy) of (batch, classes, side, side) logits and uint8 labels, and the logits' gradient."""
    dtype = DTYPES[precision]

    def operands(device: torch.device, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        logits = torch.randn((batch, classes, side, side), generator=generator, device=device)
        labels = torch.randint(classes, (batch, side, side), generator=generator, device=device, dtype=torch.uint8)
        return [(3 * logits).to(dtype), labels]

    def complete(loss) -> Function:
        def step(logits, labels):
            if not backward:
                with torch.no_grad():
                    return (loss(logits, labels),)
            leaf = logits.detach().requires_grad_()
            value = loss(leaf, labels)
            return value.detach(), torch.autograd.grad(value, leaf)[0]

        return step

    def build(variant: Variant, device: torch.device) -> Function:
        return complete(variant.wrap(_FORMS[variant.form](cross_entropy)))

    def exact(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return complete(_FORMS["plain"](cross_entropy))(logits.double(), labels)

    step = "forward + backward" if backward else "forward"
    floor = floors.of_loss(batch, classes, side * side, dtype.itemsize, backward=backward)
    subject = "dice_cross_entropy" if cross_entropy else "dice_loss"
    return Workload(subject, step, f"{batch}×{classes}×{side}×{side}", batch, precision, floor, 4,
                    LOSS_VARIANTS, operands, build, exact, without)  # fmt: skip
