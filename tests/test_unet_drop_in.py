"""What PyTorch does to all modules at once, or asks of any, acts on the fused network as on the plain one."""

from __future__ import annotations

import contextlib

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from torch.overrides import TorchFunctionMode

from tests.test_unet_norms import STYLES, builds

STYLES = STYLES | {"plain": {}, "transposed": dict(padding="valid", up="transpose")}


class Doubles(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        return 2 * result if func is F.conv2d else result


def patched(owner, name):
    def patch(monkeypatch):
        before = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: 0.5 * before(*args, **kwargs))

    return patch


EVERYWHERE = {
    "TorchFunctionMode": lambda patch: Doubles(),
    "functional.relu": patched(F, "relu"),
    "functional.conv2d": patched(F, "conv2d"),
    "functional.pad": patched(F, "pad"),
    "torch.relu": patched(torch, "relu"),
    "BatchNorm2d": patched(nn.BatchNorm2d, "forward"),
    "__call__": patched(nn.Module, "__call__"),
}


@pytest.mark.filterwarnings("ignore:.*runs through its modules")
@pytest.mark.parametrize("change", EVERYWHERE)
def test_what_is_done_to_all_of_torch_nn_counts(change, monkeypatch):
    model, plain, x = builds(STYLES["batch" if change == "BatchNorm2d" else "plain"])
    with EVERYWHERE[change](monkeypatch) or contextlib.nullcontext():
        got, want = model(x), plain(x)
    torch.testing.assert_close(got, want)
    monkeypatch.undo()
    with torch.device("cpu"):  # a mode of PyTorch's own that changes no layer
        assert not model.why_not_fused()


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("style", ["plain", "batch", "transposed"])
def test_dropout_of_a_seed_drops_what_it_drops_in_the_plain_build(style, channels_last):
    model, plain, x = builds(STYLES[style])
    results = []
    for each in (model, plain):
        each.dropout.p = 0.5
        if channels_last:
            each.to(memory_format=torch.channels_last)
        torch.manual_seed(3)
        y = each(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), list(each.parameters()))])
    for got, want in zip(*results):
        torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:.*runs through its modules")
@pytest.mark.parametrize("style", ["batch", "plain"])
def test_hooks_see_maps_in_the_memory_of_the_plain_build(style):
    model, plain, x = builds(STYLES[style])
    seen = {model: [], plain: []}
    for each in (model, plain):
        for name, module in each.named_modules():
            if name and not isinstance(module, nn.ModuleList):
                module.register_forward_hook(lambda m, i, y, n=name, o=seen[each]: o.append((n, y.shape, y.stride())))
        each(x)
    assert seen[model] == seen[plain]


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("style", ["batch", "plain", "transposed"])
def test_logits_are_in_the_memory_of_the_plain_build(style, memory):
    model, plain, x = (each.float().to(memory_format=memory) for each in builds(STYLES[style]))
    x = F.interpolate(x, (44, 60))  # padded by none
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            assert model(x).stride() == plain(x).stride()
            assert model.predict_proba(x).stride() == plain(x).stride()
    assert model.eval().freeze()(x).stride() == plain(x).stride()


@pytest.mark.filterwarnings("ignore:.*runs through its modules")
def test_a_hook_may_cast_the_images_for_a_first_layer_of_another_dtype():
    model, plain, x = builds(STYLES["plain"], dtype=torch.float32)
    for each in (model, plain):
        each.encoders[0].double().register_forward_pre_hook(lambda m, inputs: (inputs[0].double(),))
        each.encoders[0].register_forward_hook(lambda m, inputs, y: y.float())
    torch.testing.assert_close(model(x), plain(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"the images are torch\.float16, but the first layer's parameters"):
        builds(STYLES["plain"], dtype=torch.float32)[0](x.half())


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("style", ["plain", "instance"])
def test_gradients_of_each_image_by_vmap(style):
    model, plain, x = builds(STYLES[style], training=False)

    def each_image(network):
        def loss(parameters, image):
            return torch.func.functional_call(network, parameters, (image[None],)).square().mean()

        state = {name: p.detach() for name, p in network.named_parameters()}
        return torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(state, x)

    got, want = each_image(model), each_image(plain)
    for name in want:
        torch.testing.assert_close(got[name], want[name])


class Scaled(nn.Module):
    factor = 1.0

    def forward(self, weight):
        return weight * self.factor


def monte_carlo(model):
    model.dropout.p = 0.5
    model.dropout.train()


def computed(model):
    parametrize.register_parametrization(model.bottleneck.conv1, "weight", Scaled())


def scaled(model):
    if hasattr(model.bottleneck.conv1, "parametrizations"):
        model.bottleneck.conv1.parametrizations.weight[0].factor = 3.0


def unlisted(model):
    weight = model.bottleneck.conv1.weight.detach().clone()
    del model.bottleneck.conv1.weight
    model.bottleneck.conv1.weight = weight


def written(model):
    model.bottleneck.conv1.weight.mul_(2)


@pytest.mark.filterwarnings("ignore:.*runs through its modules")
@pytest.mark.parametrize(("before", "later"), [
    (monte_carlo, lambda m: None), (lambda m: None, monte_carlo), (computed, scaled), (unlisted, written),
])  # fmt: skip
def test_a_frozen_network_follows_what_leaves_no_trace(before, later):
    model, plain, x = builds(STYLES["plain"], training=False, dtype=torch.float32)
    frozen = model.freeze()
    with torch.no_grad():
        for change in (before, later):
            for each in (model, plain):
                change(each)
            for output in ("forward", "predict_proba"):
                torch.manual_seed(2)
                got = getattr(frozen, output)(x)
                torch.manual_seed(2)
                torch.testing.assert_close(got, getattr(plain, output)(x), rtol=1e-4, atol=1e-5)
