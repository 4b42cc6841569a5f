"""Data gradients against PyTorch's autograd: both sources, cropped skips, masks, and channel counts of first layers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastunet.kernels import _launch
from fastunet.kernels.conv import data_grad as data_grad_module
from fastunet.kernels.conv.convolution import ConvConfig
from fastunet.kernels.conv.data_grad import data_grad

from ..tolerance import assert_within_budget
from . import in_order
from .conftest import DTYPES
from .conv_cases import ConvCase

POINTER = ConvConfig("pointer", block_k=32, block_w=32, block_c=32)
BOX = ConvConfig("box", block_k=64, block_w=16, block_h=4, block_c=16)
BATCH_BOX = ConvConfig("box", block_k=128, block_w=8, block_h=8, block_n=2, block_c=16)
SPLIT = ConvConfig("box", block_k=64, block_w=16, block_h=4, block_c=16, splits=3)
ROWS = ConvConfig("rows", block_k=64, block_w=16, block_h=4, block_c=32)
STACKED = ConvConfig("rows", block_k=32, block_w=32, block_h=6, block_c=16)


@dataclasses.dataclass(frozen=True)
class Case(ConvCase):
    """The skip is larger than x by ``crop`` rows and ``crop + 1`` columns.

    A crop of None is a skip of x's own size. ``masks`` says whether x and the skip are outputs of a ReLU.
    """

    crop: int | None = None
    masks: tuple[bool, bool] = (True, True)

    def __str__(self):
        masks = "x" * self.masks[0] + "s" * self.masks[1]
        whole = self.c_skip and self.crop is None
        return f"{super().__str__()}-{'whole' if whole else f'crop{self.crop}'}-{masks}"

    def operands(self, dtype, device):
        """(dz, weight, x, skip); x and the skip hold exact zeros, as ReLU's outputs do."""
        torch.manual_seed(len(str(self)))
        dz = torch.randn(self.n, self.c_out, self.h + 2 * self.pad - 2, self.w + 2 * self.pad - 2, device=device)
        weight = torch.randn(self.c_out, self.c_skip + self.c_x, 3, 3, device=device) / (9 * self.c_out) ** 0.5
        x = torch.randn(self.n, self.c_x, self.h, self.w, device=device).relu()
        more_h, more_w = (0, 0) if self.crop is None else (self.crop, self.crop + 1)
        skip = torch.randn(self.n, self.c_skip, self.h + more_h, self.w + more_w, device=device).relu()
        weight = weight.to(dtype, memory_format=torch.channels_last)
        return dz.to(dtype), weight, x.to(dtype), skip.to(dtype) if self.c_skip else None


CASES = [
    Case(None, 1, 0, 1, 16, 15, 16, masks=(False, False)),
    Case(None, 2, 0, 2, 24, 5, 7, pad=0),
    Case(None, 1, 0, 3, 33, 16, 17),
    Case(POINTER, 3, 0, 4, 8, 3, 15, pad=0),
    Case(None, 1, 32, 32, 32, 8, 16),
    Case(POINTER, 1, 3, 33, 48, 7, 5, pad=0, crop=3),
    Case(POINTER, 1, 5, 24, 17, 4, 9, crop=2, masks=(False, True)),
    Case(BOX, 1, 24, 40, 16, 6, 15, pad=0, crop=4),
    Case(BOX, 2, 16, 8, 48, 5, 17, crop=1, masks=(True, False)),
    Case(BOX, 1, 8, 16, 24, 4, 4, crop=0, masks=(False, False)),
    Case(POINTER, 1, 0, 40, 24, 4, 9),
    Case(SPLIT, 1, 0, 72, 40, 7, 9),
    Case(ROWS, 1, 8, 72, 40, 6, 17, masks=(True, False)),
    Case(STACKED, 1, 0, 32, 40, 7, 18, pad=0),
    Case(STACKED, 2, 32, 32, 16, 5, 10, crop=1, masks=(False, True)),
    Case(ROWS, 1, 32, 32, 40, 6, 17, masks=(True, False)),
    Case(ROWS, 2, 64, 40, 16, 3, 16, masks=(False, True)),
    Case(ROWS, 1, 96, 64, 16, 5, 9, pad=0),
    Case(BOX, 1, 32, 32, 16, 5, 17, masks=(True, False)),
    Case(BOX, 2, 32, 72, 16, 4, 9, masks=(False, False)),
    Case(BOX, 1, 24, 40, 16, 6, 15),
    Case(BATCH_BOX, 3, 64, 24, 16, 7, 9, masks=(False, True)),
    Case(BATCH_BOX, 1, 128, 128, 8, 8, 8),
    Case(None, 0, 32, 32, 8, 6, 6),
    Case(None, 3, 0, 100, 8, 3, 3, pad=0),
    Case(None, 0, 4, 8, 8, 6, 6, crop=1),
]


