"""Norm launchers against PyTorch in float64: statistics, results, every gradient, at sizes that straddle the tiles."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

from fastunet.kernels import _launch
from fastunet.kernels.conv import forward as conv_relu
from fastunet.kernels.conv.convolution import ConvConfig
from fastunet.kernels.norm import backward, forward, statistics
from fastunet.kernels.norm.tiles import NormConfig
from tests.kernels.conftest import COMPILED
from tests.kernels.conv_cases import ConvCase
from tests.tolerance import assert_within_budget

SMALL = NormConfig(4, 16, 1)


@dataclasses.dataclass(frozen=True)
class Case:
    norm: str
    shape: tuple[int, int, int, int]
    groups: int | None = None
    slope: float = 0.0
    pool: bool = False
    affine: bool = True
    config: NormConfig | None = None

    def __str__(self):
        options = f"-slope{self.slope}" + "-pool" * self.pool + "-plain" * (not self.affine)
        options += "-tiles" * bool(self.config)
        return f"{self.norm}{self.groups or ''}-{'x'.join(map(str, self.shape))}{options}"


CASES = [
    Case("batch", (3, 33, 3, 5), pool=True, config=SMALL),
    Case("batch", (1, 1, 1, 17), slope=1.0, affine=False),
    Case("batch", (2, 48, 17, 16), pool=True, slope=0.01),
    Case("instance", (3, 20, 4, 5), pool=True, config=SMALL),
    Case("instance", (2, 8, 15, 1), slope=0.2, affine=False),
    Case("instance", (1, 100, 5, 16), pool=True, slope=1.0),
    Case("group", (2, 24, 9, 8), groups=3, pool=True),
    Case("group", (2, 40, 3, 4), groups=1, slope=0.1, config=SMALL),
    Case("group", (2, 6, 4, 4), groups=6, slope=1.0, affine=False),
]
PARAMS = [
    pytest.param(case, dtype, id=f"{case}-{name}", marks=[] if case.config or dtype == torch.float16 else COMPILED)
    for i, case in enumerate(CASES)
    for dtype, name in ((torch.float32, "fp32"), (torch.float16, "fp16"), (torch.bfloat16, "bf16"))
    if i % 2 == 0 or dtype != torch.bfloat16
]  # fmt: skip


def operands(case, dtype, device):
    generator = torch.Generator().manual_seed(0)
    channels = case.shape[1]

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    z = (normal(*case.shape) + 3 * normal(1, channels, 1, 1)).to(device, dtype)
    weight, bias = (normal(channels).to(device) if case.affine else None for _ in range(2))
    dy = normal(*case.shape).to(device, dtype)
    n, c, h, w = case.shape
    return z.contiguous(memory_format=torch.channels_last), weight, bias, dy, normal(n, c, h // 2, w // 2).to(dy)


def reference(case, z, weight, bias, dy, d_pooled):
    """[y, pooled?, dz, dweight?, dbias?] by PyTorch in the dtype of z."""
    z = z.detach().requires_grad_()
    affine = [None if t is None else t.to(z.dtype).requires_grad_() for t in (weight, bias)]
    if case.norm == "batch":
        u = F.batch_norm(z, None, None, *affine, training=True)
    elif case.norm == "instance":
        u = F.instance_norm(z, weight=affine[0], bias=affine[1])
    else:
        u = F.group_norm(z, case.groups, *affine)
    y = F.relu(u) if case.slope == 0 else F.leaky_relu(u, case.slope)
    outputs, cotangents = ([y, F.max_pool2d(y, 2)], [dy, d_pooled]) if case.pool else ([y], [dy])
    leaves = [t for t in (z, *affine) if t is not None]
    return [*outputs, *torch.autograd.grad(outputs, leaves, [t.to(z.dtype) for t in cotangents])]


def run(case, z, weight, bias, dy, d_pooled):
    groups = case.groups or case.shape[1]
    mean, var = statistics.statistics(z, groups, case.norm != "batch", case.config)
    y, pooled = forward.normalise(z, mean, var, weight, bias, 1e-5, case.slope, case.pool, case.config)
    d_pooled = d_pooled if case.pool else None
    none = mean.new_empty(0)
    grads = backward.backward(dy, d_pooled, z, weight, bias, mean, var, none, 1e-5, case.slope, "", case.config)
    return [y, *([pooled] if case.pool else []), *(grads if case.affine else grads[:1])]


@pytest.mark.parametrize("case, dtype", PARAMS)
def test_against_pytorch(case, dtype, device):
    """Where a result lies within rounding of 0, or two of a window within rounding of each other, gradients may jump:
    these get none."""
    z, weight, bias, dy, d_pooled = operands(case, dtype, device)
    wide = [None if t is None else t.double() for t in (z, weight, bias, dy, d_pooled)]
    y = reference(dataclasses.replace(case, slope=1.0, pool=False), *wide)[0]
    close = y.abs() < 64 * torch.finfo(dtype).eps * y.abs().max() if case.slope != 1 else torch.zeros_like(y).bool()
    dy[close] = 0
    if case.pool:
        windows = F.unfold(y.flatten(0, 1)[:, None], 2, stride=2).sort(1).values
        tied = (windows[:, 3] - windows[:, 2] < 64 * torch.finfo(dtype).eps * y.abs().max()).view(d_pooled.shape)
        d_pooled[tied | (F.max_pool2d(close.double(), 2) > 0)] = 0
    wide[3:] = dy.double(), d_pooled.double()
    exact = reference(case, *wide)
    same = reference(case, z, weight, bias, dy, d_pooled)
    found = run(case, z, weight, bias, dy, d_pooled)
    names = ["y", *(["pooled"] if case.pool else []), "dz", "dweight", "dbias"]
    for name, f, s, e in zip(names, found, same, exact):
        assert_within_budget(f.to(s.dtype), s, e, name)
        assert f.dim() != 4 or f.is_contiguous(memory_format=torch.channels_last)
    if case.pool:
        assert torch.equal(found[1], F.max_pool2d(found[0], 2)), "the pooled tensor is not the pool of what was written"


@pytest.mark.parametrize("case", [CASES[0], CASES[7]], ids=str)
def test_repeats_are_bit_identical(case, device):
    arguments = operands(case, torch.float32, device)
    first, second = run(case, *arguments), run(case, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_the_pool_s_gradient_alone(device):
    case = CASES[2]
    z, weight, bias, dy, d_pooled = operands(case, torch.float32, device)
    mean, var = statistics.statistics(z, 48, False)
    arguments = z, weight, bias, mean, var, mean.new_empty(0), 1e-5, case.slope, ""
    alone = backward.backward(None, d_pooled, *arguments)
    with_zeros = backward.backward(torch.zeros_like(dy), d_pooled, *arguments)
    assert all(torch.equal(a, b) for a, b in zip(alone, with_zeros, strict=True))
    assert alone[0].abs().max() > 0


@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_statistics_far_from_zero(offset, device):
    """Sums of squares in float32 would be off by 1000² eps = 0.1."""
    z = (torch.randn(2, 24, 7, 20, generator=torch.Generator().manual_seed(0)) + offset).to(device)
    z = z.contiguous(memory_format=torch.channels_last)
    for per_sample, groups, dims in ((False, 24, (0, 3, 4)), (True, 24, (3, 4)), (True, 4, (2, 3, 4))):
        mean, var = statistics.statistics(z, groups, per_sample)
        values = z.unflatten(1, (groups, -1))
        expected = (torch.var_mean(v, dims, correction=0) for v in (values, values.double()))
        (same_var, _), (exact_var, exact_mean) = expected
        torch.testing.assert_close(mean.double(), exact_mean.view(mean.shape), rtol=1e-6, atol=1e-6)
        assert_within_budget(var, same_var.view(var.shape), exact_var.view(var.shape))


@dataclasses.dataclass(frozen=True)
class Fused(ConvCase):
    """Whether it gives statistics per sample."""

    per_sample: bool = True


BOX, POINTER = ConvConfig("box", 64, 16, 4, block_c=16), ConvConfig("pointer", 32, 64, block_c=32)
FUSED = [
    Fused(POINTER, 3, 5, 33, 48, 3, 7, per_sample=False),
    Fused(POINTER, 2, 0, 24, 20, 8, 16),
    Fused(POINTER, 1, 0, 3, 33, 9, 9, pad=0),
    Fused(ConvConfig("first", 16, 64), 2, 0, 2, 24, 9, 15, per_sample=False),
    Fused(ConvConfig("first", 16, 64), 2, 0, 1, 8, 8, 8),
    Fused(BOX, 2, 8, 24, 72, 5, 17),
    Fused(ConvConfig("box", 64, 8, 8, 2, 32), 3, 0, 16, 40, 7, 9, per_sample=False),
    Fused(dataclasses.replace(BOX, splits=3), 2, 0, 24, 40, 9, 11, pad=0),
    Fused(ConvConfig("box", 64, 8, 8, 2, 16, splits=3), 3, 0, 24, 24, 8, 8),
    Fused(ConvConfig("rows", 64, 16, 4, block_c=32), 2, 0, 16, 72, 7, 17),
    Fused(ConvConfig("rows", 32, 32, 6, block_c=16), 2, 8, 24, 32, 10, 18),
]


@pytest.mark.parametrize("case, dtype", [
    pytest.param(case, dtype, id=f"{case}-{dtype}".replace("torch.", ""),
                 marks=COMPILED if dtype == torch.bfloat16 else [])
    for i, case in enumerate(FUSED) for dtype in ((torch.float32, torch.float16)[i % 2], torch.bfloat16)
])  # fmt: skip
def test_statistics_written_by_the_convolution(case, dtype, device):
    """Those of the rounded result, which the second pass reads, of batch, instance and group norm; in float32 far from
    zero, where sums of squares would be off by 1000² eps = 0.1."""
    far = 1000 if dtype == torch.float32 else 8
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    x, skip = normal(case.n, case.c_x, case.h, case.w), None
    if case.c_skip:
        skip = normal(case.n, case.c_skip, case.h + 2, case.w)
    weight = normal(case.c_out, case.c_skip + case.c_x, 3, 3) / 3 / (case.c_skip + case.c_x) ** 0.5
    operands = x, skip, weight, normal(case.c_out) + far, case.pad
    plain = conv_relu.forward(*operands, 1.0, case.config)
    z, partial = conv_relu.forward_statistics(*operands, True, case.config)
    assert torch.equal(z, plain)
    assert (partial is not None) == case.per_sample
    again = conv_relu.forward_statistics(*operands, False, case.config)[1]
    assert partial is None or torch.equal(partial, again)
    c = case.c_out
    for groups, per_sample in ((c, False), *((groups, True) for groups in (c, c // 4, 1) if case.per_sample)):
        rows, groups = case.n if per_sample else 1, groups if c % groups == 0 else 3
        mean, var = statistics.merge(again, rows, groups)
        values = (z if per_sample else z.transpose(0, 1)[None]).reshape(rows, groups, -1)
        same_var, same_mean = torch.var_mean(values.float(), 2, correction=0)
        exact_var, exact_mean = torch.var_mean(values.double(), 2, correction=0)
        assert_within_budget(mean, same_mean, exact_mean, "mean")
        assert_within_budget(var, same_var, exact_var, "var")


def test_an_empty_batch(device):
    z = torch.zeros(0, 8, 4, 4, device=device)
    for per_sample, rows in ((False, 1), (True, 0)):
        mean, var = statistics.statistics(z, 8, per_sample)
        assert mean.shape == var.shape == (rows, 8)
        y, pooled = forward.normalise(z, mean, var, None, None, 1e-5, 0.0, True)
        assert (y.shape, pooled.shape) == ((0, 8, 4, 4), (0, 8, 2, 2))
        dz, _, _ = backward.backward(z, None, z, None, None, mean, var, mean.new_empty(0), 1e-5, 0.0, "")
        assert dz.shape == z.shape


@pytest.mark.parametrize("norm, groups", [("batch", None), ("instance", None), ("group", 2)])
def test_the_whole_operator(norm, groups, device):
    """Through the convolution, with bias and skip: the operator's result is that of its parts."""
    x, skip, weight = torch.randn(2, 3, 6, 7), torch.randn(2, 2, 8, 8), torch.randn(8, 5, 3, 3)
    x, skip, weight, bias = (t.to(device) for t in (x, skip, weight, torch.randn(8)))
    y, pooled, z, _, _, count = forward.forward(
        x, skip, weight, bias, bias, weight[:, 0, 0, 0], 1, 1, groups or 8, norm != "batch", 1e-5, 0.1, True, ""
    )
    exact = F.conv2d(torch.cat([skip[:, :, 1:7, :7], x], 1).double(), weight.double(), bias.double(), padding=1)
    torch.testing.assert_close(z.double(), exact, rtol=1e-5, atol=1e-5)
    case = Case(norm, exact.shape, groups, slope=0.1)
    exact = reference(case, exact, bias.double(), weight[:, 0, 0, 0].double(), exact, None)[0]
    torch.testing.assert_close(y.double(), exact, rtol=1e-4, atol=1e-4)
    assert torch.equal(pooled, F.max_pool2d(y, 2))
    assert count.numel() == 0
    assert _launch.INTERPRETED or y.device == x.device
