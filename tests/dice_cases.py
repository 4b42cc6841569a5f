"""Batches for the tests of the Dice functions, and the eager one-hot loss that they are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from tests.tolerance import assert_within_budget

LAYOUTS = {"NCHW": torch.contiguous_format, "NHWC": torch.channels_last}


def batch(c, size=(7, 9), n=3, dtype=torch.float64, seed=0, labels=torch.uint8):
    generator = torch.Generator().manual_seed(seed)
    logits = (2 * torch.randn(n, c, *size, generator=generator, dtype=torch.float64)).to(dtype)
    return logits, torch.randint(0, max(c, 2), (n, *size), generator=generator).to(labels)


def literal(logits, labels, *, weights=None, ignore=None, smooth=1.0, include_background=True, reduction="batch",
            ce_weight=1.0, dice_weight=1.0, empty="smooth", label_smoothing=0.0, tversky=(0.5, 0.5)):  # fmt: skip
    """The eager one-hot loss, option by option, as one would write it without a library."""
    one_logit = logits.shape[1] == 1
    z = torch.cat([torch.zeros_like(logits), logits], 1) if one_logit else logits
    k = z.shape[1]
    valid = torch.ones_like(labels, dtype=torch.bool) if ignore is None else labels != ignore
    t = F.one_hot(torch.where(valid, labels.long(), 0), k).movedim(-1, 1) * valid[:, None]
    p = z.softmax(1) * valid[:, None]
    axes = [0, *range(2, z.ndim)] if reduction == "batch" else list(range(2, z.ndim))
    i, p_sum, t_sum = ((x.sum(axes)) for x in (p * t, p, t))
    missed = tversky[0] * (p_sum - i) + tversky[1] * (t_sum - i)
    scores, present = (i + smooth / 2) / (i + missed + smooth / 2), t_sum > 0
    if empty == "one":
        scores = torch.where(present, scores, (p_sum == 0).to(scores.dtype))
    per_class = torch.ones(k, dtype=z.dtype) if weights is None or one_logit else weights.to(z.dtype)
    per_class = (per_class * (present if empty == "skip" else 1)).expand_as(scores)
    first = 1 if one_logit or not include_background else 0
    scores, per_class = scores[..., first:], per_class[..., first:]
    dice_term = (per_class * (1 - scores)).sum() / per_class.sum()
    target = torch.where(valid, labels.long(), -100)
    weights = None if weights is None else weights.to(z.dtype)
    ce = F.cross_entropy(z, target, weights, ignore_index=-100, label_smoothing=label_smoothing)
    return dice_weight * dice_term + ce_weight * ce


OPTIONS = {
    "plain": {},
    "weights": dict(weights=True),
    "ignore": dict(ignore=1),
    "everything": dict(weights=True, ignore=255, smooth=0.5, reduction="sample", ce_weight=0.3, dice_weight=2.0),
    "foreground": dict(include_background=False, weights=True),
    "smoothing": dict(weights=True, ignore=255, label_smoothing=0.15),
    "smoothing alone": dict(label_smoothing=0.3, dice_weight=0.0),
    "Tversky": dict(tversky=(0.3, 0.7), weights=True),
    "skip": dict(empty="skip", reduction="sample"),
    "one": dict(empty="one", smooth=0.0, reduction="sample"),
    "one and Tversky": dict(empty="one", tversky=(1.0, 0.2)),
}


def check_exactly(logits, loss, expected):
    """A loss and its gradient in float64 are those of the eager loss."""
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    (gradient,), (wanted,) = torch.autograd.grad(loss, logits), torch.autograd.grad(expected, logits)
    torch.testing.assert_close(gradient, wanted, rtol=1e-10, atol=1e-16)
    assert gradient.stride() == logits.stride()


def check_within_budget(logits, fused, eager):
    """Of logits in 32 or 16 bits, loss and gradient of ``fused`` against those of ``eager`` in float32 and float64."""
    leaf, same, exact = (logits.clone().to(d).requires_grad_() for d in (logits.dtype, logits.dtype, torch.float64))
    loss, same_loss, exact_loss = fused(leaf), eager(same.float()), eager(exact)
    assert loss.dtype == torch.float32
    assert_within_budget(loss.detach(), same_loss.detach(), exact_loss, "loss")
    for value in (loss, same_loss, exact_loss):
        value.backward()
    assert_within_budget(leaf.grad, same.grad, exact.grad, "gradient")


def arguments(options, k, dtype, weights="class_weights"):
    """The same options for :func:`literal` and for the library, which calls k ``weights`` so."""
    options = dict(options)
    if options.pop("weights", False):
        options["weights"] = torch.linspace(0.2, 1.7, k, dtype=dtype)
    names = {"weights": weights, "ignore": "ignore_index"}
    return options, {names.get(name, name): value for name, value in options.items()}
