"""What people do to layers of a network: hooks, pruning, parametrisations, other layers; each a named change."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

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