def gradients(case, dz, weight, x, skip, dtype, convolve=F.conv2d):
    """(dx, dskip) by autograd, computed in ``dtype``; masked where the operand is a ReLU's output."""
    dz, weight, x = dz.to(dtype), weight.to(dtype), x.to(dtype).requires_grad_()
    whole = x
    if skip is not None:
        skip = skip.to(dtype).requires_grad_()
        top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
        whole = torch.cat([skip[:, :, top : top + x.shape[2], left : left + x.shape[3]], x], 1)
    sources = (x,) if skip is None else (x, skip)
    found = torch.autograd.grad(convolve(whole, weight, padding=case.pad), sources, dz)
    return [torch.where(s > 0, d, 0) if mask else d for d, s, mask in zip(found, sources, case.masks)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_autograd(case, dtype, device):
    dz, weight, x, skip = case.operands(dtype, device)
    results = data_grad(dz, weight, x, skip, case.pad, *case.masks, config=case.config)
    exact = gradients(case, dz, weight, x, skip, torch.float64)
    same = gradients(case, dz, weight, x, skip, dtype)
    if dtype == torch.float32:
        ordered = gradients(case, dz, weight, x, skip, dtype, in_order.conv2d)
        same = [in_order.farthest(*results) for results in zip(exact, same, ordered)]
    for name, actual, ours, reference in zip(("dx", "dskip"), results, same, exact):
        assert_within_budget(actual, ours, reference, name)
        assert torch.equal(actual == 0, reference == 0) or dtype != torch.float32, f"{name} has zeros elsewhere"
    if skip is None:
        assert results[1].shape == (0,)


@pytest.mark.parametrize("config", [POINTER, BOX], ids=lambda config: config.variant)
def test_strided_operands_and_repeats(config, device):
    """Views give what their copies give, bit for bit, each time."""
    case = Case(config, 1, 16, 24, 16, 6, 17, pad=0, crop=2)
    dz, weight, x, skip = case.operands(torch.float32, device)
    views = [torch.stack([t, t], -1)[..., 0] for t in (dz, weight, x, skip)]
    first = data_grad(dz, weight, x, skip, 0, True, True, config)
    for again in (data_grad(*views, 0, True, True, config), data_grad(dz, weight, x, skip, 0, True, True, config)):
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("case, in_place", [
    (Case(BOX, 1, 8, 16, 24, 4, 9), True),
    (Case(ROWS, 1, 0, 72, 24, 5, 9), True),
    (Case(STACKED, 1, 0, 32, 24, 5, 10), True),
    (Case(BOX, 1, 4, 20, 24, 4, 9), False),
], ids=str)  # fmt: skip
def test_weights_that_bulk_copies_read_in_place(case, in_place, device, monkeypatch):
    """16-bit ones in NHWC memory, at addresses and channels of multiples of 16 bytes; others are reordered."""
    dz, weight, x, skip = case.operands(torch.float16, device)
    flat = torch.empty(weight.numel() + 1, dtype=weight.dtype, device=device)
    off = flat[1:].view(weight.permute(0, 2, 3, 1).shape).permute(0, 3, 1, 2).copy_(weight)
    reordered, take = [], data_grad_module.conv_taps
    monkeypatch.setattr(data_grad_module, "conv_taps", lambda *a: reordered.append(a) or take(*a))
    exact, same = (gradients(case, dz, weight, x, skip, dtype) for dtype in (torch.float64, torch.float16))
    in_place &= _launch.architecture() >= 90
    for each, expected in ((weight, not in_place), (weight.contiguous(), True), (off, True)):
        reordered.clear()
        dx, _ = data_grad(dz, each, x, skip, 1, *case.masks, config=None if skip is not None else case.config)
        assert_within_budget(dx, same[0], exact[0], "dx")
        assert bool(reordered) == expected


@pytest.mark.parametrize("config, c_skip, c_x, crop, count", [
    (ROWS, 32, 32, 0, 1), (ROWS, 64, 8, 0, 1), (ROWS, 96, 32, 0, 1), (BOX, 64, 64, 0, 1), (BATCH_BOX, 64, 64, 0, 1),
    (ROWS, 24, 40, 0, 2), (ROWS, 16, 48, 0, 2), (BATCH_BOX, 96, 32, 0, 2), (ROWS, 32, 32, 2, 2), (SPLIT, 64, 64, 0, 4),
    (POINTER, 64, 64, 0, 2), (POINTER, 3, 64, 0, 2), (STACKED, 32, 32, 0, 2), (None, 32, 32, 0, 1),
    (None, 24, 40, 0, 2), (None, 4, 28, 0, 2),
], ids=str)  # fmt: skip
def test_launches_for_both_sources(config, c_skip, c_x, crop, count):
    """One where half a tile is of one source, at the same place in both, by kernels that write two images."""
    sizes = (2, 32, 60, 240), (2, c_x, 60, 240), (2, c_skip, 60 + crop, 240 + crop), (32, c_skip + c_x, 3, 3)
    dz, x, skip, weight = (torch.empty(size, dtype=torch.bfloat16, device="meta") for size in sizes)
    dz, x, skip, weight = (image.contiguous(memory_format=torch.channels_last) for image in (dz, x, skip, weight))
    with _launch.recording(90) as launches:
        data_grad(dz, weight, x, skip, 1, True, False, config)
    assert len([launch for launch in launches if launch.kernel.__name__ != "permuted_taps_kernel"]) == count


@pytest.mark.parametrize("pad, crop", [(0, 5), (1, 5), (0, 0)])
def test_pixels_around_a_crop_get_zero(pad, crop, device):
    case = Case(POINTER, 1, 4, 4, 8, 4, 4, pad=pad, crop=crop, masks=(False, False))
    dz, weight, x, skip = case.operands(torch.float32, device)
    _, dskip = data_grad(dz, weight, x, skip, pad, False, False, POINTER)
    top, left = crop // 2, (crop + 1) // 2
    inside = dskip[:, :, top : top + 4, left : left + 4].clone()
    dskip[:, :, top : top + 4, left : left + 4] = 0
    assert inside.count_nonzero() == inside.numel()
    assert dskip.count_nonzero() == 0


def test_shapes_that_do_not_fit_are_named(device):
    dz, weight, x = (torch.zeros(shape, device=device) for shape in ((1, 2, 4, 4), (2, 5, 3, 3), (1, 3, 4, 4)))
    with pytest.raises(ValueError, match=r"\(2, 5, 3, 3\) do not fit x \(1, 3, 4, 4\), 0 skip channels and padding 1"):
        data_grad(dz, weight, x, None, 1, False, False)
