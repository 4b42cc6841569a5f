"""3×3 convolution with stride 2: the launchers against PyTorch's, forward and every gradient, at odd sizes too."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional import conv_norm, conv_relu
from fastunet.kernels import conv_strided

from ..tolerance import assert_within_budget
from .conftest import DTYPES
from .doubling import Case

CASES = [
    Case(2, 16, 24, 10, 18, True),  # column phases share a step's row of memory; both image sides straddle the tile
    Case(1, 96, 16, 5, 16, True),  # an odd height; several steps of channels
    Case(2, 9, 20, 5, 17, False),
    Case(1, 25, 3, 8, 13, False),
    Case(1, 3, 1, 1, 2, False),
    Case(1, 33, 70, 4, 15),
    Case(0, 32, 64, 7, 15),
]


def operands(case: Case, dtype, device):
    """x, weight, bias, dz; x and dz contiguous NCHW, which the launchers convert."""
    generator = torch.Generator().manual_seed(0)
    n, c_in, c_out, h, w = case.n, case.c_in, case.c_out, case.h, case.w
    shapes = (n, c_in, h, w), (c_out, c_in, 3, 3), (c_out,), (n, c_out, (h + 1) // 2, (w + 1) // 2)
    x, weight, bias, dz = (torch.randn(shape, generator=generator) for shape in shapes)
    return [t.to(dtype).to(device) for t in (x, weight / (3 * c_in**0.5), bias, dz)]


def reference(x, weight, bias, dz, dtype):
    """z, dx, dw and db of PyTorch in ``dtype``."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
    z = F.conv2d(leaves[0], *leaves[1:], stride=2, padding=1)
    return [z.detach(), *torch.autograd.grad(z, leaves, dz.to(dtype))]


def run(case: Case, x, weight, bias, dz):
    z = conv_strided.forward(x, weight, bias, 1, 1.0, **case.product())
    dx = conv_strided.data_grad(dz, weight, x, 1, **case.product())
    return [z, dx, *conv_strided.weight_grad(dz, x, 1, True, **case.weight_grad())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_and_gradients(case, dtype, device):
    tensors = operands(case, dtype, device)
    same, exact = (reference(*tensors, d) for d in (dtype, torch.float64))
    for name, *results in zip(("z", "dx", "dw", "db"), run(case, *tensors), same, exact, strict=True):
        assert_within_budget(*results, f"{name} of {case}")


@pytest.mark.parametrize("bulk", [True, False])
def test_activation_without_bias_and_repeats(bulk, device):
    case = Case(1, 16, 32, 6, 10, bulk)
    x, weight, bias, dz = operands(case, torch.float16, device)
    for slope in (0.0, 0.1):
        y = conv_strided.forward(x, weight, None, 1, slope, **case.product())
        plain = (F.conv2d(x.to(d), weight.to(d), None, 2, 1) for d in (x.dtype, torch.float64))
        assert_within_budget(y, *(F.leaky_relu(z, slope) for z in plain), "y")
    for first, second in zip(run(case, x, weight, bias, dz), run(case, x, weight, bias, dz)):
        assert torch.equal(first, second)
    dw, db = conv_strided.weight_grad(dz, x, 1, False, **case.weight_grad())
    assert torch.equal(dw, run(case, x, weight, bias, dz)[2])
    assert db.shape == (0,)


def test_nan_stays_where_its_taps_reach(device):
    x, weight, bias, _ = operands(Case(1, 16, 16, 7, 8), torch.float32, device)
    x[0, 5, 3, 2] = float("nan")
    y = conv_strided.forward(x, weight, bias, 1, 0.0)
    assert torch.equal(y.isnan(), F.conv2d(x, weight, bias, 2, 1).isnan())


@pytest.mark.parametrize("name", ["conv_relu", "conv_norm"])
def test_operators_run_it(name, device):
    """The public functions on the Triton backend: gradients by autograd equal those of the plain operators."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(s, generator=generator, dtype=torch.float64) for s in ((2, 3, 5, 6), (4, 3, 3, 3), (4,))]

    def results(function, dtype, backend):
        given = [t.to(device, dtype).requires_grad_() for t in leaves]
        y = function(*given, backend)
        return [y, *torch.autograd.grad(y.square().sum(), given)]

    def ours(x, w, b, backend):
        if name == "conv_relu":
            return conv_relu(x, w, b, stride=2, slope=0.1, backend=backend)
        return conv_norm(x, w, b, norm="instance", stride=2, slope=0.1, backend=backend)

    def plain(x, w, b, backend):
        z = F.conv2d(x, w, b, 2, 1)
        return F.leaky_relu(z if name == "conv_relu" else F.instance_norm(z), 0.1)

    same, exact = results(plain, torch.float32, None), results(plain, torch.float64, None)
    for index, each in enumerate(zip(results(ours, torch.float32, "triton"), same, exact, strict=True)):
        if (name, index) == ("conv_norm", 3):  # a bias before a norm has no gradient but rounding
            assert each[0].abs().max() < 1e-4
        else:
            assert_within_budget(*each, f"result {index}")


def test_valid_is_refused(device):
    x, weight = torch.zeros(2, 1, 4, 4, device=device), torch.zeros(1, 1, 3, 3, device=device)
    with pytest.raises(ValueError, match="has kernels for padding 1, not 0"):
        conv_strided.forward(x, weight, None, 0, 1.0)
    with pytest.raises(ValueError, match="has kernels for padding 1, not 0"):
        conv_strided.data_grad(x, weight, x, 0)
    for function in (conv_relu, conv_norm):
        with pytest.raises(ValueError, match="'triton' cannot run here: a valid convolution of stride 2 has no kernel"):
            function(x, weight, stride=2, padding="valid", backend="triton")
