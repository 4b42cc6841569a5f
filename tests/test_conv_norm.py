"""conv_norm in PyTorch against torch.nn's convolution, norms, activations and pool."""

from __future__ import annotations

import functools
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fastunet.functional import conv_norm
from fastunet.reference import centre_crop
from tests import differentiation, operators

OPS = torch.ops.fastunet
NORMS = {"batch": None, "instance": None, "group": 2}


def normalised(z, norm, groups, weight, bias):
    if norm == "batch":
        return F.batch_norm(z, None, None, weight, bias, training=True)
    if norm == "instance":
        return F.instance_norm(z, weight=weight, bias=bias)
    return F.group_norm(z, groups, torch.ones_like(bias) if weight is None and bias is not None else weight, bias)


def literal(x, skip, weight, bias, norm_weight, norm_bias, *, norm, slope=0.0, padding="same", stride=1, pool=False):
    x = x.contiguous(memory_format=torch.channels_last)
    if skip is not None:
        x = torch.cat([centre_crop(skip, *x.shape[2:]), x], 1)
    z = F.conv2d(x, weight, bias, stride, 1 if padding == "same" else 0)
    u = normalised(z, norm, NORMS[norm], norm_weight, norm_bias)
    y = F.leaky_relu(u, slope) if slope not in (0, 1) else u if slope else F.relu(u)
    return (y, F.max_pool2d(y, 2)) if pool else y


def fast(x, skip, weight, bias, norm_weight, norm_bias, *, norm, **options):
    affine = dict(norm_weight=norm_weight, norm_bias=norm_bias)
    return conv_norm(x, weight, bias, skip=skip, norm=norm, groups=NORMS[norm], **affine, **options)


CASES = {
    "plain": ([(2, 1, 5, 4), None, (4, 1, 3, 3), None, (4,), (4,)], {}),
    "no parameters": ([(2, 1, 3, 4), None, (6, 1, 3, 3), None, None, None], dict(slope=0.2)),
    "skip": ([(2, 1, 4, 5), (2, 1, 5, 7), (4, 2, 3, 3), None, (4,), (4,)], dict(slope=1.0, padding="valid")),
    "pool": ([(2, 1, 5, 3), None, (4, 1, 3, 3), None, (4,), (4,)], dict(pool=True)),
    "leaky pool": ([(1, 2, 4, 3), None, (4, 2, 3, 3), None, None, (4,)], dict(pool=True, slope=0.01)),
    "stride": ([(2, 1, 5, 6), None, (4, 1, 3, 3), None, (4,), (4,)], dict(stride=2, slope=0.1)),
    "pool alone": ([(2, 1, 4, 4), None, (2, 1, 3, 3), None, (2,), None], dict(pool=True, slope=1.0)),
}
"""A bias has no gradient but rounding before a norm of its own channel, so it is tested with running statistics."""


@pytest.mark.parametrize("norm, case", [
    *itertools.product(NORMS, ("plain", "no parameters", "pool")), ("batch", "skip"), ("group", "leaky pool"),
    ("instance", "stride"), ("batch", "pool alone"),
])  # fmt: skip
def test_against_pytorch(norm, case):
    shapes, options = CASES[case]
    ours, theirs = (functools.partial(f, norm=norm, **options) for f in (fast, literal))
    operators.check_against_literal(ours, theirs, *shapes)
    operators.check_gradients(ours, *shapes)
    operators.check_layouts(ours, *shapes)


@pytest.mark.parametrize("norm", NORMS)
def test_compiles(norm):
    shapes, options = CASES["leaky pool"]
    operators.check_compiles(functools.partial(fast, norm=norm, **options), *shapes)


@pytest.mark.parametrize("norm", NORMS)
def test_second_derivatives_and_torch_func(norm):
    shapes, options = CASES["pool"]
    tensors = differentiation.random(*(shape for shape in shapes if shape), dtype=torch.float64)

    def with_tensors(function):
        return lambda x, weight, *affine: function(x, None, weight, None, *affine, norm=norm, **options)

    differentiation.check_second_derivatives(with_tensors(fast), with_tensors(literal), tensors)
    differentiation.check_torch_func(with_tensors(fast), with_tensors(literal), tensors)


