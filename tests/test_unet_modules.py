"""Whatever is done to the modules of the plain build does the same to the fused one: outputs and every gradient."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

from fastunet import UNet, reference

PRESETS = {
    "brats": (dict(in_channels=2, num_classes=3, padding="same", up="upsample"), (20, 14)),
    "isbi": (dict(in_channels=1, num_classes=2, padding="valid", up="transpose"), (44, 60)),
}
CHANGES = {}
UNCHANGED = {"partial freezing", "frozen bias", "shared module", "shared weight", "parametrised", "new weight norm",
             "new spectral norm", "EMA", "deepcopy", "pickle", "to empty", "functional_call", "a hook on the model",
             "a pre-hook on the model", "state_dict", "swapped parameters"}  # fmt: skip
"""Changes that leave every block fused."""


def change(name):
    """Registers ``function(model) -> model or None`` as a change that both builds must honour alike."""

    def register(function):
        CHANGES[name] = function
        return function

    return register


def half(module, inputs, output):
    return output * 0.5


for place in ("encoders.0.conv1", "encoders.1.conv2", "bottleneck.conv1", "decoders.0.up", "decoders.1.conv2", "head",
              "encoders.0", "encoders.1", "bottleneck", "dropout", "decoders.0", "decoders.1"):  # fmt: skip
    CHANGES[f"a hook on {place}"] = lambda m, place=place: m.get_submodule(place).register_forward_hook(half) and None
    CHANGES[f"a pre-hook on {place}"] = lambda m, place=place: m.get_submodule(place).register_forward_pre_hook(
        lambda module, inputs: (inputs[0] - 0.25, *inputs[1:])) and None  # fmt: skip
    CHANGES[f"a backward hook on {place}"] = lambda m, place=place: m.get_submodule(place).register_full_backward_hook(
        lambda module, into, out: tuple(None if g is None else 3 * g for g in into)) and None  # fmt: skip
    CHANGES[f"a backward pre-hook on {place}"] = lambda m, place=place: m.get_submodule(
        place).register_full_backward_pre_hook(lambda module, out: tuple(-g for g in out)) and None  # fmt: skip
CHANGES["a hook on the model"] = lambda m: m.register_forward_hook(half) and None
CHANGES["a pre-hook on the model"] = lambda m: m.register_forward_pre_hook(lambda module, x: (x[0] + 1,)) and None


@change("a hook with keywords")
def _(model):
    model.bottleneck.register_forward_hook(lambda m, args, kwargs, y: y + 1, with_kwargs=True)


@change("pruned layer")
def _(model):
    prune.l1_unstructured(model.encoders[0].conv2, "weight", 0.5)


@change("pruned head, structured")
def _(model):
    prune.ln_structured(model.head, "weight", 0.4, n=2, dim=1)


@change("pruned bias")
def _(model):
    torch.manual_seed(8)
    nn.init.normal_(model.decoders[0].conv1.bias)
    prune.l1_unstructured(model.decoders[0].conv1, "bias", 0.5)


@change("pruned globally")
def _(model):
    layers = [(m, "weight") for m in model.modules() if isinstance(m, nn.Conv2d)]
    prune.global_unstructured(layers, pruning_method=prune.L1Unstructured, amount=0.3)


@change("pruned, then made permanent")
def _(model):
    prune.l1_unstructured(model.bottleneck.conv1, "weight", 0.5)
    prune.remove(model.bottleneck.conv1, "weight")


@change("old weight norm")
def _(model):
    nn.utils.weight_norm(model.encoders[0].conv2)
    with torch.no_grad():
        model.encoders[0].conv2.weight_g.mul_(1.5)


@change("old spectral norm")
def _(model):
    torch.manual_seed(5)
    nn.utils.spectral_norm(model.decoders[0].conv1)


@change("new weight norm")
def _(model):
    parametrizations.weight_norm(model.encoders[0].conv2)
    with torch.no_grad():
        model.encoders[0].conv2.parametrizations.weight.original0.mul_(1.5)


@change("new spectral norm")
def _(model):
    torch.manual_seed(5)
    parametrizations.spectral_norm(model.bottleneck.conv2)


class Square(nn.Module):
    def forward(self, weight):
        return weight * weight.abs()


@change("parametrised")
def _(model):
    for layer in (model.encoders[0].conv1, model.decoders[0].up, model.head):
        parametrize.register_parametrization(layer, "weight", Square())
    parametrize.register_parametrization(model.bottleneck.conv1, "bias", Square())


@change("shared weight")
def _(model):
    model.encoders[1].conv2.weight = model.decoders[0].conv2.weight


@change("shared module")
def _(model):
    model.encoders[1].conv2 = model.decoders[0].conv2


@change("shared block")
def _(model):
    model.decoders[1].conv2 = nn.Sequential(model.decoders[1].conv2, nn.Identity())


def fresh(layer, seed=3, **options):
    """A convolution in the place of ``layer``, in its dtype."""
    torch.manual_seed(seed)
    given = dict(kernel_size=layer.kernel_size, padding=layer.padding, bias=layer.bias is not None) | options
    return nn.Conv2d(layer.in_channels, layer.out_channels, **given).to(layer.weight)


@change("dilated")
def _(model):
    if model.architecture.padding == "same":
        model.encoders[0].conv2 = fresh(model.encoders[0].conv2, dilation=2)
    else:
        model.encoders[0].conv2 = fresh(model.encoders[0].conv2, dilation=2, padding=1)


@change("grouped")
def _(model):
    model.bottleneck.conv2 = fresh(model.bottleneck.conv2, groups=2)


@change("reflected borders")
def _(model):
    layer = model.encoders[1].conv2
    model.encoders[1].conv2 = fresh(layer, padding=1 if layer.padding == "same" else 0, padding_mode="reflect")


@change("padding as a number")
def _(model):
    layer = model.encoders[1].conv2
    model.encoders[1].conv2 = fresh(layer, padding=1 if layer.padding == "same" else 0)


@change("changed in place")
def _(model):
    model.encoders[0].conv1.padding_mode = "circular"
    model.encoders[0].conv1._reversed_padding_repeated_twice = [1, 1, 1, 1]


@change("no bias in a layer")
def _(model):
    model.encoders[0].conv1.bias = None


@change("no bias anywhere")
def _(model):
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            layer.register_parameter("bias", None)


class Standardised(nn.Conv2d):
    def forward(self, x):
        w = self.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-3)
        return self._conv_forward(x, w, self.bias)


@change("a subclass of Conv2d")
def _(model):
    layer = model.decoders[0].conv2
    new = Standardised(layer.in_channels, layer.out_channels, 3, padding=layer.padding).to(layer.weight)
    new.load_state_dict(layer.state_dict())
    model.decoders[0].conv2 = new


@change("another class for a layer")
def _(model):
    model.encoders[0].conv1.__class__ = Standardised


class LoRA(nn.Module):
    """An adapter that shows the weight and bias of what it wraps."""

    def __init__(self, base):
        super().__init__()
        torch.manual_seed(9)
        self.base = base
        self.down = nn.Conv2d(base.in_channels, 2, base.kernel_size, padding=base.padding, bias=False).to(base.weight)
        self.up = nn.Conv2d(2, base.out_channels, 1, bias=False).to(base.weight)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@change("adapter on a layer")
def _(model):
    model.decoders[1].conv1 = LoRA(model.decoders[1].conv1)


@change("adapter on the head")
def _(model):
    model.head = LoRA(model.head)


@change("a layer in a Sequential")
def _(model):
    model.encoders[0].conv2 = nn.Sequential(model.encoders[0].conv2, nn.Dropout(0.0))


@change("identity for a layer")
def _(model):
    if model.architecture.padding == "same":
        model.encoders[0].conv2 = nn.Identity()


@change("BatchNorm after a layer")
def _(model):
    layer = model.encoders[0].conv1
    model.encoders[0].conv1 = nn.Sequential(layer, nn.BatchNorm2d(layer.out_channels).to(layer.weight))


@change("a block in a Sequential")
def _(model):
    model.encoders[0] = nn.Sequential(model.encoders[0], nn.Tanh())


@change("another block")
def _(model):
    a = model.architecture
    torch.manual_seed(2)
    model.bottleneck = nn.Sequential(
        nn.Conv2d(a.widths[1], a.widths[2], 3, padding=a.padding), nn.GELU(),
        nn.Conv2d(a.widths[2], a.widths[2], 3, padding=a.padding)).to(model.head.weight)  # fmt: skip


@change("a block patched")
def _(model):
    block = model.encoders[1]
    plain = reference.ConvBlock.forward
    block.forward = lambda x: plain(block, x) + 0.1


@change("a layer patched")
def _(model):
    layer = model.decoders[0].conv1
    layer.forward = lambda x: F.conv2d(x, layer.weight.abs(), layer.bias, padding=layer.padding)


@change("a layer's inner step patched")
def _(model):
    layer = model.decoders[0].conv1
    layer._conv_forward = lambda x, w, b: F.conv2d(x, w.abs(), b, padding=layer.padding)


@change("a decoder replaced by a plain one")
def _(model):
    a = model.architecture
    torch.manual_seed(4)
    model.decoders[0] = reference.DecoderBlock(a.widths[2], a.widths[1], a.padding, a.up).to(model.head.weight)


@change("an up of another kind")
def _(model):
    up = model.decoders[0].up
    torch.manual_seed(4)
    model.decoders[0].up = nn.ConvTranspose2d(up.in_channels, up.out_channels, 2, stride=2).to(up.weight)


@change("a head of 3×3")
def _(model):
    torch.manual_seed(4)
    model.head = nn.Conv2d(4, model.architecture.num_classes, 3, padding=1).to(model.head.weight)


@change("a head of two layers")
def _(model):
    torch.manual_seed(4)
    model.head = nn.Sequential(nn.Conv2d(4, 6, 1), nn.ReLU(), nn.Conv2d(6, model.architecture.num_classes, 1)).to(
        model.head.weight)  # fmt: skip


for name, make in {
    "BatchNorm": lambda c: nn.BatchNorm2d(c), "GroupNorm": lambda c: nn.GroupNorm(2, c), "GELU": lambda c: nn.GELU(),
    "a convolution": lambda c: nn.Conv2d(c, c, 1), "a negation": lambda c: Negation(),
    "identity": lambda c: nn.Identity(), "a Dropout2d": lambda c: nn.Dropout2d(0.0),
    "a subclass of Dropout": lambda c: Centred(0.0),
}.items():  # fmt: skip

    def replace_dropout(model, make=make):
        torch.manual_seed(7)
        model.dropout = make(model.architecture.widths[-1]).to(model.head.weight)

    CHANGES[f"{name} for dropout"] = replace_dropout


class Negation(nn.Module):
    def forward(self, x):
        return -x


class Centred(nn.Dropout):
    def forward(self, x):
        return x - x.mean()


@change("partial freezing")
def _(model):
    model.encoders.requires_grad_(False)
    model.decoders[0].conv1.requires_grad_(False)


@change("frozen bias")
def _(model):
    model.bottleneck.conv1.bias.requires_grad_(False)
    model.head.bias.requires_grad_(False)


@change("EMA")
def _(model):
    averaged = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.05)
    averaged.update_parameters(model)
    averaged.update_parameters(model)
    return averaged.module


@change("deepcopy")
def _(model):
    return copy.deepcopy(model)


@change("pickle")
def _(model):
    return pickle.loads(pickle.dumps(model))


@change("to empty")
def _(model):
    state = {k: v.clone() for k, v in model.state_dict().items()}
    model.to("meta").to_empty(device="cpu").load_state_dict(state)


@change("state_dict")
def _(model):
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    buffer.seek(0)
    model.load_state_dict({k: v * 1.1 for k, v in torch.load(buffer, weights_only=True).items()}, assign=True)


@change("swapped parameters")
def _(model):
    layer = model.encoders[0].conv1
    torch.utils.swap_tensors(layer.weight, nn.Parameter(layer.weight.detach() * 2))


@change("functional_call")
def _(model):
    class Called(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            state = {k: 1.25 * v for k, v in self.model.named_parameters()}
            return torch.func.functional_call(self.model, state, (x,))

    return Called()


class Marked(nn.Parameter):
    """A parameter of a class of its own, as sharding and quantisation have."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **(kwargs or {}))
            return result * 2 if func is F.conv2d else result


@change("a parameter of another class")
def _(model):
    layer = model.encoders[0].conv1
    layer.weight = Marked(layer.weight.detach())


@change("a level less")
def _(model):
    del model.decoders[1].conv2
    model.decoders[1].conv2 = nn.Identity() if model.architecture.padding == "same" else nn.AvgPool2d(3, 1)


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


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("preset", PRESETS)
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
