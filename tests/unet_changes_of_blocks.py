"""What people do to blocks, the head, dropout and the whole network; each a named change of ``unet_changes``."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import torch
import torch.nn.functional as F
from torch import nn

from fastunet import reference
from tests.unet_changes import CHANGES, change


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


@change("a way of its own through the blocks")
def _(model):
    class Doubled(type(model)):
        def logits_of_padded(self, x):
            return 2 * super().logits_of_padded(x)

    model.__class__ = Doubled


@change("a patched way through the blocks")
def _(model):
    through = model.logits_of_padded
    model.logits_of_padded = lambda x: 2 * through(x)


@change("a way of its own to upsample")
def _(model):
    class Doubled(type(model.decoders[0])):
        def upsampled(self, x):
            return 2 * super().upsampled(x)

    model.decoders[0].__class__ = Doubled
    up = model.decoders[1].upsampled
    model.decoders[1].upsampled = lambda x: up(x) - 0.5


@change("another activation in blocks")
def _(model):
    for block in (model.bottleneck, model.decoders[0]):
        block.style = dataclasses.replace(block.style, activation="leaky_relu", slope=0.2)


@change("a norm in a block")
def _(model):
    model.bottleneck.norm1 = nn.BatchNorm2d(16).to(model.head.weight)


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
