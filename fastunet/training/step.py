"""One training step: forward, loss, backward, optimiser; as one CUDA graph where there is a CUDA device."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from fastunet.arguments import checked
from fastunet.dispatch import settings

_WARM_UP = 3
"""Real steps before a capture: kernels compile, cuDNN chooses, the optimiser makes its state."""


@checked
class TrainingStep:
    """Calls of ``step(images, labels)`` train ``model`` and return the loss, a tensor without gradient.

    On a CUDA device the first three calls with a shape run as they are; from the fourth on the whole step is one CUDA
    graph, replayed for inputs of that shape. Another shape starts over with its own graph, and so does a shape when
    what was captured is no longer so: parameters replaced or frozen, state loaded into the optimiser, an option of its
    groups, ``train()`` or ``eval()``, the loss, the precision, PyTorch's flags. A learning rate that changes in each
    step belongs in a tensor. Elsewhere every call runs as it is. The loss must not read values back to the host.

    Args:
        model: in training mode.
        loss: ``loss(logits, labels)``, a scalar.
        optimizer: on a CUDA device it must be capturable (``torch.optim.Adam(…, capturable=True)``).
        precision: autocast dtype for the forward pass and the loss, or None.

    Raises:
        ValueError: the model has no parameters, or is on a CUDA device and the optimiser is not capturable; an
            optimiser that needs a closure (LBFGS); another precision; in a call, a loss that is no scalar.
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
        parameter = next(model.parameters(), None)
        if parameter is None:
            raise ValueError(f"{type(model).__name__} has no parameters to train")
        self._device = parameter.device
        if self._device.type == "cuda" and not all(group.get("capturable") for group in optimizer.param_groups):
            raise ValueError(f"{type(optimizer).__name__} cannot be captured: construct it with capturable=True")
        closure = inspect.signature(optimizer.step).parameters.get("closure")
        if closure is not None and closure.default is closure.empty:
            raise ValueError(f"{type(optimizer).__name__} computes the loss itself, by a closure: call its step()")
        if precision not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"precision is {precision}; expected torch.float16, torch.bfloat16 or None")
        self._calls: dict[tuple[Any, ...], int] = {}
        self._graphs: dict[tuple[Any, ...], tuple[Any, ...]] = {}
        self._stream: torch.cuda.Stream | None = None

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self._device.type != "cuda":
            return self._step(images, labels)
        key = images.shape, images.dtype, labels.shape, labels.dtype
        if key in self._graphs:
            graph, static_images, static_labels, static_loss, captured = self._graphs[key]
            if captured == self._captured():
                static_images.copy_(images)
                static_labels.copy_(labels)
                graph.replay()
                # the replay wrote them without PyTorch's knowledge, and frozen networks ask
                torch.autograd.graph.increment_version([p for p in self.model.parameters() if p.requires_grad])
                loss: torch.Tensor = static_loss.clone()
                return loss
            del self._graphs[key], self._calls[key]
        self._calls[key] = self._calls.get(key, 0) + 1
        if self._calls[key] <= _WARM_UP:
            return self._on_a_side_stream(images, labels)
        self._graphs[key] = self._capture(images, labels)
        return self(images, labels)

    def _step(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast(self._device.type, self.precision, enabled=self.precision is not None):
            loss = self.loss(self.model(images), labels)
        if not isinstance(loss, torch.Tensor) or loss.ndim or not loss.requires_grad:
            kind = f"of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else type(loss).__name__
            raise ValueError(f"the loss is {kind}; expected a scalar tensor that depends on parameters in training")
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def _on_a_side_stream(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """A step as capture will see it: gradients and optimiser state must not belong to the default stream."""
        stream = self._stream = self._stream or torch.cuda.Stream(self._device)
        stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(stream):
            loss = self._step(images, labels)
        torch.cuda.current_stream(self._device).wait_stream(stream)
        return loss

    def _capture(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[Any, ...]:
        static_images, static_labels = images.clone(), labels.clone()
        graph = torch.cuda.CUDAGraph()
        # Gradients are made inside the graph's own memory, so that replays write where the optimiser reads.
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            static_loss = self._step(static_images, static_labels)
        return graph, static_images, static_labels, static_loss, self._captured()

    def _captured(self) -> tuple[Any, ...]:
        """What a replay takes for granted."""
        tensors = [t for state in self.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        options = [(name, value.data_ptr() if isinstance(value, torch.Tensor) else value)
                   for group in self.optimizer.param_groups for name, value in group.items() if name != "params"]
        groups = [(p.data_ptr(), p.requires_grad) for group in self.optimizer.param_groups for p in group["params"]]
        parameters = [(p.data_ptr(), p.requires_grad) for p in self.model.parameters()]
        modes = [module.training for module in self.model.modules()]
        return (self.loss, self.precision, self.optimizer, modes, parameters, groups, options,
                [t.data_ptr() for t in tensors], settings())  # fmt: skip
