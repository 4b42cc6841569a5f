"""Workloads of the loss alone: Dice + cross-entropy with its gradient, beside the ways in which it is usually written.

All compute ``1 - mean((2 I + 1) / (P + T + 1)) + cross-entropy`` with sums over the whole batch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench import floors
from bench.precision import DTYPES
from bench.variants import LOSS_VARIANTS, Function, Variant
from bench.workloads import Workload

_AXES = (0, 2, 3)


def one_hot_dice_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The usual way: softmax, a one-hot tensor of the logits' size, a pass for each sum, and cross-entropy."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    probabilities = wide.softmax(dim=1)
    one_hot = F.one_hot(labels.long(), logits.shape[1]).movedim(-1, 1).to(wide.dtype)
    intersection = (probabilities * one_hot).sum(_AXES)
    dice = (2 * intersection + 1) / (probabilities.sum(_AXES) + one_hot.sum(_AXES) + 1)
    return 1 - dice.mean() + F.cross_entropy(wide, labels.long())


def nnunet_style_dice_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """After nnU-Net's memory-efficient soft Dice: a boolean one-hot scattered without gradient, three reductions."""
    wide = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    probabilities = wide.softmax(dim=1)
    index = labels.long().unsqueeze(1)
    with torch.no_grad():
        one_hot = torch.zeros(wide.shape, device=wide.device, dtype=torch.bool).scatter_(1, index, 1)
        truth = one_hot.sum(_AXES)
    intersection, predicted = (probabilities * one_hot).sum(_AXES), probabilities.sum(_AXES)
    dice = (2 * intersection + 1) / torch.clip(truth + predicted + 1, 1e-8)
    return 1 - dice.mean() + F.cross_entropy(wide, index[:, 0])


def _monai_loss():
    from monai.losses import DiceCELoss

    loss = DiceCELoss(to_onehot_y=True, softmax=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)
    return lambda logits, labels: loss(logits.float(), labels.unsqueeze(1).long())


def _fastunet_loss():
    from fastunet.functional import dice

    # trusting the labels, as the others do: no variant waits for the device
    return lambda logits, labels: dice.dice_cross_entropy(logits, labels, check_labels=False)


_FORMS = {
    "plain": lambda: one_hot_dice_cross_entropy,
    "nnU-Net style": lambda: nnunet_style_dice_cross_entropy,
    "MONAI DiceCELoss": _monai_loss,
    "fastunet": _fastunet_loss,
}


def loss_workload(batch: int, classes: int, side: int, precision: str, *, backward: bool = True,
                  without: tuple[tuple[str, str], ...] = ()) -> Workload:
    """The loss of (batch, classes, side, side) logits and uint8 labels, and the gradient of the logits."""
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
        return complete(variant.wrap(_FORMS[variant.form]()))

    def exact(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return complete(one_hot_dice_cross_entropy)(logits.double(), labels)

    step = "forward + backward" if backward else "forward"
    floor = floors.of_loss(batch, classes, side * side, dtype.itemsize, backward=backward)
    return Workload("dice_cross_entropy", step, f"{batch}×{classes}×{side}×{side}", batch, precision, floor, 4,
                    LOSS_VARIANTS, operands, build, exact, without)  # fmt: skip
