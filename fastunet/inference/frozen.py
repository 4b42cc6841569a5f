"""Inference with everything prepared that does not change from call to call.

On a CUDA device a frozen network replays one CUDA graph per input shape, so that a call costs one launch; on a CPU it
multiplies by weights packed once. Where neither applies it runs the model as it is.
"""

from __future__ import annotations

import copy
import importlib
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch

from fastunet.dispatch import triton_installed
from fastunet.inference import frozen_cpu

if TYPE_CHECKING:
    from fastunet.unet import UNet


class FrozenUNet:
    """Inference of a :class:`fastunet.UNet` in evaluation mode; made by :meth:`fastunet.UNet.freeze`.

    A parameter that was changed in place (an optimiser's step, ``load_state_dict``) or replaced is noticed at the next
    call, and what was prepared from it is made again. Changes through ``tensor.data[...] = …`` leave no trace in
    PyTorch: call :meth:`refresh` after them.

    Args:
        model: the network; it is not copied, and not switched to evaluation mode.
        graphs: how many input shapes keep a CUDA graph; the least recently used is dropped. Each keeps the memory of
            one forward pass. Under autocast a copy of the model in its dtype is kept, too.
    """

    def __init__(self, model: UNet, graphs: int = 8):
        if graphs < 1:
            raise ValueError(f"graphs is {graphs}; expected at least 1")
        self.model = model
        self.graphs = graphs
        self.refresh()

    def refresh(self) -> None:
        """Forgets everything prepared; the next call prepares it again."""
        self._state = self._fingerprint()
        self._packed: frozen_cpu.PackedNetwork | None = None
        self._casts: dict[torch.dtype, FrozenUNet] = {}
        self._kept: dict[tuple, Any] = {}
        self._graphs: OrderedDict[tuple, _Graph] = OrderedDict()

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes, H', W') of images (N, in_channels, H, W)."""
        return self._infer(x, "logits")

    def predict_proba(self, x: torch.Tensor) -> torch.Tensor:
        """Class probabilities (N, num_classes, H', W')."""
        return self._infer(x, "probabilities")

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Labels (N, H', W') uint8."""
        return self._infer(x, "labels")

    @torch.no_grad()
    def _infer(self, x: torch.Tensor, output: str) -> torch.Tensor:
        if self.model.training:
            raise RuntimeError("a frozen network needs its model in evaluation mode: call model.eval()")
        if self.model.runs_apart():  # what hangs on a module must run, in each call
            return self.model.infer(x, output)
        height, width = self.model._check(x)
        if self._fingerprint() != self._state:
            self.refresh()
        weight = self.model.head.weight
        if torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype):
            dtype = torch.get_autocast_dtype(x.device.type)
            with torch.autocast(x.device.type, enabled=False):
                return self._cast(dtype)._infer(x.to(dtype), output)
        if x.is_cuda and x.numel() and not torch.cuda.is_current_stream_capturing():
            return self._replay(x, output)
        if self.model.backend == "triton" or x.dtype != weight.dtype or not frozen_cpu.packable(x):
            return self.model._run(x, output)
        x = self.model._pad(x)
        if self._packed is None:
            self._packed = frozen_cpu.PackedNetwork(self.model, *x.shape[2:])
        return self._packed.run(x, output)[..., :height, :width]

    def _cast(self, dtype: torch.dtype) -> FrozenUNet:
        """The network with its weights cast once to what autocast would cast them to in each call."""
        if dtype not in self._casts:
            self._casts[dtype] = FrozenUNet(copy.deepcopy(self.model).requires_grad_(False).to(dtype), self.graphs)
        return self._casts[dtype]

    def _fingerprint(self) -> tuple:
        """What changes when a parameter is written in place or replaced, and nothing that needs the device."""
        return tuple((p.data_ptr(), p._version, p.dtype) for p in self.model.parameters())

    def _replay(self, x: torch.Tensor, output: str) -> torch.Tensor:
        key = x.shape, x.dtype, x.device, output
        if key not in self._graphs:
            while len(self._graphs) >= self.graphs:
                self._graphs.popitem(last=False)
            self._graphs[key] = _Graph(lambda images: self._run_kept(images, output), x)
        self._graphs.move_to_end(key)
        return self._graphs[key](x)

    def _run_kept(self, images: torch.Tensor, output: str) -> torch.Tensor:
        """The forward pass with the weights reordered for the kernels once: what is captured does not do it again."""
        if not triton_installed():
            return self.model._run(images, output)
        with importlib.import_module("fastunet.kernels._weights").keeping(self._kept):
            return self.model._run(images, output)


class _Graph:
    """One captured forward pass with its own input and output memory."""

    def __init__(self, function, x: torch.Tensor):
        self.input = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.device(x.device), torch.cuda.stream(stream):
            # Compiles the kernels and lets cuDNN choose before anything is recorded.
            for _ in range(2):
                function(self.input)
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=stream):
                self.output = function(self.input)
        torch.cuda.current_stream(x.device).wait_stream(stream)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.input.copy_(x)
        self.graph.replay()
        return self.output.clone()
