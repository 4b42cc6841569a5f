"""Whole small U-Nets on the Triton kernels against the plain build: outputs, every gradient, training steps."""

from __future__ import annotations

import copy

import pytest
import torch

from fastunet import UNet, reference
from tests.tolerance import assert_within_budget

NETWORKS = {
    "brats": (dict(width=8, depth=2, dropout=0.0), (1, 2, 8, 12)),
    "brats, odd": (dict(width=5, depth=1, dropout=0.0), (2, 2, 5, 7)),
    "isbi": (dict(in_channels=1, num_classes=2, width=8, depth=1, padding="valid", up="transpose", dropout=0.0),
             (1, 1, 20, 24)),
}  # fmt: skip


def builds(name: str, dtype: torch.dtype, device: torch.device, seed: int = 0):
    """The plain build in float64 and in ``dtype``, and fastunet's on the kernels, all with the same weights; images."""
    arguments, shape = NETWORKS[name]
    torch.manual_seed(seed)
    plain = reference.UNet(**arguments)
    for key, parameter in plain.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    plain = plain.to(device, dtype)
    fast = UNet(**arguments, backend="triton").to(device, dtype)
    fast.load_state_dict(plain.state_dict())
    return copy.deepcopy(plain).double(), plain, fast, torch.randn(shape, dtype=dtype, device=device)


def gradients(model, x, cotangent):
    x = x.clone().requires_grad_()
    model(x).backward(cotangent)
    return {"x": x.grad} | {name: p.grad for name, p in model.named_parameters()}


def outputs(model, x):
    with torch.no_grad():
        return {"logits": model(x), "probabilities": model.predict_proba(x)}


@pytest.mark.parametrize("name", NETWORKS)
def test_outputs_and_every_gradient(name, device):
    exact, plain, fast, x = builds(name, torch.float32, device)
    want, same = outputs(exact, x.double()), outputs(plain, x)
    for key, got in outputs(fast, x).items():
        assert_within_budget(got, same[key], want[key], key)
    top = want["logits"].topk(2, dim=1).values
    decided = top[:, 0] - top[:, 1] > 1e-3
    assert decided.double().mean() > 0.9
    assert torch.equal(fast.predict(x)[decided], want["logits"].argmax(1).to(torch.uint8)[decided])

    cotangent = torch.randn_like(want["logits"]).float()
    want = gradients(exact, x.double(), cotangent.double())
    same = gradients(plain, x, cotangent)
    for key, got in gradients(fast, x, cotangent).items():
        assert_within_budget(got, same[key], want[key], key)


@pytest.mark.parametrize("name", ["brats, odd", "isbi"])
def test_half_precision(name, device):
    """Rounding in float16 turns a ReLU or a maximum here and there, in PyTorch's build at other places than in ours, so
    one network's gradients cannot be held to the other's error; their largest errors over two networks can."""
    errors = {"plain": 0.0, "fast": 0.0}
    for seed in range(2):
        exact, plain, fast, x = builds(name, torch.float16, device, seed)
        want, same = outputs(exact, x.double()), outputs(plain, x)
        for key, got in outputs(fast, x).items():
            assert_within_budget(got, same[key], want[key], key)
        cotangent = torch.randn_like(want["logits"]).half()
        want = gradients(exact, x.double(), cotangent.double())
        for build, model in (("plain", plain), ("fast", fast)):
            for key, got in gradients(model, x, cotangent).items():
                error = (got.double() - want[key]).abs().max() / want[key].abs().max()
                assert error.isfinite(), key
                errors[build] = max(errors[build], error.item())
    assert errors["fast"] <= 2 * errors["plain"] + 2 * torch.finfo(torch.float16).eps


def test_training_follows_the_plain_build(device):
    _, plain, fast, x = builds("isbi", torch.float32, device)
    size = plain.output_size(*x.shape[2:])
    labels = torch.randint(0, plain.architecture.num_classes, (x.shape[0], *size), device=device)
    losses = []
    for model in (plain, fast):
        optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
        curve = []
        for _ in range(2):
            optimiser.zero_grad()
            loss = torch.nn.functional.cross_entropy(model(x), labels)
            loss.backward()
            optimiser.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0][-1] < losses[0][0]
    assert losses[1] == pytest.approx(losses[0], rel=2e-5)


def test_repeats_are_bit_identical(device):
    _, _, fast, x = builds("brats, odd", torch.float32, device)
    cotangent = torch.randn(2, 4, 5, 7, device=device)
    first = gradients(copy.deepcopy(fast), x, cotangent)
    second = gradients(copy.deepcopy(fast), x, cotangent)
    for key, gradient in first.items():
        assert torch.equal(gradient, second[key]), key
