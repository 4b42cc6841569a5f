"""The error budget of every numerical test: it comes from PyTorch's own error in the same dtype, not from a guess."""

from __future__ import annotations

from collections.abc import Callable

import torch

OBSERVERS: list[Callable[[str, torch.dtype, float, float], None]] = []
"""Called with name, dtype, error and budget of each comparison."""
EPSILON: dict[torch.dtype, float] = {}
"""Instead of a dtype's own; float32's where the products are tf32, which PyTorch's results on a CPU are not."""


def assert_within_budget(actual: torch.Tensor, same_dtype: torch.Tensor, exact: torch.Tensor, name: str = "") -> None:
    """Asserts ``max|actual - exact| <= 2 max|same_dtype - exact| + 2 eps max|exact|``.

    ``same_dtype`` is PyTorch's result in the dtype under test, ``exact`` the float64 reference. NaN never passes.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    assert same_dtype.dtype == actual.dtype, f"{name}: dtype {actual.dtype}, expected {same_dtype.dtype}"
    exact = exact.detach().double().cpu()
    if exact.numel() == 0:
        return
    error = (actual.detach().double().cpu() - exact).abs().max().item()
    torch_error = (same_dtype.detach().double().cpu() - exact).abs().max().item()
    budget = 2 * torch_error + 2 * EPSILON.get(actual.dtype, torch.finfo(actual.dtype).eps) * exact.abs().max().item()
    for observer in OBSERVERS:
        observer(name, actual.dtype, error, budget)
    message = f"{name}: maximum error {error:.3e} exceeds the budget {budget:.3e} (PyTorch: {torch_error:.3e})"
    assert error <= budget, message
