"""Whatever is done to the modules of the plain build does the same to the fused one: outputs and every gradient."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from fastunet import UNet, reference
from tests import unet_changes_of_blocks  # noqa: F401 - registers its changes
from tests.unet_changes import CHANGES, UNCHANGED, half

PRESETS = {
    "brats": (dict(in_channels=2, num_classes=3, padding="same", up="upsample"), (20, 14)),
    "isbi": (dict(in_channels=1, num_classes=2, padding="valid", up="transpose"), (44, 60)),
}


def pair(preset, training):
    arguments, size = PRESETS[preset]
    arguments = arguments | dict(width=4, depth=2, dropout=0.0)
    torch.manual_seed(0)
    plain = reference.UNet(**arguments).double().train(training)
    with torch.no_grad():
        for p in plain.parameters():
            if p.dim() == 1:
                p.normal_(std=0.1)
    fused = UNet(**arguments).double().train(training)
    fused.load_state_dict(plain.state_dict())
    return plain, fused, torch.randn(2, arguments["in_channels"], *size, dtype=torch.float64)


def results(model, x):
    """Output, gradient of the images, and of every parameter by name, of two passes."""
    found = {}
    for i in range(2):
        model.zero_grad(set_to_none=True)
        images = x.clone().requires_grad_()
        y = model(images)
        (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
        found |= {f"output {i}": y.detach(), f"d images {i}": images.grad}
        found |= {f"d {name} {i}": p.grad for name, p in model.named_parameters()}
    return found


@pytest.mark.parametrize("preset, training", [("brats", True), ("isbi", False)], ids=["brats, train", "isbi, eval"])
@pytest.mark.parametrize("name", CHANGES)
def test_a_change_does_what_it_does_to_the_plain_build(name, preset, training):
    plain, fused, x = pair(preset, training)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, fused = (CHANGES[name](model) or model for model in (plain, fused))
        expected, got = results(plain, x), results(fused, x)
    assert got.keys() == expected.keys()
    for key, want in expected.items():
        assert (got[key] is None) == (want is None), key
        if want is not None:
            told = lambda text, key=key: f"{key}: {text}"  # noqa: E731
            torch.testing.assert_close(got[key], want, rtol=1e-10, atol=1e-10, msg=told)
    inner = getattr(fused, "model", fused)
    if name in UNCHANGED:
        assert not inner.why_not_fused()


def test_a_change_is_named_once_and_the_rest_stays_fused():
    _, fused, x = pair("brats", True)
    fused.encoders[1].conv2.register_forward_hook(half)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        fused(x)
        fused(x)
    assert [str(w.message) for w in seen] == [
        "encoders.1 of fastunet.UNet runs through its modules, not fused: conv2 has hooks"
    ]
    assert fused.why_not_fused() == {"encoders.1": "conv2 has hooks"}


def test_hooks_that_only_look_see_every_module():
    def seen_by(model):
        seen = []
        for name, module in model.named_modules():
            if not isinstance(module, nn.ModuleList):
                module.register_forward_hook(lambda m, x, y, name=name: seen.append((name, y.shape)))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model(torch.randn(1, 2, 8, 8))
        return sorted(seen)

    plain, fused, _ = pair("brats", False)
    assert len(seen_by(plain.float())) == 20
    assert seen_by(fused.float()) == seen_by(reference.UNet(num_classes=3, width=4, depth=2).eval())


@pytest.mark.parametrize("preset", PRESETS)
def test_global_hooks_run_on_every_layer(preset):
    plain, fused, x = pair(preset, True)
    handle = nn.modules.module.register_module_forward_hook(
        lambda m, inputs, y: y * 0.9 if isinstance(m, nn.Conv2d | nn.ConvTranspose2d) else None
    )
    try:
        with pytest.warns(UserWarning, match="global module hooks"):
            got = results(fused, x)
        expected = results(plain, x)
    finally:
        handle.remove()
    for key, want in expected.items():
        torch.testing.assert_close(got[key], want, rtol=1e-10, atol=1e-10)
    assert not fused.why_not_fused()


def test_pruned_networks_train_alike():
    plain, fused, x = pair("brats", True)
    for model in (plain, fused):
        for layer in (model.encoders[0].conv1, model.decoders[1].conv2):
            torch.manual_seed(6)
            prune.random_unstructured(layer, "weight", 0.3)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            for _ in range(3):
                optimiser.zero_grad()
                model(x).square().mean().backward()
                optimiser.step()
    for key, want in plain.state_dict().items():
        torch.testing.assert_close(fused.state_dict()[key], want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", [
    "a hook on head", "a hook on decoders.1", "a hook on dropout", "adapter on the head", "a head of 3×3",
    "a hook on the model", "pruned layer", "no bias anywhere",
])  # fmt: skip
@pytest.mark.parametrize("preset", PRESETS)
def test_predictions_and_frozen_networks_obey_too(preset, name):
    plain, fused, x = pair(preset, False)
    plain, fused, x = plain.float(), fused.float(), x.float()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        for model in (plain, fused):
            CHANGES[name](model)
        frozen = fused.freeze()
        torch.testing.assert_close(frozen(x), plain(x), rtol=1e-4, atol=1e-5)
        for model in (fused, frozen):
            torch.testing.assert_close(model.predict_proba(x), plain.predict_proba(x), rtol=1e-4, atol=1e-5)
            assert (model.predict(x) == plain.predict(x)).double().mean() > 0.999


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_other_dtypes_agree_within_their_rounding(dtype):
    plain, fused, x = pair("brats", False)
    with torch.no_grad():
        exact = plain(x)
        error = (plain.to(dtype)(x.to(dtype)).double() - exact).abs().max()
        assert (fused.to(dtype)(x.to(dtype)).double() - exact).abs().max() <= 2 * error + 2 * torch.finfo(dtype).eps
