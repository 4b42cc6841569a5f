"""One training step: forward, loss, backward, optimiser; as one CUDA graph where there is a CUDA device."""

from __future__ import annotations

from collections.abc import Callable

import torch

_WARM_UP = 3
"""Real steps before a capture: kernels compile, cuDNN chooses, the optimiser makes its state."""


class TrainingStep:
    """Calls of ``step(images, labels)`` train ``model`` and return the loss, a tensor without gradient.

    On a CUDA device the first three calls with a shape run as they are; from the fourth on the whole step is one CUDA
    graph, replayed for inputs of that shape. Another shape starts over with its own graph. Elsewhere every call runs as
    it is. The loss must not read values back to the host, and the learning rate of a captured step is the one that the
    optimiser holds as a tensor.

    Args:
        model: in training mode.
        loss: ``loss(logits, labels)``, a scalar.
        optimizer: on a CUDA device it must be capturable (``torch.optim.Adam(…, capturable=True)``).
        precision: autocast dtype for the forward pass and the loss, or None.

    Raises:
        ValueError: the optimiser is not capturable and the model is on a CUDA device.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
        optimizer: torch.optim.Optimizer,
        *,
        precision: torch.dtype | None = None,
    ):
        self.model, self.loss, self.optimizer, self.precision = model, loss, optimizer, precision
        self._device = next(model.parameters()).device
        if self._device.type == "cuda" and not all(group.get("capturable") for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} cannot be captured: construct it with capturable=True")
        self._calls: dict[tuple, int] = {}
        self._graphs: dict[tuple, tuple] = {}

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return self._step(images, labels)
        key = images.shape, images.dtype, labels.shape, labels.dtype
        if key in self._graphs:
            graph, static_images, static_labels, static_loss = self._graphs[key]
            static_images.copy_(images)
            static_labels.copy_(labels)
            graph.replay()
            return static_loss.clone()
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= _WARM_UP:
            return self._on_a_side_stream(images, labels)
        self._graphs[key] = self._capture(images, labels)
        return self(images, labels)

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, self.precision, enabled=self.precision is not None):
            loss = self.loss(self.model(images), labels)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _on_a_side_stream(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A step as capture will see it: gradients and optimiser state must not belong to the default stream."""
        stream = torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            loss = self._step(images, labels)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return loss

    def _capture(self, images: torch.Tensor, labels: torch.Tensor) -> tuple:
        static_images, static_labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        # Gradients are made inside the graph's own memory, so that replays write where the optimiser reads.
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            static_loss = self._step(static_images, static_labels)
        return graph, static_images, static_labels, static_loss
