"""Loss modules: options, buffers, and agreement with MONAI where its options match."""

import pytest
import torch

from fastunet.functional.dice import dice_cross_entropy, dice_loss
from fastunet.losses import DiceCrossEntropyLoss, DiceLoss


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 4, 11, 13, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, 4, (3, 11, 13), generator=generator)


def test_modules_are_the_functions(batch):
    options = dict(smooth=0.5, include_background=False, ignore_index=2, reduction="sample", empty="skip",
                   tversky=(0.3, 0.7))  # fmt: skip
    weights = torch.tensor([0.5, 1, 2, 3])
    want = dice_loss(*batch, class_weights=weights, **options)
    assert torch.equal(DiceLoss(class_weights=[0.5, 1, 2, 3], **options)(*batch), want)
    want = dice_cross_entropy(*batch, class_weights=weights, ce_weight=0.3, dice_weight=2, **options)
    module = DiceCrossEntropyLoss(class_weights=weights, ce_weight=0.3, dice_weight=2, **options)
    assert torch.equal(module(*batch), want)
    assert "empty='skip'" in repr(module)


def test_class_weights_move_with_the_module_but_are_not_saved():
    module = DiceLoss(class_weights=[1.0, 2.0])
    assert module.to("meta").class_weights.device.type == "meta"
    assert module.state_dict() == {}


def test_bad_options():
    with pytest.raises(ValueError, match="empty is 'never'"):
        DiceLoss(empty="never")
    with pytest.raises(TypeError, match="takes no ce_weight"):
        DiceLoss(ce_weight=1.0)


def test_label_out_of_range_is_named(batch):
    logits, labels = batch
    labels[0, 0, 0] = 17
    with pytest.raises(ValueError, match="17 among them"):
        DiceLoss()(logits, labels)
    assert DiceLoss(check_labels=False)(logits, labels).isfinite()


@pytest.mark.parametrize("include_background", [True, False])
@pytest.mark.parametrize("reduction", ["batch", "sample"])
def test_equals_monai(batch, reduction, include_background):
    losses = pytest.importorskip("monai.losses", reason="MONAI is not installed (pip install 'fastunet[rivals]')")
    logits, labels = batch
    theirs = dict(
        include_background=include_background, to_onehot_y=True, softmax=True, batch=reduction == "batch",
        smooth_nr=1.0, smooth_dr=1.0,
    )  # fmt: skip
    ours = dict(include_background=include_background, reduction=reduction)
    a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    loss, want = DiceLoss(**ours)(a, labels), losses.DiceLoss(**theirs)(b, labels[:, None])
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)  # MONAI's one-hot tensor is float32
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x, z in ((loss, a), (want, b))), rtol=1e-5, atol=1e-9)

    options = dict(lambda_ce=0.7, lambda_dice=1.3)
    loss = DiceCrossEntropyLoss(ce_weight=0.7, dice_weight=1.3, **ours)(a, labels)
    want = losses.DiceCELoss(**theirs, **options)(b, labels[:, None])
    torch.testing.assert_close(loss, want, rtol=1e-6, atol=0)
    torch.testing.assert_close(*(torch.autograd.grad(x, z)[0] for x, z in ((loss, a), (want, b))), rtol=1e-5, atol=1e-9)


def test_equals_monai_for_one_logit(batch):
    losses = pytest.importorskip("monai.losses", reason="MONAI is not installed (pip install 'fastunet[rivals]')")
    logits, labels = batch[0][:, :1], batch[1] % 2
    want = losses.DiceLoss(sigmoid=True, batch=True, smooth_nr=1.0, smooth_dr=1.0)(logits, labels[:, None])
    torch.testing.assert_close(DiceLoss()(logits, labels), want, rtol=1e-6, atol=0)
