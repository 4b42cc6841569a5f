"""The checks that every differentiable operator passes: values, gradients, fp64 gradcheck, opcheck, compilation."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.tolerance import assert_within_budget


def leaves(*shapes: tuple[int, ...] | None, dtype: torch.dtype = torch.float64) -> list[torch.Tensor | None]:
    """Normal random tensors that require gradients, None for None, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    return [
        shape and torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def run_with_gradients(function: Callable, tensors: list[torch.Tensor | None]) -> list[torch.Tensor]:
    """The outputs of ``function`` and the gradient of each tensor under a fixed random cotangent."""
    outputs = function(*tensors)
    outputs = list(outputs) if isinstance(outputs, tuple) else [outputs]
    generator = torch.Generator().manual_seed(1)
    cotangents = [torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.dtype) for y in outputs]
    given = [t for t in tensors if t is not None]
    return outputs + list(torch.autograd.grad(outputs, given, cotangents))


def check_against_literal(function: Callable, literal: Callable, *shapes: tuple[int, ...] | None) -> None:
    """``function`` equals ``literal`` (plain PyTorch): values and every gradient, float64, float32 and bfloat16."""
    exact = run_with_gradients(literal, leaves(*shapes))
    for got, want in zip(run_with_gradients(function, leaves(*shapes)), exact, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12 * want.abs().max().item())
    for dtype in (torch.float32, torch.bfloat16):
        wide = [None if t is None else t.detach().double().requires_grad_() for t in leaves(*shapes, dtype=dtype)]
        exact = run_with_gradients(literal, wide)
        same = run_with_gradients(literal, leaves(*shapes, dtype=dtype))
        got = run_with_gradients(function, leaves(*shapes, dtype=dtype))
        for index, (g, s, e) in enumerate(zip(got, same, exact, strict=True)):
            assert_within_budget(g, s, e, f"{dtype} tensor {index}")


def check_layouts(function: Callable, *shapes: tuple[int, ...] | None) -> None:
    """The same values whatever the strides of the first argument, and NHWC memory out."""
    x, *rest = [None if t is None else t.detach() for t in leaves(*shapes, dtype=torch.float32)]
    want = function(x, *rest)
    strided = torch.stack([x, x], -1)[..., 0]
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    for view in (x.contiguous(memory_format=torch.channels_last), strided, transposed):
        got = function(view, *rest)
        for a, b in zip(got if isinstance(got, tuple) else (got,), want if isinstance(want, tuple) else (want,)):
            assert torch.equal(a, b)
            if a.dim() == 4:
                assert a.is_contiguous(memory_format=torch.channels_last)


def check_gradients(function: Callable, *shapes: tuple[int, ...] | None) -> None:
    """Numerical against analytical gradients in float64, in every combination of needed inputs that matters; each
    along a random direction, for :func:`check_against_literal` compares every element."""
    tensors = leaves(*shapes)
    assert torch.autograd.gradcheck(function, tensors, fast_mode=True)
    for index, tensor in enumerate(tensors):
        if tensor is not None:
            alone = [t if t is None or i == index else t.detach() for i, t in enumerate(tensors)]
            assert torch.autograd.gradcheck(function, alone, fast_mode=True)


def check_compiles(function: Callable, *shapes: tuple[int, ...] | None) -> None:
    """``torch.compile(fullgraph=True)`` gives the eager values and gradients."""
    torch.compiler.reset()  # partial functions share one code object, whose recompilations over all tests are limited
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    eager = run_with_gradients(function, leaves(*shapes))
    for a, b in zip(run_with_gradients(compiled, leaves(*shapes)), eager, strict=True):
        assert torch.equal(a, b)


def check_registration(operator, *arguments) -> None:
    """``torch.library.opcheck`` of a registered operator for float32 tensors."""
    torch.library.opcheck(operator, arguments)
