"""conv_relu and conv_relu_pool in PyTorch: against the literal concatenation, crop, convolution, ReLU and pool."""

from __future__ import annotations

import functools

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional import conv_relu, conv_relu_pool
from fastunet.functional._layout import like_weight
from fastunet.reference import centre_crop
from tests import operators

OPS = torch.ops.fastunet


def literal(x, skip, weight, bias, padding="same", relu=True, slope=0.0):
    if skip is not None:
        x = torch.cat([centre_crop(skip, *x.shape[2:]), x], 1)
    y = F.conv2d(x, weight, bias, padding=padding)
    return (F.leaky_relu(y, slope) if slope else F.relu(y)) if relu else y


def fast(x, skip, weight, bias, padding="same", relu=True, slope=0.0):
    return conv_relu(x, weight, bias, skip=skip, padding=padding, relu=relu, slope=slope)


CASES = [
    ((2, 3, 7, 6), None, (5, 3, 3, 3), (5,)),
    ((1, 1, 1, 1), None, (1, 1, 3, 3), None),
    ((2, 3, 5, 6), (2, 2, 5, 6), (4, 5, 3, 3), (4,)),
    ((2, 3, 5, 6), (2, 2, 8, 9), (4, 5, 3, 3), (4,)),
    ((1, 12, 2, 3), None, (12, 12, 3, 3), (12,)),  # a weight much larger than the image
]


def test_a_weight_much_larger_than_the_image_is_not_reordered():
    weight, small, large = torch.randn(12, 12, 3, 3), torch.randn(1, 12, 2, 3), torch.randn(1, 12, 9, 9)
    nhwc = [t.contiguous(memory_format=torch.channels_last) for t in (weight, small, large)]
    for x in (small, nhwc[1]):
        assert like_weight(x, weight).is_contiguous()
        assert like_weight(x, nhwc[0]).stride() == nhwc[1].stride()
    assert like_weight(large, weight).stride() == nhwc[2].stride()


@pytest.mark.parametrize("shapes", CASES)
@pytest.mark.parametrize("relu", [True, False])
def test_same(shapes, relu):
    operators.check_against_literal(lambda *t: fast(*t, relu=relu), lambda *t: literal(*t, relu=relu), *shapes)


@pytest.mark.parametrize("shapes", [CASES[0], CASES[2], CASES[3]])
def test_valid(shapes):
    operators.check_against_literal(lambda *t: fast(*t, "valid"), lambda *t: literal(*t, "valid"), *shapes)
    operators.check_gradients(lambda *t: fast(*t, "valid"), *shapes)
    operators.check_layouts(lambda *t: fast(*t, "valid"), *shapes)


@pytest.mark.parametrize("shapes", CASES)
def test_gradients_layouts_and_compilation(shapes):
    operators.check_gradients(fast, *shapes)
    operators.check_layouts(fast, *shapes)
    if shapes in CASES[1:4:2]:  # without and with a skip, a bias, a crop
        operators.check_compiles(fast, *shapes)


def test_stride_2():
    shapes = (2, 2, 5, 6), (3, 2, 3, 3), (3,)
    for padding, pad in (("same", 1), ("valid", 0)):

        def plain(x, w, b, pad=pad):
            return F.leaky_relu(F.conv2d(x.contiguous(memory_format=torch.channels_last), w, b, 2, pad), 0.1)

        ours = functools.partial(conv_relu, stride=2, padding=padding, slope=0.1)
        operators.check_against_literal(ours, plain, *shapes)
        operators.check_gradients(ours, *shapes)
        operators.check_layouts(ours, *shapes)
        operators.check_compiles(ours, *shapes)
    x, weight, bias = (t.detach() for t in operators.leaves(*shapes, dtype=torch.float32))
    dz = torch.randn(2, 3, 3, 3)
    operators.check_registration(OPS.conv_strided.default, x, weight, bias, 1, 0.1, "torch")
    operators.check_registration(OPS.conv_strided_data_grad.default, dz, weight, x, 1, "torch")
    operators.check_registration(OPS.conv_strided_weight_grad.default, dz, x, 1, True, "torch")
    x, weight = torch.zeros(1, 1, 4, 4), torch.zeros(1, 2, 3, 3)
    with pytest.raises(ValueError, match="stride 2 takes one source, but skip is given"):
        conv_relu(x, weight, skip=x, stride=2)


