"""3×3 convolution launchers against PyTorch: each variant by explicit tiles that shapes straddle, and the choice."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastunet.kernels import _launch
from fastunet.kernels.conv import forward as conv_relu
from fastunet.kernels.conv.convolution import ConvConfig

from ..tolerance import assert_within_budget
from . import in_order
from .conftest import COMPILED
from .conv_sources import (
    BATCH_BOX,
    BATCH_SPLIT,
    BOX,
    FIRST,
    FOUR_STACKED,
    POINTER,
    ROWS,
    SPLIT,
    STACKED,
    Case,
    operands,
    reference,
)

ONE_SOURCE = [
    Case(POINTER, 3, 0, 33, 48, 3, 7),
    Case(POINTER, 1, 0, 24, 16, 15, 17, pad=0),
    Case(POINTER, 2, 0, 3, 100, 1, 1),
    Case(FIRST, 2, 0, 1, 24, 9, 15),
    Case(FIRST, 1, 0, 2, 33, 16, 17, pad=0),
    Case(FIRST, 3, 0, 3, 16, 5, 1),
    Case(FIRST, 1, 0, 4, 8, 7, 8),
    Case(FIRST, 1, 0, 7, 5, 3, 3, pad=0),
    Case(BOX, 2, 0, 24, 40, 9, 17),
    Case(BOX, 1, 0, 48, 104, 6, 18, pad=0),
    Case(BATCH_BOX, 3, 0, 40, 64, 7, 15),
    Case(SPLIT, 1, 0, 48, 72, 7, 17),
    Case(BATCH_SPLIT, 3, 0, 24, 40, 7, 9, pad=0),
    Case(None, 1, 0, 64, 64, 4, 5),
    Case(ROWS, 1, 0, 48, 64, 7, 17),
    Case(ROWS, 1, 0, 16, 72, 6, 15, pad=0),
    Case(STACKED, 2, 0, 24, 32, 10, 18),
    Case(STACKED, 1, 0, 32, 32, 7, 66, pad=0),
    Case(FOUR_STACKED, 2, 0, 8, 16, 5, 20),
    Case(None, 1, 0, 1, 16, 15, 16),
    Case(None, 3, 0, 32, 32, 16, 15),
    Case(None, 1, 0, 48, 96, 9, 7),
    Case(None, 1, 0, 100, 33, 3, 16),
    Case(None, 1, 0, 64, 128, 8, 8, pad=0),
]
TWO_SOURCES = [
    Case(POINTER, 2, 5, 33, 20, 5, 7, crop=3),
    Case(POINTER, 1, 24, 1, 100, 7, 9, pad=0, crop=4),
    Case(BOX, 1, 8, 24, 64, 6, 17, crop=3),
    Case(BATCH_BOX, 3, 40, 16, 48, 7, 9, pad=0, crop=2),
    Case(SPLIT, 2, 8, 40, 24, 6, 9, crop=1),
    Case(ROWS, 1, 32, 8, 64, 7, 15, pad=0, crop=4),
    Case(STACKED, 2, 8, 24, 32, 7, 16, crop=2),
    Case(FOUR_STACKED, 1, 16, 16, 16, 6, 12, crop=1),
    Case(None, 2, 16, 16, 16, 7, 8, crop=1),
    Case(None, 1, 2, 3, 4, 15, 15),
]
def dtypes_of(cases):
    """Explicit tiles in float32 and one of each variant in float16; the chosen ones in float16, which has more choice.

    (IEEE float32 products leave one.) Everything in every dtype where kernels are compiled.
    """
    params, seen = [], {POINTER.variant} if cases is TWO_SOURCES else set()
    for case in cases:
        half = case.config is None or case.tile not in seen
        seen |= {case.tile} if case.config else set()
        params += [
            pytest.param(case, torch.float32, id=f"{case}-fp32", marks=[] if case.config else COMPILED),
            pytest.param(case, torch.float16, id=f"{case}-fp16", marks=[] if half else COMPILED),
            pytest.param(case, torch.bfloat16, id=f"{case}-bf16", marks=COMPILED),
        ]
    return params


def references(x, skip, weight, bias, pad, relu):
    """PyTorch's result in the operands' dtype, of float32 in the worse order of its sums, and in float64."""
    same, exact = (reference(x, skip, weight, bias, pad, relu, d) for d in (x.dtype, torch.float64))
    if x.dtype == torch.float32:
        ordered = reference(x, skip, weight, bias, pad, relu, x.dtype, in_order.conv2d)
        same = in_order.farthest(exact, same, ordered)
    return same, exact


@pytest.mark.parametrize("case, dtype", dtypes_of(ONE_SOURCE) + dtypes_of(TWO_SOURCES))
def test_forward(case, dtype, device):
    x, skip, weight, bias = operands(case, dtype, device)
    y = conv_relu.forward(x, skip, weight, bias, case.pad, 0.0, case.config)
    assert_within_budget(y, *references(x, skip, weight, bias, case.pad, True), "y")
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("case", [c for c in ONE_SOURCE if c.config and c.pad == 0], ids=str)
@pytest.mark.parametrize("slope", [0.2, 1.0])
def test_forward_without_bias_and_relu(case, slope, device):
    x, skip, weight, _ = operands(case, torch.float32, device, bias=False)
    y = conv_relu.forward(x, skip, weight, None, case.pad, slope, case.config)
    same, exact = (F.leaky_relu(z, slope) for z in references(x, skip, weight, None, case.pad, False))
    assert_within_budget(y, same, exact, "y")
    assert (y < 0).any()


@pytest.mark.parametrize("case, dtype", dtypes_of(ONE_SOURCE))
def test_forward_pool(case, dtype, device):
    x, _, weight, bias = operands(case, dtype, device)
    y, pooled = conv_relu.forward_pool(x, weight, bias, case.pad, 0.0, case.config)
    assert_within_budget(y, *references(x, None, weight, bias, case.pad, True), "y")
    if min(y.shape[2:]) < 2:
        assert pooled.numel() == 0
    else:
        assert torch.equal(pooled, F.max_pool2d(y, 2)), "the pooled tensor is not the pool of what was written"


@pytest.mark.parametrize("case", [
    Case(POINTER, 2, 0, 33, 20, 5, 7),
    Case(BOX, 1, 0, 24, 64, 6, 17),
    Case(BATCH_BOX, 3, 0, 16, 40, 7, 9),
    Case(SPLIT, 2, 0, 16, 40, 7, 9),
    Case(ROWS, 1, 0, 24, 64, 7, 17),
    Case(STACKED, 1, 0, 32, 32, 8, 10),
    Case(None, 1, 0, 16, 2, 4, 5),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("offset, out_size", [((2, 2), (2, 2)), ((4, 3), (5, 6)), ((-1, -2), (-3, -4))])
def test_convolve(case, offset, out_size, device):
    """Offsets of the forward and of both data gradients, sizes larger and smaller than x, with and without the mask."""
    torch.manual_seed(0)
    x, _, weight, _ = operands(case, torch.float32, device)
    grow = out_size or (0, 0)
    size = (case.h + grow[0], case.w + grow[1])
    mask = torch.randn(case.n, case.c_out, *size, device=device) if out_size != (2, 2) else None
    y = conv_relu.convolve(x, weight.permute(0, 2, 3, 1), size, *offset, mask=mask, config=case.config)

    def plain(dtype, convolve=F.conv2d):
        bottom, right = size[0] + 2 - offset[0] - case.h, size[1] + 2 - offset[1] - case.w
        padded = F.pad(x.to(dtype), (offset[1], right, offset[0], bottom))
        z = convolve(padded, weight.to(dtype))
        return z if mask is None else z * (mask > 0)

    exact = plain(torch.float64)
    same = in_order.farthest(exact, plain(torch.float32), plain(torch.float32, in_order.conv2d))
    assert_within_budget(y, same, exact, "y")


@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed", "expanded"])
@pytest.mark.parametrize("config", [POINTER, BOX, ROWS, STACKED], ids=lambda c: f"{c.variant}-{c.stack}")
def test_any_strides(config, layout, device):
    """Inputs that are not channels_last are read as what they are, weights as well."""
    x, weight = torch.randn(2, 16, 8, 8, device=device), torch.randn(32, 16, 3, 3, device=device) / 12
    if layout == "sliced":
        x = torch.randn(2, 20, 8, 11, device=device).to(memory_format=torch.channels_last)[:, 2:18, :, 3:]
        weight = torch.randn(32, 16, 5, 5, device=device)[..., 1:4, 2:] / 12
    elif layout == "transposed":
        x, weight = x.transpose(2, 3), weight.transpose(2, 3)
    elif layout == "expanded":
        x = x[:1].expand(2, -1, -1, -1)
        weight = weight.to(memory_format=torch.channels_last)
    y = conv_relu.forward(x, x, torch.cat([weight, weight], 1), None, 1, 0.0, config)
    assert_within_budget(y, *references(x, x, torch.cat([weight, weight], 1), None, 1, True), layout)


def test_batch_0(device):
    x, weight, head = torch.empty(0, 8, 6, 6, device=device), torch.randn(16, 8, 3, 3), torch.randn(4, 16, 1, 1)
    weight, head = weight.to(device), head.to(device)
    assert conv_relu.forward(x, None, weight, None, 0, 0.0).shape == (0, 16, 4, 4)
    assert [t.shape for t in conv_relu.forward_pool(x, weight, None, 1, 0.0)] == [(0, 16, 6, 6), (0, 16, 3, 3)]
    assert conv_relu.forward_head(x, None, weight, None, 1, head, None, "labels").shape == (0, 6, 6)


@pytest.mark.parametrize("case", [ONE_SOURCE[5], *TWO_SOURCES[2:7]], ids=str)
def test_repeats_are_bit_identical(case, device):
    x, skip, weight, bias = operands(case, torch.float32, device)
    repeats = 2 if device.type == "cpu" else 10
    first, *others = [conv_relu.forward(x, skip, weight, bias, case.pad, 0.0, case.config) for _ in range(repeats)]
    assert all(torch.equal(first, other) for other in others)


@pytest.mark.parametrize("config", [POINTER, FIRST, BOX, SPLIT, ROWS, FOUR_STACKED],
                         ids=lambda c: f"{c.variant}-{c.splits}-{c.stack}")
def test_nan_spreads_as_in_pytorch(config, device):
    """Through ReLU and through the pooling, to the pixels around it and no further.

    Stacked columns share their input columns, with zero weights where one has no tap: NaN reaches all of a group.
    """
    x = torch.randn(1, 4 if config is FIRST else 8, 8, 12, device=device)
    x[0, 3, 4, 5] = float("nan")
    weight = torch.randn(16, x.shape[1], 3, 3, device=device)
    y, pooled = conv_relu.forward_pool(x, weight, None, 1, 0.0, config)
    expected = F.relu(F.conv2d(x, weight, padding=1))
    in_group = expected.isnan().unflatten(3, (-1, config.stack)).any(4).repeat_interleave(config.stack, 3)
    expected = expected.masked_fill(in_group, torch.nan)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(pooled.isnan(), F.max_pool2d(expected, 2).isnan())
    assert y.isnan().sum() == 3 * max(3, config.stack) * 16


@pytest.mark.parametrize("config", [BOX, FOUR_STACKED], ids=lambda c: c.variant)
def test_weights_off_the_alignment_of_bulk_copies(config, device):
    """A channels_last weight that starts anywhere in a flat parameter, as optimizers and FSDP make them."""
    x = torch.randn(1, 8, 4, 16, device=device)
    weight = torch.randn(16 * 9 * 8 + 1, device=device)[1:].view(16, 3, 3, 8).permute(0, 3, 1, 2)
    y = conv_relu.forward(x, None, weight, None, 1, 0.0, config)
    assert_within_budget(y, *references(x, None, weight, None, 1, True), "y")


@pytest.mark.parametrize("config, message", [
    (dataclasses.replace(FIRST), "at most 7 channels"),
    (dataclasses.replace(STACKED), "takes 32 output channels and images whose width is a multiple of 2"),
    (dataclasses.replace(ROWS, block_h=3), "an even number of rows, not 3"),
    (dataclasses.replace(BOX), "multiple of 16 bytes, not \\(33,\\) to 48"),
    (dataclasses.replace(ROWS, splits=2), "2 splits of a rows"),
    (dataclasses.replace(BOX, splits=10), "10 splits of a box: at most 9"),
], ids=lambda value: getattr(value, "variant", ""))  # fmt: skip
def test_a_configuration_that_cannot_run_says_why(config, message, device):
    channels = 33 if config.variant == "box" else 16
    x, weight = torch.randn(1, channels, 5, 8, device=device), torch.randn(48, channels, 3, 3, device=device)
    with pytest.raises(ValueError, match=f"{message}|need compute capability 9.0"):
        conv_relu.forward(x, None, weight, None, 1, 0.0, config)


@pytest.mark.parametrize("architecture, dtype, c_x, c_out, size, expected", [
    (90, torch.bfloat16, 2, 32, 240, ConvConfig("first", 32, 128, num_stages=1)),
    (90, torch.bfloat16, 32, 32, 240, ConvConfig("rows", 32, 128, 6, 1, 32, 4, 2)),
    (90, torch.bfloat16, 64, 64, 120, ConvConfig("rows", 64, 64, 6, 1, 64, 4, 2)),
    (90, torch.float16, 128, 128, 60, ConvConfig("rows", 64, 64, 6, 1, 64, 4, 2)),
    (90, torch.bfloat16, 256, 256, 32, ConvConfig("box", 128, 16, 8, 1, 64, 4, 4)),
    (90, torch.bfloat16, 512, 64, 8, ConvConfig("box", 64, 8, 8, 2, 64, 4, 4, splits=7)),
    (90, torch.bfloat16, 33, 64, 64, ConvConfig("pointer", 64, 128, block_c=32, num_warps=8)),
    (80, torch.bfloat16, 256, 256, 64, ConvConfig("pointer", 128, 128, block_c=32, num_warps=8)),
    (120, torch.bfloat16, 64, 64, 120, ConvConfig("box", 64, 16, 8, 1, 64, 4, 4)),
])  # fmt: skip
def test_choice(architecture, dtype, c_x, c_out, size, expected, monkeypatch):
    """One layer of each kind keeps its configuration; a change of the heuristic must show here."""
    from fastunet.kernels.conv import config
    from fastunet.kernels.conv.config import choose_config
    from fastunet.kernels.conv.convolution import Convolution

    monkeypatch.setattr(config, "EIGHT_WARPS", False)  # as Triton before 3.8 has it
    x = torch.empty(16, c_x, size, size, device="meta", dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.empty(c_out, 3, 3, c_x, device="meta", dtype=dtype)
    with _launch.recording(architecture):
        assert choose_config(Convolution(x, None, weight, (1, 1), (size, size))) == expected
