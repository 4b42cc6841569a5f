"""What is measured: a :class:`Workload` holds random operands, the code of every rival form, and the exact result."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.measuring.floors import Floor
from bench.workloads.variants import Variant
from fastunet.inspection.repeats import Function


@dataclass(frozen=True)
class Workload:
    """One thing that several variants compute.

    ``operands(device, seed)`` draws fresh tensors in the stored dtype. ``build(variant, device)`` makes the function
    of those operands that a variant runs; it may be called any number of times and always returns the same results.
    ``exact(*operands)`` computes them in float64, with logits in place of labels. ``depth`` counts the layers in a row.
    """

    subject: str
    step: str
    shape: str
    batch: int
    precision: str
    floor: Floor
    depth: int
    variants: tuple[Variant, ...]
    operands: Callable[[torch.device, int], list[torch.Tensor]]
    build: Callable[[Variant, torch.device], Function]
    exact: Callable[..., tuple[torch.Tensor, ...]]
    without: tuple[tuple[str, str], ...] = ()
    """(variant name, reason) of those that are left out of a quick run."""

    @property
    def name(self) -> str:
        """A readable identity, also that of the benchmark test."""
        return f"{self.subject} {self.step} {self.shape} {self.precision}"

    def why_not(self, variant: Variant, device: torch.device) -> str | None:
        """Why a variant is not run on ``device``, or None."""
        return dict(self.without).get(variant.name) or variant.why_not(device)

    @property
    def differentiates(self) -> bool:
        """Whether the step has a backward pass."""
        return self.step in ("forward + backward", "training step")


def random_like_activations(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device,
                            generator: torch.Generator, *, relu: bool) -> torch.Tensor:
    """Normal values, negative ones zeroed if ``relu``: what a layer inside a network reads. Never all zeros."""
    x = torch.randn(shape, generator=generator, device=device)
    return (x.relu_() if relu else x).to(dtype)


def forward_and_backward(forward: Function, operands: tuple[torch.Tensor, ...], cotangents: list[torch.Tensor],
                         needs_grad: list[bool]) -> tuple[torch.Tensor, ...]:
    """The results of ``forward`` and the gradients of the operands that need one."""
    leaves = [x.detach().requires_grad_(needed) for x, needed in zip(operands, needs_grad)]
    results = forward(*leaves)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    gradients = torch.autograd.grad(results, wanted, cotangents)
    return (*(result.detach() for result in results), *gradients)