def test_leaky_relu():
    ours, theirs = (functools.partial(f, slope=0.1) for f in (fast, literal))
    operators.check_against_literal(ours, theirs, *CASES[3])
    operators.check_gradients(ours, *CASES[3])

    def pooled(x, w, b):
        y = literal(x, None, w, b, slope=0.1)
        return y, F.max_pool2d(y, 2)

    operators.check_against_literal(functools.partial(conv_relu_pool, slope=0.1), pooled, *POOL_CASES[0])
    operators.check_gradients(functools.partial(conv_relu_pool, slope=0.1), *POOL_CASES[1])
    x, weight = torch.randn(1, 1, 4, 4), torch.randn(1, 1, 3, 3)
    assert torch.equal(conv_relu(x, weight, slope=1.0), conv_relu(x, weight, relu=False))
    with pytest.raises(ValueError, match=r"slope is -0\.1; expected at least 0"):
        conv_relu(x, weight, slope=-0.1)
    with pytest.raises(TypeError, match="slope is True; expected float"):
        conv_relu_pool(x, weight, slope=True)


POOL_CASES = [((2, 3, 7, 6), (5, 3, 3, 3), (5,)), ((1, 1, 2, 3), (2, 1, 3, 3), None)]


def test_pool():
    for shapes in POOL_CASES:

        def plain(x, w, b):
            y = F.relu(F.conv2d(x, w, b, padding=1))
            return y, F.max_pool2d(y, 2)

        operators.check_against_literal(conv_relu_pool, plain, *shapes)
        operators.check_gradients(conv_relu_pool, *shapes)
        operators.check_layouts(conv_relu_pool, *shapes)
        operators.check_compiles(conv_relu_pool, *shapes)


def test_registration():
    x, skip = torch.randn(2, 3, 6, 5), torch.randn(2, 2, 8, 8)
    weight, bias, both = torch.randn(4, 3, 3, 3), torch.randn(4), torch.randn(4, 5, 3, 3)
    dz = torch.randn(2, 4, 6, 5)
    operators.check_registration(OPS.conv_relu.default, x, None, weight, bias, 1, 0.0, "torch")
    operators.check_registration(OPS.conv_relu.default, x, skip, both, None, 0, 0.3, "torch")
    operators.check_registration(OPS.conv_relu_pool.default, x, weight, bias, 1, 0.0, "torch")
    operators.check_registration(OPS.conv_relu_data_grad.default, dz, weight, x, None, 1, True, False, "torch")
    operators.check_registration(OPS.conv_relu_data_grad.default, dz, both, x, skip, 1, True, True, "torch")
    operators.check_registration(OPS.conv_relu_weight_grad.default, dz, x, skip, 1, True, "torch")
    operators.check_registration(OPS.conv_relu_weight_grad.default, dz, x, None, 1, False, "torch")
    operators.check_registration(OPS.relu_backward.default, dz, torch.randn_like(dz), 0.0, "torch")


def test_data_grad_masks():
    torch.manual_seed(0)
    dz, x, skip = torch.randn(2, 4, 6, 5), torch.randn(2, 3, 6, 5), torch.randn(2, 2, 8, 8)
    weight = torch.randn(4, 5, 3, 3)
    dx, dskip = OPS.conv_relu_data_grad(dz, weight, x, skip, 1, False, False, "torch")
    masked = OPS.conv_relu_data_grad(dz, weight, x, skip, 1, True, True, "torch")
    assert torch.equal(masked[0], dx * (x > 0))
    assert torch.equal(masked[1], dskip * (skip > 0))


def test_nan_is_kept():
    x = torch.full((1, 1, 4, 4), float("nan"))
    assert conv_relu(x, torch.ones(1, 1, 3, 3)).isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.zeros(3, 6, 6)), r"x must be \(N, C, H, W\), got shape \(3, 6, 6\)"),
        (dict(x=torch.zeros(1, 3, 6, 6, dtype=torch.int32)), "int32"),
        (dict(weight=torch.zeros(4, 2, 3, 3)), r"weight must be \(C_out, 3, 3, 3\), got \(4, 2, 3, 3\)"),
        (dict(bias=torch.zeros(5)), r"bias must be \(4,\), got \(5,\)"),
        (dict(weight=torch.zeros(4, 3, 3, 3).half()), "weight is torch.float16"),
        (dict(padding="full"), "padding is 'full'"),
        (dict(skip=torch.zeros(1, 2, 5, 6)), r"skip of shape \(1, 2, 5, 6\)"),
        (dict(x=torch.zeros(1, 3, 2, 6), padding="valid"), "too small"),
        (dict(backend="cuda"), "backend is 'cuda'"),
    ],
)
def test_bad_input_is_named(change, message):
    good = dict(x=torch.zeros(1, 3, 6, 6), weight=torch.zeros(4, 3, 3, 3), bias=torch.zeros(4))
    with pytest.raises(ValueError, match=message):
        conv_relu(**(good | change))


def test_pool_of_a_single_row_is_refused():
    with pytest.raises(ValueError, match="too small to pool"):
        conv_relu_pool(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 3, 3))
