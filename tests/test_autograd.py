"""Derivatives of every kind on the PyTorch backend, against plain PyTorch in float64."""

from __future__ import annotations

import functools
import io

import pytest
import torch
import torch.distributed as dist
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet import UNet, autograd, functional
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


class _Casts(TorchDispatchMode):
    """How often tensors were cast, alone and together."""

    def __init__(self):
        super().__init__()
        self.found = {"aten::_to_copy": 0, "aten::_foreach_copy_": 0}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function._schema.name in self.found:
            self.found[function._schema.name] += 1
        return function(*args, **kwargs or {})


def _training_step(model):
    """The casts of a step under autocast, and the gradients."""
    torch.manual_seed(0)
    with _Casts() as casts:
        with torch.autocast("cpu", torch.bfloat16):
            y = model(torch.randn(1, 2, 16, 16))
        y.backward(torch.ones_like(y))
    gradients = [p.grad for p in model.parameters()]
    model.zero_grad()
    return casts.found, gradients


def test_autocast_casts_the_operands_of_a_network_together():
    """A training step of nine blocks and the head casts once each way; operand by operand it would 93 times.

    Among several processes each part casts its own: its gradients need not wait for those of all others.
    """
    torch.manual_seed(0)
    model = UNet(width=4, dropout=0.0)
    casts, gradients = _training_step(model)
    assert casts == {"aten::_to_copy": 0, "aten::_foreach_copy_": 2}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        casts, by_parts = _training_step(model)
    finally:
        dist.destroy_process_group()
    assert casts == {"aten::_to_copy": 0, "aten::_foreach_copy_": 20}
    for gradient, same in zip(gradients, by_parts):
        assert gradient.dtype == torch.float32
        torch.testing.assert_close(gradient, same)


def test_a_hook_sees_the_image_before_autocast_casts_it():
    model, seen = UNet(width=4), []
    model.encoders[0].register_forward_pre_hook(lambda block, inputs: seen.append(inputs[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        model(torch.randn(1, 2, 16, 16))
    assert seen == [torch.float32]


def test_a_hook_may_change_parameters_that_are_read_after_it():
    torch.manual_seed(0)
    model, x = UNet(width=4, dropout=0.0), torch.randn(1, 2, 16, 16)
    weight = model.decoders[0].conv1.weight
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        unchanged = model(x)
        hook = model.bottleneck.register_forward_hook(lambda *_: setattr(weight, "data", 8 * weight))
        hooked = model(x)
        hook.remove()
        torch.testing.assert_close(hooked, model(x), rtol=0.02, atol=0.02)
    assert (hooked - unchanged).abs().max() > 0.1


def test_a_program_traced_under_autocast_holds_no_python():
    torch.manual_seed(0)
    module, (x, other) = torch.nn.Conv2d(3, 5, 3), torch.randn(2, 1, 3, 8, 8)
    module.forward = lambda x: functional.conv_relu(x, module.weight, module.bias, backend="torch")
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        traced, expected = torch.jit.trace(module, x), module(other)
        torch.jit.save(traced, io.BytesIO())  # which refuses calls of Python
        torch.testing.assert_close(traced(other), expected)


def test_casts_are_those_of_each_tensor():
    """Values, memory, gradients, second ones too; what needs no gradient gets none; other dtypes one by one."""
    torch.manual_seed(0)
    image, weight, bias = torch.randn(2, 3, 4, 4), torch.randn(5, 3, 3, 3), torch.randn(5)
    weight = weight.contiguous(memory_format=torch.channels_last).requires_grad_()
    bias.requires_grad_()
    for dtype in (torch.bfloat16, torch.float16):
        found = autograd.casts([image, weight, bias], dtype)
        for cast, tensor in zip(found, (image, weight, bias)):
            assert torch.equal(cast, tensor.to(dtype))
            assert cast.stride() == tensor.stride()
            assert cast.requires_grad == tensor.requires_grad
        (grad,) = torch.autograd.grad(found[1].square().sum(), weight, create_graph=True)
        (wanted,) = torch.autograd.grad(weight.to(dtype).square().sum(), weight, create_graph=True)
        assert torch.equal(grad, wanted)
        seconds = [torch.autograd.grad(g.sum(), weight)[0] for g in (grad, wanted)]
        assert torch.equal(*seconds)
    mixed = autograd.casts([image.half(), weight], torch.bfloat16)
    assert torch.equal(mixed[0], image.half().bfloat16())
    assert torch.equal(mixed[1], weight.bfloat16())
    assert not any(cast.requires_grad for cast in autograd.casts([image, bias.detach()], torch.bfloat16))
