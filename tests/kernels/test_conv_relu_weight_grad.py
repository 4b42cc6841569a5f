"""Weight and bias gradients against PyTorch: each variant by explicit tiles that shapes straddle, and the choice."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastunet.kernels import _launch, _reduce
from fastunet.kernels.conv import weight_grad as weight_grad_module
from fastunet.kernels.conv.weight_grad import weight_grad
from fastunet.kernels.conv.weight_grad_config import WeightGradConfig, choose_config, choose_splits, why_not

from ..tolerance import assert_within_budget
from . import in_order
from .conftest import DTYPES
from .conv_cases import ConvCase

ROWS = WeightGradConfig("bulk", block_k=64, block_c=16, block_w=16, rows=4, num_stages=2)
ROW_PAIRS = WeightGradConfig("bulk", block_k=64, block_c=32, block_w=32, rows=2, num_warps=8, num_stages=2)
BOX = WeightGradConfig("bulk", block_k=64, block_c=32, block_w=16, block_h=4)
POINTER = WeightGradConfig("pointer", block_k=32, block_c=32, block_w=16, block_h=2)
POINTER_ROWS = WeightGradConfig("pointer", block_k=16, block_c=16, block_w=16, rows=2)
FIRST = WeightGradConfig("first", block_k=16, block_c=64, block_w=64)


@dataclasses.dataclass(frozen=True)
class Case(ConvCase):
    """The skip is larger than x by ``crop`` rows and ``crop + 1`` columns."""

    crop: int = 0

    @property
    def tile(self):
        return f"{self.config.variant}{self.config.block_h}x{self.config.rows}"

    def __str__(self):
        return f"{super().__str__()}-crop{self.crop}" if self.crop else super().__str__()

    def operands(self, dtype, device):
        """(dz, x, skip) with NHWC, contiguous and strided memory."""
        torch.manual_seed(len(str(self)))
        out = self.n, self.c_out, self.h + 2 * self.pad - 2, self.w + 2 * self.pad - 2
        dz = torch.randn(out, device=device).to(dtype).contiguous(memory_format=torch.channels_last)
        x = torch.randn(self.n, self.c_x, self.h, 2 * self.w, device=device).to(dtype)[..., ::2]
        if self.c_skip == 0:
            return dz, x, None
        skip = torch.randn(self.n, self.c_skip, self.h + self.crop, self.w + self.crop + 1, device=device)
        return dz, x, skip.to(dtype)


CASES = [
    Case(ROWS, 2, 0, 24, 40, 9, 17),
    Case(ROWS, 1, 16, 8, 72, 6, 15, pad=0, crop=3),
    Case(ROW_PAIRS, 1, 32, 40, 64, 5, 33, crop=4),
    Case(BOX, 3, 0, 32, 64, 3, 16),
    Case(BOX, 1, 8, 40, 24, 7, 18, pad=0),
    Case(POINTER, 1, 33, 3, 24, 3, 17, crop=2),
    Case(POINTER, 2, 0, 48, 33, 3, 15, pad=0),
    Case(POINTER_ROWS, 1, 0, 20, 24, 5, 16),
    Case(FIRST, 3, 0, 1, 24, 9, 15),
    Case(FIRST, 1, 0, 2, 33, 16, 17, pad=0),
    Case(FIRST, 1, 3, 4, 7, 5, 6, crop=3),
    Case(FIRST, 1, 0, 6, 16, 1, 1),
    Case(None, 1, 0, 1, 16, 15, 16),
    Case(None, 3, 4, 4, 5, 3, 3, pad=0, crop=1),
    Case(None, 1, 2, 24, 8, 6, 6, crop=2),
    Case(None, 1, 0, 100, 33, 2, 3),
    Case(None, 1, 32, 32, 32, 9, 16),
]


def gradients(dz, x, skip, pad, dtype, convolve=F.conv2d):
    """(dw, db) by PyTorch's autograd, computed in ``dtype``."""
    dz, x = dz.to(dtype), x.to(dtype)
    if skip is not None:
        top, left = (skip.shape[2] - x.shape[2]) // 2, (skip.shape[3] - x.shape[3]) // 2
        x = torch.cat([skip.to(dtype)[:, :, top : top + x.shape[2], left : left + x.shape[3]], x], 1)
    weight = torch.zeros(dz.shape[1], x.shape[1], 3, 3, dtype=dtype, device=x.device, requires_grad=True)
    bias = torch.zeros(dz.shape[1], dtype=dtype, device=x.device, requires_grad=True)
    return torch.autograd.grad(convolve(x, weight, bias, padding=pad), (weight, bias), dz)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_autograd(case, dtype, device):
    dz, x, skip = case.operands(dtype, device)
    dw, db = weight_grad(dz, x, skip, case.pad, True, case.config)
    exact = gradients(dz, x, skip, case.pad, torch.float64)
    same = gradients(dz, x, skip, case.pad, dtype)
    if dtype == torch.float32:
        ordered = gradients(dz, x, skip, case.pad, dtype, in_order.conv2d)
        same = [in_order.farthest(*results) for results in zip(exact, same, ordered)]
    assert_within_budget(dw, same[0], exact[0], "dw")
    assert_within_budget(db, same[1], exact[1], "db")
    assert dw.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("config", [ROWS, BOX, POINTER, FIRST], ids=lambda config: config.variant)
