"""How fast anything could be: bytes and arithmetic of each layer, counted from the list of operator calls."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from fastunet.architecture import Architecture
from fastunet.inspection.layers import Call, network_calls


@dataclass(frozen=True)
class Floor:
    """Work of the layers of a workload: ``parts`` holds (bytes, flop) of each, done one after the other."""

    parts: tuple[tuple[int, int], ...]

    @property
    def bytes(self) -> int:
        """Every tensor that must be read, once, and every one that must be written, once."""
        return sum(size for size, _ in self.parts)

    @property
    def flop(self) -> int:
        """Two per multiply-add."""
        return sum(flop for _, flop in self.parts)

    def seconds(self, copy_gbs: float, matmul_tflops: float) -> float:
        """The sum over layers of the larger of memory and arithmetic time at the given ceilings."""
        return sum(max(size / copy_gbs / 1e9, flop / matmul_tflops / 1e12) for size, flop in self.parts)


def of_calls(calls: Iterable[Call], dtype: torch.dtype) -> Floor:
    """The floor of operator calls, each a layer of its own."""
    return Floor(tuple((call.floor_bytes(dtype), 2 * call.macs) for call in calls))


def of_inference(architecture: Architecture, batch: int, height: int, width: int, output: str,
                 dtype: torch.dtype) -> Floor:
    """The floor of a forward pass to "logits" or "labels", whose last feature map stays in registers."""
    return of_calls(network_calls(architecture, batch, height, width, training=False, output=output), dtype)


def of_training_step(architecture: Architecture, batch: int, height: int, width: int, dtype: torch.dtype) -> Floor:
    """The floor of forward, loss, backward and Adam (which reads p, g, m, v and writes p, m, v in float32)."""
    calls = network_calls(architecture, batch, height, width)
    weights = {call.layer: call.arguments["weight"].shape for call in calls if "weight" in call.arguments}
    biases = {call.layer: call.arguments["bias"].shape for call in calls if "bias" in call.arguments}
    parameters = sum(math.prod(shape) for shape in (*weights.values(), *biases.values()))
    return Floor((*of_calls(calls, dtype).parts, (7 * 4 * parameters, 0)))


def of_loss(batch: int, classes: int, pixels: int, itemsize: int, *, backward: bool) -> Floor:
    """Logits and uint8 labels in once; for the gradient, once more and the gradient out."""
    logits, labels = batch * classes * pixels * itemsize, batch * pixels
    forward = (logits + labels, 0)
    return Floor((forward, (2 * logits + labels, 0)) if backward else (forward,))
