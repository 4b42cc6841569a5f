"""Offsets beyond 2³¹ elements, in memory that is reserved but hardly touched: a launch's first or last programs."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunet.kernels import _launch, conv_transpose, max_pool, relu, segmentation_head, upsample_conv
from fastunet.kernels._stride2 import Stride2Config
from fastunet.kernels.conv import forward as conv_relu
from fastunet.kernels.conv.convolution import ConvConfig
from fastunet.kernels.dice import confusion as dice_confusion
from fastunet.kernels.dice import sums as dice

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="kernels are interpreted in this process, not compiled")

BF16, FAR = torch.bfloat16, 2**31


def last(grid):
    """The last program of every split; all of a launch that packs weights, which has few."""
    return [(x, y, 0) for x in (range(grid[0]) if grid[0] < 1000 else [grid[0] - 1]) for y in range(grid[1])]


def first(grid):
    return [(0, 0, 0)]


@pytest.fixture(scope="module")
def emulator():
    from .driver import emulated
    from .launch import Emulator
    from .machine import Schedule

    with emulated(90, Emulator((Schedule(),))) as found:
        yield found


def image(channels: int, h: int, w: int, last_rows: int = 4) -> torch.Tensor:
    """One NHWC image, of which only the last rows are filled."""
    x = torch.empty(1, h, w, channels, dtype=BF16).permute(0, 3, 1, 2)
    x[:, :, -last_rows:].normal_()
    return x


def close(actual: torch.Tensor, exact: torch.Tensor) -> None:
    """To within roundings to bfloat16; a wrong address is wrong altogether."""
    assert exact.abs().max() > 0
    assert (actual.double() - exact).abs().max() <= 2**-7 * exact.abs().max()


CONVOLUTIONS = {
    "first": (ConvConfig("first", 16, 128, num_stages=1), 7, 17600),
    "pointer": (ConvConfig("pointer", block_k=16, block_w=64, block_c=32), 9, 15600),
    "box": (ConvConfig("box", block_k=64, block_w=16, block_h=4, block_c=16), 8, 16512),
    "split": (ConvConfig("box", 64, 16, 4, 1, 64, splits=9), 2336, 960),
    "rows": (ConvConfig("rows", block_k=64, block_w=16, block_h=4, block_c=16), 8, 16512),
    "stacked": (ConvConfig("rows", block_k=8, block_w=128, block_h=4, block_c=16), 8, 16512),
}


@pytest.mark.parametrize("variant", CONVOLUTIONS)
def test_convolution(variant, emulator):
    (config, channels, size), emulator.only = CONVOLUTIONS[variant], last
    x = image(channels, size, size)
    assert x.numel() > FAR
    weight = (torch.randn(8, channels, 3, 3) / channels**0.5).to(BF16).contiguous(memory_format=torch.channels_last)
    y = conv_relu.forward(x, None, weight, None, 1, 0.0, config)
    exact = F.conv2d(x[:, :, -2:, -12:].double(), weight.double(), padding=1).relu()
    close(y[0, :, -1, -8:], exact[0, :, -1, -8:])


@pytest.mark.parametrize("bulk", [True, False])
@pytest.mark.parametrize("kernels", [conv_transpose, upsample_conv], ids=["conv_transpose", "upsample_conv"])
def test_stride2(kernels, bulk, emulator):
    emulator.only, config = last, Stride2Config(4, 8, 64, 16, 4, 2, bulk)
    x, dy = image(8, 8256, 8256, 2), image(8, 16512, 16512)
    weight = (torch.randn(8, 8, 2, 2) / 6).to(BF16)
    near, near_dy = x[:, :, -2:, -8:].double().requires_grad_(), dy[:, :, -4:, -16:].double()
    if kernels is conv_transpose:
        y = kernels.forward(x, weight, None, config)
        exact = F.conv_transpose2d(near, weight.double(), stride=2)
    else:
        y = kernels.forward(x, weight, None, 1.0, config)
        exact = F.conv2d(F.pad(F.interpolate(near, scale_factor=2), (0, 1, 0, 1)), weight.double())
    close(y[0, :, -2:, -8:], exact[0, :, -2:, -8:].detach())
    dx = kernels.data_grad(dy, weight, x, False, config=config)
    (exact,) = torch.autograd.grad(exact, near, near_dy)
    close(dx[0, :, -1, -4:], exact[0, :, -1, -4:])


def test_max_pool_and_its_gradient(emulator):
    emulator.only, x = last, image(8, 16512, 16512)
    near = x[:, :, -4:, -8:].double().requires_grad_()
    pooled = max_pool.forward(x)
    exact = F.max_pool2d(near, 2)
    assert torch.equal(pooled[0, :, -1, -2:].double(), exact[0, :, -1, -2:])
    d_pool = image(8, 8256, 8256)
    d = max_pool.backward(d_pool, None, x, 1.0)
    (exact,) = torch.autograd.grad(exact, near, d_pool[:, :, -2:, -4:].double())
    assert torch.equal(d[0, :, -2:, -4:].double(), exact[0, :, -2:, -4:])


def test_relu(emulator):
    emulator.only, y = last, image(8, 16512, 16512)
    d = relu.backward(y, y, 0.0)
    assert torch.equal(d[0, :, -1, -16:], y[0, :, -1, -16:].relu())


@pytest.mark.parametrize("output", ["logits", "labels"])
def test_segmentation_head(output, emulator):
    emulator.only, x = last, image(16, 11648, 11648)
    assert x.numel() > FAR
    weight = torch.randn(3, 16, 1, 1).to(BF16)
    out = segmentation_head.forward(x, weight, None, output)
    exact = F.conv2d(x[:, :, -1:, -8:].double(), weight.double())
    if output == "logits":
        close(out[0, :, -1, -8:], exact[0, :, 0])
    else:
        assert torch.equal(out[0, -1, -8:].long(), exact.argmax(1)[0, 0])


@pytest.mark.parametrize("end", ["first", "last"])
@pytest.mark.parametrize("classes", [3, 4])
def test_dice_gradient(classes, end, emulator):
    """In NHWC memory, by triplets and packed."""
    emulator.only = last if end == "last" else first
    pixels = FAR // classes + 4096
    logits = torch.empty(1, pixels, classes, dtype=BF16).transpose(1, 2)
    assert logits.numel() > FAR
    part = slice(0, 16) if end == "first" else slice(pixels - 16, pixels)
    logits[:, :, part].normal_()
    labels = torch.ones(1, pixels, dtype=torch.uint8)
    slopes = torch.randn(1, 3 * classes + 3)
    far = dice.sums_grad(torch.ones(()), slopes, logits, labels, None, None, True)[:, :, part]
    emulator.only = None
    near = logits[:, :, part].transpose(1, 2).clone().transpose(1, 2)  # aligned, as the far one is
    assert torch.equal(far, dice.sums_grad(torch.ones(()), slopes, near, labels[:, :16], None, None, True))
    assert far.abs().max() > 0


def test_sums_and_confusion(emulator, monkeypatch):
    """What the first program writes, in a grid so large that it takes the first tile alone."""
    made, empty, classes = [], _launch.empty, 4
    emulator.only = lambda grid: [] if emulator.records else first(grid)  # not the second pass over so many sums
    emulator.records.clear()
    monkeypatch.setattr(_launch, "empty", lambda *arguments: made.append(empty(*arguments)) or made[-1])
    monkeypatch.setattr(dice, "_PROGRAMS", 1 << 30)
    pixels = FAR // classes + 4096
    logits = torch.empty(1, pixels, classes, dtype=BF16).transpose(1, 2)
    logits[:, 1, :4096] = 20  # the first pixels are of class 1, and say so
    labels = torch.zeros(1, pixels, dtype=torch.uint8)
    labels[:, :4096] = 1
    dice.sums(logits, labels, None, None, True, True)
    tile = dice.choose_config(classes, dice.layout_of(logits), 2).block_s
    assert made[0][0, 0, [1, classes + 1, 2 * classes + 1]].tolist() == pytest.approx([tile] * 3)
    made.clear()
    emulator.records.clear()
    dice_confusion.confusion(logits, labels, classes, None, dice_confusion.ConfusionConfig(1024, 1 << 30, pairs=True))
    assert made[0][0, 0, classes + 1] == 1024


@pytest.mark.parametrize("shape, strides", [
    ((1 << 20, 8, 32, 32), (8192, 1, 256, 8)), ((1, 64, 1, 1 << 20), (1 << 26, 1, 1 << 26, 64)),
    ((1, 1 << 14, 2, 2), (1 << 16, 1, 1 << 15, 1 << 14)),
], ids=["pixels", "row", "channels"])  # fmt: skip
def test_beyond_the_limits_is_refused(shape, strides):
    x = torch.empty_strided(shape, strides, dtype=BF16, device="meta")
    with _launch.recording(90), pytest.raises(ValueError, match=r"an image of shape .* is too large"):
        max_pool.forward(x) if shape[2] > 1 else relu.backward(x, x, 0.0)


def test_a_side_of_2_to_the_31_is_refused():
    logits = torch.empty(1, 2, FAR - 1000, dtype=BF16, device="meta")
    labels = torch.empty(1, FAR - 1000, dtype=torch.uint8, device="meta")
    with _launch.recording(90), pytest.raises(ValueError, match="no side of a tensor may reach"):
        dice.sums(logits, labels, None, None, True, True)
