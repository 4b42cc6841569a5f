"""Convolutions in float32 whose sums add one product after another, as a kernel's do along its reduction.

The error of a float32 sum depends on its order. BLAS and cuDNN sum in blocks whose sizes differ between processors and
make the error of a long sum smaller by some factor. A budget from PyTorch alone would hold a kernel to the machine's
blocks; :func:`farthest` takes the greater error of that and of the plain order, on the same operands.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """(M, K) × (..., K, L), one k after another."""
    total = torch.zeros(*b.shape[:-2], a.shape[0], b.shape[-1], dtype=a.dtype, device=a.device)
    for k in range(a.shape[1]):
        total += a[:, k, None] * b[..., k, None, :]
    return total


class _Conv2d(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, padding):
        ctx.save_for_backward(x, weight)
        ctx.padding = padding
        side = weight.shape[2]
        height, width = (length + 2 * padding - side + 1 for length in x.shape[2:])
        return product(weight.flatten(1), F.unfold(x, side, padding=padding)).unflatten(-1, (height, width))

    @staticmethod
    def backward(ctx, dz):
        (x, weight), padding = ctx.saved_tensors, ctx.padding
        side, flipped = weight.shape[2], weight.flip(2, 3).transpose(0, 1).flatten(1)
        dx = product(flipped, F.unfold(dz, side, padding=side - 1 - padding)).view(x.shape)
        pixels = F.unfold(x, side, padding=padding).transpose(1, 2).flatten(0, 1)
        return dx, product(dz.transpose(0, 1).flatten(1), pixels).view(weight.shape), None


def conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, padding: int = 0) -> torch.Tensor:
    """``F.conv2d`` of a square kernel, forward and both gradients."""
    y = _Conv2d.apply(x.contiguous(), weight.contiguous(), padding)
    return y if bias is None else y + bias[:, None, None]


def farthest(exact: torch.Tensor, *results: torch.Tensor) -> torch.Tensor:
    """Of ``results`` the one with the greatest error."""
    if exact.numel() == 0:
        return results[0]
    return max(results, key=lambda result: (result.double() - exact).abs().max().item())