def modules(dtype=torch.float64):
    torch.manual_seed(0)
    convolution, norm = nn.Conv2d(3, 4, 3, padding=1).to(dtype), nn.BatchNorm2d(4, momentum=0.3).to(dtype)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    return convolution, norm


def of_modules(x, convolution, norm, **options):
    return conv_norm(
        x, convolution.weight, convolution.bias, norm_weight=norm.weight, norm_bias=norm.bias,
        running_mean=norm.running_mean, running_var=norm.running_var, training=norm.training,
        momentum=norm.momentum, eps=norm.eps, **options,
    )  # fmt: skip


@pytest.mark.parametrize("slope", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("pool", [False, True])
def test_running_statistics_as_batch_norm(slope, pool):
    """Two training steps, then evaluation: results, buffers, and gradients of the evaluation too."""
    (convolution, norm), (x,) = modules(), differentiation.random((3, 3, 6, 5), dtype=torch.float64)
    buffers = norm.running_mean.clone(), norm.running_var.clone()
    ours = type(norm)(4, momentum=0.3).double()
    ours.load_state_dict(norm.state_dict())
    for step in range(3):
        if step == 2:
            norm.eval(), ours.eval()
        y = F.leaky_relu(norm(convolution(x)), slope)
        wanted = [y, *([F.max_pool2d(y, 2)] if pool else [])]
        found = of_modules(x, convolution, ours, slope=slope, pool=pool)
        found = list(found) if pool else [found]
        for each in (wanted, found):
            module = norm if each is wanted else ours
            parameters = [convolution.weight, convolution.bias, module.weight, module.bias]
            each += torch.autograd.grad(sum(t.square().sum() for t in each), parameters)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ours.running_mean, norm.running_mean, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(ours.running_var, norm.running_var, rtol=1e-12, atol=1e-14)
    assert not torch.equal(ours.running_mean, buffers[0])
    assert not torch.equal(ours.running_var, buffers[1])


def test_an_empty_batch_changes_no_statistics():
    convolution, norm = modules(torch.float32)
    y, pooled = of_modules(torch.zeros(0, 3, 6, 5), convolution, norm, pool=True)
    assert (y.shape, pooled.shape) == ((0, 4, 6, 5), (0, 4, 3, 2))
    y.sum().backward()
    assert torch.equal(norm.running_mean, torch.zeros(4))
    assert torch.equal(norm.running_var, torch.ones(4))
    assert convolution.weight.grad.count_nonzero() == 0


@pytest.mark.parametrize("norm", NORMS)
def test_a_mean_far_from_zero(norm):
    """A variance that a sum of squares in float32 would lose."""
    x = torch.randn(2, 4, 9, 8, generator=torch.Generator().manual_seed(0))
    weight, bias = torch.zeros(4, 4, 3, 3), torch.full((4,), 1000.0)
    weight[range(4), range(4), 1, 1] = 1.0
    exact = literal(x.double(), None, weight.double(), bias.double(), None, None, norm=norm, slope=1.0)
    found = fast(x, None, weight, bias, None, None, norm=norm, slope=1.0)
    assert (found - exact).abs().max() < 1e-3  # of values whose own rounding is 3e-5


def saved_bytes(function) -> int:
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return sum(kept.values())


@pytest.mark.parametrize(("norm", "rows"), [("batch", 1), ("instance", 2), ("group", 1)])
def test_what_backward_keeps(norm, rows):
    """x, weight, z, the norm's parameters and two statistics of each channel or group, 2 of a sample for "group"."""
    x, weight, norm_weight, norm_bias = operators.leaves((2, 3, 8, 6), (4, 3, 3, 3), (4,), (4,), dtype=torch.float32)
    found = saved_bytes(lambda: fast(x, None, weight, None, norm_weight, norm_bias, norm=norm, pool=True))
    z = 2 * 4 * 8 * 6
    assert found == 4 * (x.numel() + weight.numel() + z + 2 * 4 + 2 * 4 * rows)


def test_registration():
    x, weight, affine = torch.randn(2, 3, 6, 5), torch.randn(4, 3, 3, 3), torch.randn(4)
    arguments = x, None, weight, affine, affine, affine, 1, 1, 2, True, 1e-5, 0.1, True, "", "torch"
    operators.check_registration(OPS.conv_norm.default, *arguments)
    arguments = x, None, weight, None, None, None, 1, 2, 4, False, 1e-5, 0.0, False, "", "torch"
    operators.check_registration(OPS.conv_norm.default, *arguments)
    y, pooled, z, *statistics = OPS.conv_norm(*arguments[:12], True, *arguments[13:])
    options = 1e-5, 0.1, "", "torch"
    operators.check_registration(OPS.norm_backward.default, y, pooled, z, affine, affine, *statistics, *options)
    operators.check_registration(OPS.norm_backward.default, None, pooled, z, None, None, *statistics, *options)


def test_autocast_and_parameters_in_float32():
    """As nn.BatchNorm2d under autocast: a convolution in bfloat16 and float32 parameters, statistics and gradients."""
    convolution, norm = modules(torch.float32)
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    exact = norm.double()(convolution.double()(x.double())).relu()
    convolution.float(), norm.float().reset_running_stats()
    with torch.autocast("cpu", torch.bfloat16):
        y = of_modules(x, convolution, norm)
    assert y.dtype == torch.bfloat16
    assert (y - exact).abs().max() < 0.05 * exact.abs().max()
    y.float().square().sum().backward()
    assert convolution.weight.grad.dtype == norm.weight.grad.dtype == torch.float32
    assert norm.running_var.ne(1).all()


GOOD = dict(x=torch.zeros(2, 3, 6, 6), weight=torch.zeros(4, 3, 3, 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(norm="layer"), "norm is 'layer'; expected 'batch', 'instance' or 'group'"),
        (dict(norm="group"), "groups is None; expected a divisor of the 4 channels"),
        (dict(norm="group", groups=3), "groups is 3; expected a divisor of the 4 channels"),
        (dict(groups=2), "groups is 2, which norm='group' alone has, not 'batch'"),
        (dict(norm_weight=torch.zeros(3)), r"norm_weight must be \(4,\) floating-point numbers, got \(3,\)"),
        (dict(norm_bias=torch.zeros(4, dtype=torch.int32)), r"norm_bias .* got \(4,\) torch.int32"),
        (dict(norm="instance", running_mean=torch.zeros(4), running_var=torch.ones(4)), "belong to norm='batch'"),
        (dict(running_mean=torch.zeros(4)), "running_mean and running_var are needed, both of them"),
        (dict(training=False), "running_mean and running_var are needed, both of them"),
        (dict(norm="instance", process_group=object()), "sums the statistics of norm='batch', not of 'instance'"),
        (dict(slope=-0.1), "slope is -0.1; expected at least 0"),
        (dict(eps=float("nan")), "eps is nan; expected float"),
        (dict(momentum=1.5), "momentum is 1.5; expected 0 to 1"),
        (dict(stride=3), "stride is 3; expected 1 or 2"),
        (dict(x=torch.zeros(1, 3, 1, 8), pool=True), "too small to pool"),
        (dict(x=torch.zeros(1, 3, 1, 1)), r"Expected more than 1 value per channel when training, .*\[1, 4, 1, 1\]"),
        (dict(x=torch.zeros(2, 3, 1, 1), norm="instance"), "Expected more than 1 spatial element when training"),
        (dict(x=torch.zeros(1, 3, 1, 1), norm="group", groups=4), "Expected more than 1 value per channel"),
    ],
)
def test_bad_input_is_named(change, message):
    with pytest.raises(ValueError, match=message):
        conv_norm(**(GOOD | change))


def test_a_momentum_of_none_is_the_caller_s():
    with pytest.raises(TypeError, match="momentum is None; expected float"):
        conv_norm(**GOOD, momentum=None)
