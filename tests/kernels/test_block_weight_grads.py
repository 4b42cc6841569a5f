"""All weight gradients of a block at once, against PyTorch's of its layers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastunet.kernels import _launch, block_weight_grads
from fastunet.kernels.conv import weight_grad as weight_grad_module

from ..tolerance import assert_within_budget
from . import in_order
from .conftest import COMPILED, DTYPES


@dataclasses.dataclass(frozen=True)
class Case:
    """A block of c_out channels on (n, c_x, h, w) with a skip larger by ``crop`` rows and columns, where x is made of
    c_low channels by ``up``; ``tiles`` says how many launches of products its convolutions take."""

    up: str
    tiles: str
    n: int
    c_skip: int
    c_x: int
    c_out: int
    h: int
    w: int
    c_low: int = 0
    pad: int = 1
    crop: int = 0

    def __str__(self):
        return f"{self.up}-{self.tiles}-{self.n}x{self.c_skip}+{self.c_x}-{self.c_out}x{self.h}x{self.w}-pad{self.pad}"

    def operands(self, dtype, device):
        """dz1, x, skip, dz2, y1, du, low."""
        generator = torch.Generator().manual_seed(0)

        def random(channels, h, w):
            found = torch.randn(self.n, channels, h, w, generator=generator).to(dtype).to(device)
            return found.contiguous(memory_format=torch.channels_last)

        first = self.h + 2 * self.pad - 2, self.w + 2 * self.pad - 2
        second = first[0] + 2 * self.pad - 2, first[1] + 2 * self.pad - 2
        skip = random(self.c_skip, self.h + self.crop, self.w + self.crop) if self.c_skip else None
        du, low = random(self.c_x, self.h, self.w), random(self.c_low or 1, self.h // 2, self.w // 2)
        ups = (du, low) if self.c_low else (None, None)
        return random(self.c_out, *first), random(self.c_x, self.h, self.w), skip, random(self.c_out, *second), \
            random(self.c_out, *first), *ups  # fmt: skip


CASES = [
    Case("upsample", "one", 2, 16, 16, 16, 6, 18, 24),
    Case("upsample", "pointers", 1, 5, 33, 24, 4, 6, 5),
    Case("transpose", "one", 1, 16, 16, 16, 8, 24, 40, pad=0, crop=4),
    Case("transpose", "two", 1, 32, 40, 24, 6, 8, 16, crop=1),
    Case("none", "one", 2, 0, 32, 32, 5, 17),
    Case("none", "two", 1, 0, 32, 64, 7, 9),
    Case("none", "first", 2, 0, 2, 16, 9, 10),
    Case("upsample", "no image", 0, 16, 16, 16, 4, 6, 8),
]


def upsampled(x, weight, convolve):
    return convolve(F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (0, 1, 0, 1)), weight)


def expected(case, dtype, operands, convolve=F.conv2d):
    """The six gradients by autograd, computed in ``dtype``."""
    dz1, x, skip, dz2, y1, du, low = [None if t is None else t.to(dtype) for t in operands]
    if skip is not None:
        top = case.crop // 2
        x = torch.cat([skip[:, :, top : top + case.h, top : top + case.w], x], 1)
    found = []
    for dz, image in ((dz1, x), (dz2, y1)):
        weight = torch.zeros(case.c_out, image.shape[1], 3, 3, dtype=dtype, device=x.device, requires_grad=True)
        found += torch.autograd.grad(convolve(image, weight, padding=case.pad), weight, dz)
        found.append(dz.sum((0, 2, 3)))
    if du is None:
        return [*found, x.new_empty(0), x.new_empty(0)]
    shape = (case.c_low, case.c_x, 2, 2) if case.up == "transpose" else (case.c_x, case.c_low, 2, 2)
    weight = torch.zeros(shape, dtype=dtype, device=x.device, requires_grad=True)
    y = F.conv_transpose2d(low, weight, stride=2) if case.up == "transpose" else upsampled(low, weight, convolve)
    return [*found, *torch.autograd.grad(y, weight, du), du.sum((0, 2, 3))]


def assert_equals_autograd(case, dtype, device):
    operands = case.operands(dtype, device)
    found = block_weight_grads.weight_grads(*operands, case.pad, case.up == "transpose")
    exact, same = expected(case, torch.float64, operands), expected(case, dtype, operands)
    if dtype == torch.float32:
        ordered = expected(case, dtype, operands, in_order.conv2d)
        same = [in_order.farthest(*results) for results in zip(exact, same, ordered)]
    for name, *results in zip(("dw1", "db1", "dw2", "db2", "dwu", "dbu"), found, same, exact, strict=True):
        assert_within_budget(*results, name)


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(*dtype.values, id=dtype.id, marks=COMPILED)
                                                for dtype in DTYPES[1:])])  # fmt: skip
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_autograd(case, dtype, device):
    assert_equals_autograd(case, dtype, device)


def test_sums_of_many_splits(device, monkeypatch):
    """The second pass by tiles that are made for 512 rows and more, each with several rows here."""
    monkeypatch.setattr(weight_grad_module, "choose_splits", lambda *_: 3)
    assert block_weight_grads._tile(512) == (128, 16)
    monkeypatch.setattr(block_weight_grads, "_tile", lambda _: (128, 16))
    assert_equals_autograd(Case("upsample", "one", 1, 16, 16, 16, 4, 6, 8), torch.float32, device)


@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_launches(case):
    """One of products for sources that share a tile, one for the upsampling, one of sums."""
    operands = [None if t is None else t.to("meta") for t in case.operands(torch.bfloat16, "cpu")]
    with _launch.recording(90) as records:
        block_weight_grads.weight_grads(*operands, case.pad, case.up == "transpose")
    names = [launch.kernel.__name__ for launch in records]
    convolutions = [name for name in names if name.startswith("conv")]
    assert names[len(convolutions) :] == ["stride2_weight_grad_kernel"] * (case.up != "none") + ["block_sums_kernel"]
    if case.tiles == "one":
        assert convolutions == ["conv_relu_weight_grad_kernel"]
    assert ("conv_relu_weight_grad_first_kernel" in convolutions) == (case.tiles == "first")


def test_repeats_are_bit_identical(device):
    case = CASES[0]
    operands = case.operands(torch.float32, device)
    first, again = (block_weight_grads.weight_grads(*operands, case.pad, False) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
