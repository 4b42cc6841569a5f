"""Derivatives of every kind on the PyTorch backend, against plain PyTorch in float64."""

from __future__ import annotations

import functools

import pytest
import torch
from torch.autograd import forward_ad

from fastunet import UNet, functional
from tests import differentiation
from tests.dice_cases import OPTIONS, arguments, batch, literal


def _scalar(outputs):
    return sum(y.square().sum() for y in (outputs if isinstance(outputs, tuple) else (outputs,)))


@pytest.mark.parametrize("name", differentiation.OPERATORS)
def test_operators(name):
    function, literal, shapes = differentiation.OPERATORS[name]
    function = functools.partial(function, backend="torch")
    tensors = differentiation.random(*shapes, dtype=torch.float64)
    differentiation.check_second_derivatives(function, literal, tensors)
    differentiation.check_torch_func(function, literal, tensors)
    with pytest.raises(NotImplementedError, match=r"fastunet::.*has no forward-mode derivative"):
        torch.func.jvp(function, tuple(tensors), tuple(tensors))
    with pytest.raises(NotImplementedError, match=r"fastunet: no second derivatives under torch\.func\.vmap"):
        torch.func.jacrev(torch.func.grad(lambda t: _scalar(function(t, *tensors[1:]))))(tensors[0])
    with pytest.raises(NotImplementedError, match="fastunet::"), forward_ad.dual_level():
        function(forward_ad.make_dual(tensors[0], tensors[0]), *tensors[1:])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
@pytest.mark.parametrize("c", [1, 4])
def test_second_derivative_of_the_losses(c, options):
    if c == 1 and options.get("include_background") is False:
        pytest.skip("one logit has no background class")
    logits, labels = batch(c, (3, 4), n=2)
    theirs, ours = arguments(options, max(c, 2), torch.float64)
    differentiation.check_second_derivatives(
        lambda z: functional.dice_cross_entropy(z, labels, **ours), lambda z: literal(z, labels, **theirs), [logits]
    )


def test_hessian_of_the_loss():
    logits, labels = batch(3, (2, 2), n=1)
    found, wanted = (
        torch.autograd.functional.hessian(lambda z, loss=loss: loss(z, labels), logits)
        for loss in (functional.dice_cross_entropy, literal)
    )
    differentiation.assert_close(found, wanted)


def test_soft_labels_and_weights_that_want_a_gradient_are_refused():
    logits, labels = batch(4)
    soft = logits.softmax(1).requires_grad_()
    with pytest.raises(ValueError, match="labels or class_weights require a gradient"):
        functional.dice_loss(logits, soft)
    with pytest.raises(ValueError, match="labels or class_weights require a gradient"):
        functional.dice_loss(logits, labels, class_weights=torch.ones(4, requires_grad=True))


@pytest.mark.parametrize("name", ["brats", "isbi"])
def test_networks(name):
    differentiation.check_network_penalty(name, "torch", torch.float64)
    differentiation.check_network_torch_func(name, "torch", torch.float64)


@pytest.mark.parametrize("name, strict", [("brats", False), ("isbi", True)])
def test_an_exported_program_trains_every_parameter(name, strict):
    differentiation.check_export_trains(name, "torch", strict)


def test_forward_mode_through_a_network_is_refused():
    model, x = UNet(width=2, depth=1), torch.randn(1, 2, 4, 4)
    with pytest.raises(NotImplementedError, match="fastunet::conv_relu has no forward-mode derivative"):
        torch.func.jvp(model, (x,), (x,))


def test_frozen_parameters_cost_no_weight_gradient():
    """One convolution that is trained: one weight gradient is computed."""
    model = UNet(width=2, depth=1, dropout=0.0).requires_grad_(False)
    model.decoders[0].conv1.requires_grad_(True)
    with torch.profiler.profile() as profile:
        model(torch.randn(1, 2, 4, 4)).sum().backward()
    calls = [event.key for event in profile.key_averages() for _ in range(event.count)]
    assert sum("weight_grad" in call for call in calls) == 1
    assert sum("data_grad" in call for call in calls) == 1
