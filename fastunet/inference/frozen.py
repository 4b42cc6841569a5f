"""Inference with everything prepared that does not change from call to call.

On a CUDA device a frozen network replays one CUDA graph per input shape, so that a call costs one launch; on a CPU it
multiplies by weights packed once, or lets OpenVINO run it. Where none applies it runs the model as it is.
"""

from __future__ import annotations

import copy
import functools
import importlib
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastunet.arguments import checked
from fastunet.blocks import leaves_nchw, nchw
from fastunet.dispatch import autocasts, settings, triton_installed
from fastunet.functional import _onednn
from fastunet.functional.segmentation_head import finish
from fastunet.inference import bounds, frozen_cpu, frozen_openvino

ENGINES = "fastunet", "openvino"
_PACKED = 2
"""Shapes of images that have their own packed weights: full batches, and what is left of them."""


@checked
class FrozenUNet(torch.nn.Module):
    """Inference of a :class:`fastunet.UNet` in evaluation mode; made by :meth:`fastunet.UNet.freeze`.

    A parameter that was changed in place (an optimiser's step, ``load_state_dict``) or replaced is noticed at the next
    call, and what was prepared from it is made again. What leaves no trace in PyTorch is not: ``tensor.data[...] = …``,
    changes of parameters that were made in inference mode, a CUDA graph of the user's own that trains. Call
    :meth:`refresh` after them. Several threads, and streams of a GPU, may call one frozen network at once.

    Parameters that are computed (parametrisations), and a part in training mode, such as dropout for Monte Carlo
    samples, run in each call as in the model: nothing is prepared then.

    A copy, or a pickle, holds the model and prepares its own. What ``torch.export`` and ``torch.compile`` see is the
    model itself, without gradients.

    Args:
        model: the network; it is not copied, and not switched to evaluation mode.
        graphs: how many input shapes keep a CUDA graph; the least recently used is dropped. They share the memory of
            their largest forward pass. Under autocast a copy of the model in its dtype is kept, too. On a CPU the
            last two shapes keep packed copies of the weights.
        engine: "fastunet", or "openvino" for OpenVINO on a CPU in float32 (``pip install 'fastunet[openvino]'``). The
            first call of each shape then takes seconds, and ``graphs`` shapes keep a compiled network.

    Raises:
        ValueError: an argument outside its range; OpenVINO is not installed; (a call) what OpenVINO is not for here:
            other dtypes, autocast, other devices. Where something hangs on a block, or a sum may overflow, the model
            runs, as without it.
    """

    model: Any  # a fastunet.UNet, which this module cannot import

    def __init__(self, model: torch.nn.Module, graphs: int = 8, engine: str = "fastunet"):
        if graphs < 1:
            raise ValueError(f"graphs is {graphs}; expected at least 1")
        if engine not in ENGINES:
            raise ValueError(f"engine is {engine!r}; expected one of {', '.join(ENGINES)}")
        if engine == "openvino":
            frozen_openvino.check_installed()
        super().__init__()
        _count_optimiser_steps()
        self.model = model
        self.graphs, self.engine = graphs, engine
        self._lock = threading.RLock()
        self.refresh()

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenUNet, (self.model, self.graphs, self.engine)

    def refresh(self) -> None:
        """Forgets everything prepared; the next call prepares it again."""
        with self._lock:
            self._state = self._fingerprint()
            # while these aliases live, no other tensor can get the address of one that was replaced
            self._seen = [tensor.detach() for tensor in self._tensors()]
            self._limit: float | None = None
            self._casts: dict[torch.dtype, FrozenUNet] = {}
            self._kept: dict[tuple[Any, ...], Any] = {}
            self._graphs: OrderedDict[tuple[Any, ...], Any] = OrderedDict()
            self._memory: _Memory | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits (N, num_classes, H', W') of images (N, in_channels, H, W)."""
        return self._infer(x, "logits")

    def predict_proba(self, x: torch.Tensor) -> torch.Tensor:
        """Class probabilities (N, num_classes, H', W')."""
        return self._infer(x, "probabilities")

    def predict(self, x: torch.Tensor) -> torch.Tensor:
        """Labels (N, H', W') uint8."""
        return self._infer(x, "labels")

    def predict_regions(self, x: torch.Tensor) -> torch.Tensor:
        """The last region found, (N, H', W') uint8, as :meth:`fastunet.UNet.predict_regions`."""
        return self._infer(x, "regions")

    def _infer(self, x: torch.Tensor, output: str) -> torch.Tensor:
        result: torch.Tensor = self._inferred(x, output)
        plain = result.dim() == 4 and leaves_nchw(x, self.model._first_weight())
        return nchw(result) if plain else result

    @torch.no_grad()
    def _inferred(self, x: torch.Tensor, output: str) -> Any:
        if self.model.training:
            raise RuntimeError("a frozen network needs its model in evaluation mode: call model.eval()")
        if self.model.runs_apart():  # what hangs on a module must run, in each call
            return self.model.infer(x, output)
        if torch.compiler.is_compiling() or self._moves():
            return self.model._run(x, output)
        height, width = self.model._check(x)
        weight = self.model.head.weight
        if self.engine == "openvino":
            frozen_openvino.check_operands(x, weight)
            logits = self._prepared(lambda: self._by_openvino(self.model._pad(x))) if x.numel() else None
            return self.model._run(x, output) if logits is None else finish(logits, output)[..., :height, :width]
        kind, style = x.device.type, self.model.architecture
        if autocasts(kind) and not style.is_classic:  # norms keep float32
            return self.model._run(x, output)
        if autocasts(kind) and torch.float64 not in (x.dtype, weight.dtype):
            dtype = torch.get_autocast_dtype(kind)
            cast = self._prepared(lambda: self._casts.get(dtype) or self._cast(dtype))
            with torch.autocast(kind, enabled=False):
                return cast._infer(x.to(dtype), output)
        if x.is_cuda and x.numel() and not torch.cuda.is_current_stream_capturing():
            # one after the other: the graphs share their memory
            return self._prepared(lambda: self._graph(x, output)(x))
        packed = x.dtype == weight.dtype and _onednn.packs(x)
        if self.model.backend == "triton" or not packed:
            return self.model._run(x, output)
        padded = self.model._pad(x)
        result = self._prepared(lambda: self._packed(padded)).run(padded, output)
        return self.model._run(x, output) if result is None else result[..., :height, :width]

    def _prepared(self, get: Callable[[], Any]) -> Any:
        """What ``get`` gives, by one thread at a time and of the parameters as they are; what it makes will be kept,
        so it must be no tensor of inference mode, whatever the caller's mode is."""
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if self._fingerprint() != self._state:
                self.refresh()
            return get()

    def _packed(self, x: torch.Tensor) -> frozen_cpu.PackedNetwork:
        """The network packed for images like ``x``."""

        def make() -> frozen_cpu.PackedNetwork:
            if self._limit is None:
                self._limit = bounds.largest_images(self.model, frozen_cpu.PIXELS)
            return frozen_cpu.PackedNetwork(self.model, (len(x), *x.shape[2:]), self._limit, self._kept)

        key = x.shape, torch.get_num_threads(), _onednn.may_round_operands()
        network: frozen_cpu.PackedNetwork = self._recent(key, make, _PACKED)
        return network

    def _cast(self, dtype: torch.dtype) -> FrozenUNet:
        """The network with its weights cast once to what autocast would cast them to in each call."""
        self._casts[dtype] = FrozenUNet(copy.deepcopy(self.model).requires_grad_(False).to(dtype), self.graphs)
        return self._casts[dtype]

    def _moves(self) -> bool:
        """Whether something in the model may act differently in each call and leave no trace: a part that trains by
        itself, such as dropout, and parameters that are computed, or kept where PyTorch does not list them."""
        parts = [module.__dict__ for module in self.model.modules()]
        return any(d["training"] or "parametrizations" in d["_modules"] or "weight" in d or "bias" in d for d in parts)

    def _tensors(self) -> list[torch.Tensor]:
        """Parameters and buffers, shared ones more than once."""
        held = [tensors for m in self.model.modules() for tensors in (m._parameters, m._buffers)]
        return [tensor for tensors in held for tensor in tensors.values() if tensor is not None]

    def _fingerprint(self) -> tuple[Any, ...]:
        """What changes when a parameter is written in place or replaced, and nothing that needs the device."""
        return tuple((t.data_ptr(), None if t.is_inference() else t._version, t.dtype) for t in self._tensors())

    def _graph(self, x: torch.Tensor, output: str) -> _Graph:
        """The graph of ``x``'s shape under the settings that a captured pass cannot follow any more."""

        def make() -> _Graph:
            self._memory = self._memory or _Memory(torch.cuda.graph_pool_handle())
            return _Graph(lambda images: self._run_kept(images, output), x, self._memory)

        key = x.shape, x.dtype, x.device, output, self.model.backend, settings()
        graph: _Graph = self._recent(key, make)
        return graph

    def _by_openvino(self, x: torch.Tensor) -> torch.Tensor | None:
        """Logits, or None if a sum may overflow."""
        key = x.shape, torch.get_num_threads()
        network = self._recent(key, lambda: frozen_openvino.CompiledNetwork(self.model, x))
        return network(x) if network.within(x) else None

    def _recent(self, key: tuple[Any, ...], make: Callable[[], Any], most: int | None = None) -> Any:
        """What is kept for ``key``, made if it is not; the least recently used makes room where ``most`` are kept."""
        if key not in self._graphs:
            while len(self._graphs) >= (most or self.graphs):
                self._graphs.popitem(last=False)
            self._graphs[key] = make()
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _run_kept(self, images: torch.Tensor, output: str) -> Any:
        """The forward pass with the weights reordered for the kernels once: what is captured does not do it again."""
        if not triton_installed():
            return self.model._run(images, output)
        with importlib.import_module("fastunet.kernels._weights").keeping(self._kept):
            return self.model._run(images, output)


