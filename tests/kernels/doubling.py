"""What the tests of the two operators that double an image share: cases, configurations, and the comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from types import ModuleType

import torch

from fastunet.kernels._stride2 import Stride2Config
from fastunet.kernels._stride2_weight_grad import WeightGradConfig

from ..tolerance import assert_within_budget
from . import in_order


@dataclasses.dataclass(frozen=True)
class Case:
    """An input (n, c_in, h, w) to c_out channels; ``bulk`` forces a variant on small tiles, None leaves the choice."""

    n: int
    c_in: int
    c_out: int
    h: int
    w: int
    bulk: bool | None = None

    def __str__(self):
        variant = {None: "chosen", True: "descriptors", False: "pointers"}[self.bulk]
        return f"{self.n}x{self.c_in}x{self.h}x{self.w}-to-{self.c_out}-{variant}"

    def product(self) -> dict:
        """Keyword arguments of forward and data_grad: 32 pixels, two steps for 32 channels."""
        return {} if self.bulk is None else {"config": Stride2Config(4, 8, 64, 16, 4, 2, self.bulk)}

    def weight_grad(self) -> dict:
        """Keyword arguments of weight_grad: several blocks of channels and several splits."""
        return {} if self.bulk is None else {"config": WeightGradConfig(4, 8, 32, 16, 4, 2, self.bulk)}


CASES = [
    Case(2, 32, 16, 5, 9, True),  # column phases share a tile of 64 rows; both image sides straddle it
    Case(1, 16, 96, 3, 8, True),  # a tile of rows inside one phase, one across, one that ends outside
    Case(1, 24, 16, 4, 1, True),  # input channels that end inside a step
    Case(2, 32, 16, 5, 9, False),
    Case(1, 33, 25, 4, 7, False),
    Case(1, 3, 1, 1, 1, False),
    Case(3, 48, 32, 1, 15),
    Case(1, 64, 64, 2, 17),
    Case(1, 100, 33, 4, 16),
    Case(1, 1, 2, 1, 15),
    Case(0, 64, 32, 7, 15),
]


def operands(case: Case, weight_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device):
    """x as a ReLU leaves it, weight, bias, dy; x and dy contiguous NCHW, which the launchers convert."""
    generator = torch.Generator().manual_seed(0)
    n, c_in, c_out, h, w = case.n, case.c_in, case.c_out, case.h, case.w

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    tensors = (
        random(n, c_in, h, w).relu(),
        random(*weight_shape) / c_in**0.5,
        random(c_out),
        random(n, c_out, 2 * h, 2 * w),
    )
    return [t.to(dtype).to(device) for t in tensors]


def reference_gradients(reference: Callable, x, weight, bias, dy, dtype: torch.dtype):
    """y, dx times x > 0, dw and db of ``reference(x, weight, bias)`` computed in ``dtype``."""
    leaves = [t.detach().to(dtype, copy=True).requires_grad_() for t in (x, weight, bias)]
    y = reference(*leaves)
    dx, dw, db = torch.autograd.grad(y, leaves, dy.to(dtype))
    return {"y": y.detach(), "dx": dx * (x > 0), "dw": dw, "db": db}


def assert_operator_within_budget(
    kernels: ModuleType, forward: Callable, reference: Callable, weight_shape: tuple[int, ...], case: Case,
    dtype: torch.dtype, device: torch.device, ordered: Callable | None = None,
):  # fmt: skip
    """Compares forward and all gradients of ``kernels`` with ``reference`` in the same dtype and in float64.

    In float32 also with ``ordered``, the reference whose sums add one product after another.
    """
    x, weight, bias, dy = operands(case, weight_shape, dtype, device)
    dw, db = kernels.weight_grad(dy, x, True, **case.weight_grad())
    actual = {
        "y": forward(x, weight, bias, **case.product()),
        "dx": kernels.data_grad(dy, weight, x, True, **case.product()),
        "dw": dw,
        "db": db,
    }
    same_dtype = reference_gradients(reference, x, weight, bias, dy, dtype)
    exact = reference_gradients(reference, x, weight, bias, dy, torch.float64)
    if ordered is not None and dtype == torch.float32:
        plainly = reference_gradients(ordered, x, weight, bias, dy, dtype)
        same_dtype = {name: in_order.farthest(exact[name], same_dtype[name], plainly[name]) for name in exact}
    for name, tensor in actual.items():
        assert_within_budget(tensor, same_dtype[name], exact[name], f"{name} of {case}")