def test_shares_of_several_steps(config, device, monkeypatch):
    """Two programs for all pixels: elsewhere here each has a single step, for there are fewer tiles than programs."""
    monkeypatch.setattr(weight_grad_module, "choose_splits", lambda *arguments: 2)
    dz, x, _ = Case(config, 2, 0, 4 if config is FIRST else 16, 16, 9, 18).operands(torch.float32, device)
    dw, db = weight_grad(dz, x, None, 1, True, config)
    exact, same = (gradients(dz, x, None, 1, dtype) for dtype in (torch.float64, torch.float32))
    assert_within_budget(dw, same[0], exact[0], "dw")
    assert_within_budget(db, same[1], exact[1], "db")


@pytest.mark.parametrize("config", [ROWS, POINTER, FIRST], ids=lambda config: config.variant)
def test_repeats_are_bit_identical(config, device):
    c_x = 4 if config is FIRST else 16
    dz, x, _ = Case(config, 1, 0, c_x, 16, 7, 18).operands(torch.float32, device)
    first = weight_grad(dz, x, None, 1, True, config)
    again = weight_grad(dz, x, None, 1, True, config)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("shape", [(0, 3, 8, 9), (2, 3, 2, 5)], ids=["no image", "no output pixel"])
def test_nothing_to_sum_gives_zeros(shape, device):
    n, c_x, h, w = shape
    dz = torch.randn(n, 5, h - 2, w - 2, device=device)
    skip = torch.randn(n, 2, h + 2, w + 2, device=device)
    dw, db = weight_grad(dz, torch.randn(shape, device=device), skip, 0, True)
    assert torch.equal(dw, torch.zeros(5, 2 + c_x, 3, 3, device=device))
    assert torch.equal(db, torch.zeros(5, device=device))


def test_without_a_bias(device):
    dz, x, _ = Case(FIRST, 1, 0, 3, 8, 6, 7).operands(torch.float32, device)
    dw, db = weight_grad(dz, x, None, 1, False, FIRST)
    assert db.shape == (0,)
    assert torch.equal(dw, weight_grad(dz, x, None, 1, True, FIRST)[0])


def test_shapes_that_do_not_fit_are_named(device):
    with pytest.raises(ValueError, match=r"dz \(1, 2, 4, 4\) does not fit x \(1, 3, 4, 4\), pad 0"):
        weight_grad(torch.zeros(1, 2, 4, 4, device=device), torch.zeros(1, 3, 4, 4, device=device), None, 0, True)


LAYERS = [(16, 2, 32, 240), (16, 32, 32, 240), (16, 512, 512, 15), (1, 64, 64, 568), (1, 512, 512, 54),
          (3, 33, 100, 31)]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("architecture", [80, 86, 90, 100, 120])
@pytest.mark.parametrize("n, c_in, c_out, size", LAYERS)
def test_choice_fits_and_fills_the_gpu(n, c_in, c_out, size, architecture, dtype):
    """Each chosen tile can run there; two waves of programs, or one step each, or 64 MiB of partial sums."""
    dz = torch.empty(n, c_out, size, size, dtype=dtype, device="meta")
    x = torch.empty(n, c_in, size, size, dtype=dtype, device="meta")
    with _launch.recording(architecture):
        config = choose_config(dz, x)
        splits = choose_splits(config, config.programs(c_out, c_in), config.tiles(dz), 9 * c_out * 2 * c_in)
        assert why_not(config, dz, x) is None
    workspace = splits * c_out * 9 * 2 * c_in * 4
    assert splits == 1 or workspace <= 64 << 20
    full = splits * config.programs(c_out, c_in) >= 2 * 108
    assert full or splits == config.tiles(dz) or workspace + workspace // splits > 64 << 20


def test_tiles_that_cannot_run_are_refused(device):
    dz, x = torch.empty(1, 64, 8, 8, device="meta"), torch.empty(1, 33, 8, 8, device="meta")
    with _launch.recording(90):
        assert "multiple of 16 bytes" in why_not(ROWS, dz, x)
        assert "column of ones" in why_not(FIRST, dz, x)
        assert "boxes of one row" in why_not(dataclasses.replace(BOX, rows=2), dz, dz)
    with _launch.recording(80):
        assert "compute capability 9.0" in why_not(ROWS, dz, dz)
    with pytest.raises(ValueError, match="'first' cannot run here: 9 taps of 8 channels"):
        weight_grad(*torch.zeros(2, 1, 8, 4, 4, device=device), None, 1, True, FIRST)


@pytest.mark.parametrize("c_out", [24, 160])
def test_bias_of_shares_of_several_steps(c_out, device, monkeypatch):
    """Three splits of all pixels, so that each takes several steps and the last one ends early."""
    monkeypatch.setattr(weight_grad_module, "choose_splits", lambda *_: 3)
    monkeypatch.setattr(_reduce, "_COLUMN_TILE", 256)
    torch.manual_seed(0)
    dz, x = (torch.randn(2, c, 13, 21, device=device) for c in (c_out, 16))
    _, actual = weight_grad(dz, x, None, 1, True)
    assert_within_budget(actual, dz.sum((0, 2, 3)), dz.double().sum((0, 2, 3)), "db")