@dataclass
class _Memory:
    """What graphs share that never run at once: their pool, and the end of its last use on whatever stream."""

    pool: Any
    done: torch.cuda.Event | None = None

    def wait(self, stream: torch.cuda.Stream) -> None:
        if self.done is not None:
            stream.wait_event(self.done)


class _Graph:
    """One captured forward pass with its own input; a call's result is copied out of the shared memory."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, memory: _Memory):
        self.memory = memory
        memory.wait(torch.cuda.current_stream(x.device))
        self.input = torch.empty_like(x, memory_format=torch.channels_last).copy_(x)
        stream = torch.cuda.Stream(x.device)
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.device(x.device), torch.cuda.stream(stream):
            # Compiles the kernels and lets cuDNN choose before anything is recorded.
            for _ in range(2):
                function(self.input)
            self.graph = torch.cuda.CUDAGraph()
            # other threads go on allocating while this one captures
            with torch.cuda.graph(self.graph, pool=memory.pool, stream=stream, capture_error_mode="thread_local"):
                self.output = function(self.input)
        torch.cuda.current_stream(x.device).wait_stream(stream)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        stream = torch.cuda.current_stream(x.device)
        self.memory.wait(stream)
        self.input.copy_(x)
        self.graph.replay()
        result = self.output.clone()
        self.memory.done = stream.record_event()
        return result


@functools.cache
def _count_optimiser_steps() -> None:
    """From now on a step of any optimiser leaves its trace: fused ones write parameters without counting it."""

    def count(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"] if not p.is_inference()]
        if not torch.compiler.is_compiling():
            torch.autograd.graph.increment_version(parameters)

    register_optimizer_step_post_hook(count)
