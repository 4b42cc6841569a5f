"""A network found to run fused is asked again as soon as anything has changed since."""

from __future__ import annotations

import copy
import dataclasses
import gc
import pickle
import warnings
import weakref

import pytest
import torch
from torch import nn

from fastunet import UNet
from tests import unet_changes_of_blocks  # noqa: F401 - registers its changes
from tests.unet_changes import CHANGES, half
from tests.unet_changes_of_blocks import Marked


def after_a_pass(kind=UNet, **options):
    model = kind(width=4, depth=2, **options)
    model(torch.randn(1, 2, 8, 8))
    assert model._snapshot.holds(model)
    return model


def asked_anew(model):
    return model._why_not_fused(None)


def one_for_another(part, old, new):
    """An attribute taken away and one that matters given, as many as before."""

    def change(model):
        layer = model.get_submodule(part)
        setattr(layer, old, 0)
        model(torch.randn(1, 2, 8, 8))
        delattr(layer, old)
        setattr(layer, new, layer.forward)

    return change


def a_plain_tensor_first(model):
    layer = model.bottleneck.conv1
    del layer.weight
    layer.weight = torch.zeros(16, 8, 3, 3)  # which runs fused
    assert not model.why_not_fused()
    layer.weight = layer.weight.as_subclass(Marked)


def made_anew_first(model):
    layer = model.bottleneck.conv1
    layer.__init__(8, 16, 3, padding="same")
    assert not model.why_not_fused()
    layer.bias = Marked(layer.bias.detach())


def attributes_of_another(model):
    other = nn.Conv2d(4, 4, 1)
    other.register_forward_hook(half)
    model.head.__dict__ = other.__dict__


OWN = {
    "an attribute for another": one_for_another("bottleneck", "mine", "forward"),
    "an attribute for another, in a layer": one_for_another("bottleneck.conv1", "mine", "forward"),
    "upsampled": lambda m: setattr(m.decoders[0], "upsampled", lambda x: x),
    "dropout patched": lambda m: setattr(m.dropout, "forward", lambda x: x),
    "other hooks": lambda m: m.head.__dict__.update(_forward_hooks={0: half}),
    "other parameters": lambda m: m.head.__dict__.update(_parameters={"weight": Marked(m.head.weight), "bias": None}),
    "all of another layer's attributes": attributes_of_another,
    "other layers": lambda m: m.bottleneck.__dict__.update(_modules={}),
    "other encoders": lambda m: m.encoders.__dict__.update(_modules={"0": nn.Identity()}),
    "a list for a list": lambda m: setattr(m, "decoders", nn.ModuleList([nn.Identity()])),
    "a block less": lambda m: m.encoders.__delitem__(1) or setattr(m.encoders, "0", nn.Identity()),
    "a layer less": lambda m: m.bottleneck._modules.pop("conv2") and None,
    "a layer under another name": lambda m: m.bottleneck._modules.update(c=m.bottleneck._modules.pop("conv2")),
    "a parameter of another class": lambda m: setattr(m.head, "weight", Marked(m.head.weight.detach())),
    "a setting taken away": lambda m: m.bottleneck.conv1.__dict__.pop("groups") and None,
    "up_kind": lambda m: setattr(m.decoders[0], "up_kind", "transpose"),
    "style": lambda m: setattr(m.bottleneck, "style", dataclasses.replace(m.bottleneck.style, norm="batch")),
    "another class": lambda m: setattr(m.dropout, "__class__", nn.AlphaDropout),
    "another class of a block": lambda m: setattr(m.bottleneck, "__class__", type("Mine", (type(m.bottleneck),), {})),
    "a plain tensor first": a_plain_tensor_first,
    "made anew first": made_anew_first,
}  # fmt: skip
OWN |= {f"{name} of a layer": lambda m, name=name, value=value: setattr(m.bottleneck.conv2, name, value)
        for name, value in {"stride": (2, 2), "padding": 1, "padding_mode": "reflect", "groups": 2, "dilation": (2, 2),
                            "kernel_size": (1, 1)}.items()}  # fmt: skip


@pytest.mark.parametrize("name", [*CHANGES, *OWN])
def test_a_change_after_a_pass_is_noticed(name):
    model = after_a_pass()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = (CHANGES | OWN)[name](model) or model
    model = getattr(model, "model", model)
    expected = asked_anew(model)
    assert expected or name not in OWN
    for _ in range(3):
        assert model.why_not_fused() == expected


@pytest.mark.parametrize("norm", ["batch", "instance", "group"])
def test_a_changed_norm_is_noticed(norm):
    model = after_a_pass(norm=norm, groups=2)
    model.bottleneck.norm1.eps = 0.5
    assert [*model.why_not_fused()] == ["bottleneck"]
    model.bottleneck.norm1.eps = torch.tensor(1e-5)
    assert not model.why_not_fused()
    model.bottleneck.norm1.eps.fill_(1.0)
    assert [*model.why_not_fused()] == ["bottleneck"]


def hooked(model):
    return model.decoders[0].conv1.register_forward_hook(half).remove


def replaced(model):
    layer, model.head = model.head, nn.Conv2d(4, 4, 3)
    return lambda: setattr(model, "head", layer)


def patched(model):
    model.dropout.forward = lambda x: x
    return lambda: delattr(model.dropout, "forward")


def marked(model):
    layer = model.bottleneck.conv1
    weight, layer.weight = layer.weight, Marked(layer.weight.detach())
    return lambda: setattr(layer, "weight", weight)


@pytest.mark.parametrize("change", [hooked, replaced, patched, marked])
def test_a_change_taken_back_is_noticed_too(change):
    model = after_a_pass()
    for _ in range(2):
        undo = change(model)
        assert model.why_not_fused() == asked_anew(model) != {}
        undo()
        assert model.why_not_fused() == {}
        assert model._snapshot.holds(model)


def test_a_change_while_the_network_is_asked_is_noticed():
    class Changing(UNet):
        def _why_not_fused(self, everywhere):
            reasons = super()._why_not_fused(everywhere)
            if not reasons:  # another thread's moment
                self.head.padding_mode = "reflect"
            return reasons

    model = Changing(width=4, depth=2)
    assert model.why_not_fused() == {}
    assert [*model.why_not_fused()] == ["head"]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), copy.copy,
                                    lambda m: m._replicate_for_data_parallel()])  # fmt: skip
def test_a_copy_answers_for_itself(copied):
    model = after_a_pass()
    other = copied(model)
    shares = other._modules is model._modules
    assert not other.why_not_fused()
    other._modules["head"] = nn.Identity()
    assert [*other.why_not_fused()] == ["head"]
    assert [*model.why_not_fused()] == (["head"] if shares else [])


def test_networks_and_replaced_layers_are_freed():
    model = after_a_pass()
    model.bottleneck.owner = [model]
    head = weakref.ref(model.head)
    model.head = nn.Conv2d(4, 4, 1)
    model.why_not_fused()
    gc.collect()
    assert head() is None
    model, gone = None, weakref.ref(model)
    gc.collect()
    assert gone() is None
