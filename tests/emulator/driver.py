"""A Triton driver under which compiled kernels start as usual, on CPU tensors, and run in the emulator.

Compilation stops at PTX: the last stage, ``make_cubin``, passes the text on, and ``load_binary`` gets it. The backend's
hash says so, so that such "binaries" never meet real ones in Triton's cache.
"""

from __future__ import annotations

import contextlib
import functools
import re
import sys
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import triton
from triton.backends.nvidia import compiler
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction

from bench.gpu.host_driver import HostDriver
from fastunet import dispatch
from fastunet.kernels import _launch, _plan

from .bulk_copies import TensorMap
from .compiler import Program
from .launch import Emulator
from .parser import parse

_OLD = not hasattr(nvidia, "wrap_handle_tensordesc_impl")
"""Triton 3.6, which passes arguments flat, and one flag less with a descriptor before sm_90."""


class EmulatorDriver(HostDriver):
    """``emulator`` runs what is launched, compiled for compute capability ``architecture`` / 10."""

    def __init__(self, architecture: int, emulator: Emulator):
        super().__init__(architecture, self._run)
        self.emulator = emulator
        self.programs: list[Any] = [None]
        self.utils.load_binary = self._load
        self.utils.fill_tma_descriptor = self.utils.fill_tma_descriptor_tiled = _tensor_map

    def _load(self, name, binary, shared, device):
        text = binary.decode() if isinstance(binary, bytes) else binary
        self.programs.append(Program(parse(text)))
        return len(self.programs), len(self.programs) - 1, 64, 0, 1024

    def _run(self, function, *arguments, num_warps, shared, grid):
        self.emulator.run(self.programs[function], grid, list(arguments), num_warps, shared)

    def _launcher(self, source, metadata):
        launcher = super()._launcher(source, metadata)
        signature = dict(source.signature)

        def launch(gx, gy, gz, stream, function, cooperative, pdl, *rest):
            if _OLD:
                scratch, profile, _, _, _, _, *arguments = rest
            else:
                _, _, _, _, scratch, profile, _, _, arguments = rest
            flat = [*_flatten(signature.values(), iter(arguments)), scratch or 0, profile or 0]
            self._run(function, *flat, num_warps=metadata.num_warps, shared=metadata.shared, grid=(gx, gy, gz))

        launcher.launch = nvidia.wrap_handle_tensordesc(launch, signature, getattr(metadata, "tensordesc_meta", None))
        return launcher


def _tensor_map(address, swizzle, element_size, element_type, box, shape, strides, padding) -> TensorMap:
    return TensorMap(address, swizzle, element_size, tuple(box), tuple(shape), tuple(strides), padding)


def _flatten(signature: Any, values: Iterator[Any]) -> list[Any]:
    """The arguments that reach the GPU, in order: constexprs dropped, tuples flattened, descriptors expanded.

    A descriptor has become a tensor map, shape and strides, or before sm_90 what Triton's ``decompose_descriptor``
    makes: an address, shape and strides, flags, shape and strides.
    """
    out: list[Any] = []
    for kind in signature:
        if isinstance(kind, (tuple, list)):
            out += _flatten(kind, iter(next(values)))
            continue
        value = next(values)
        if kind != "constexpr":
            out.append(value.data_ptr() if isinstance(value, _plan._Address) else value)
        if isinstance(kind, str) and kind.startswith("tensordesc"):
            rank = re.search(r"\[([^\]]*)\]", kind)[1].count(",") + 1
            more = 2 * rank if isinstance(value, TensorMap) else 4 * rank + (1 if _OLD else 2)
            out += [next(values) for _ in range(more)]
    return out


def _only_ptx(self, source, *rest):
    return source.encode() if isinstance(source, str) else source


def _remembering(emulator: Emulator, run):
    """``_Plan.run`` that tells the emulator which tensors a repeated launch has: its arguments are addresses."""

    def call(plan, inputs):
        with _plan._Operations() as operations:
            emulator.operands = inputs, operations.allocated
            return run(plan, inputs)

    return call


def _yes() -> bool:
    """No mock object: Dynamo traces through it."""
    return True


def _forget_compiled() -> None:
    """A kernel keeps the driver under which it was compiled, and a plan its kernels."""
    for name, module in list(sys.modules.items()):
        if name.startswith("fastunet.kernels"):
            for value in vars(module).values():
                if isinstance(value, JITFunction):
                    value.device_caches.clear()
    for operator in dispatch.OPERATORS.values():
        operator.launcher.cache_clear()


@contextlib.contextmanager
def emulated(architecture: int, emulator: Emulator) -> Iterator[Emulator]:
    """Inside, kernels are compiled for compute capability ``architecture`` / 10 and run in ``emulator``."""
    previous = triton.runtime.driver._active
    hashed = compiler.CUDABackend.hash
    marked = functools.lru_cache(lambda self: hashed(self) + "-ptx")
    capability = divmod(architecture, 10)
    with (
        mock.patch.multiple(torch.cuda, current_device=lambda: 0, get_device_name=lambda index: "none",
                            get_device_capability=lambda index=None: capability),
        mock.patch.multiple(compiler.CUDABackend, make_cubin=_only_ptx, hash=lambda self: marked(self)),
        mock.patch.object(_plan._Plan, "run", _remembering(emulator, _plan._Plan.run)),
        mock.patch.object(dispatch, "triton_interpreted", _yes),  # which lets kernels take CPU tensors
    ):  # fmt: skip
        triton.runtime.driver.set_active(EmulatorDriver(architecture, emulator))
        _forget_compiled()
        _launch._state.capabilities.clear()
        try:
            yield emulator
        finally:
            _forget_compiled()
            _launch._state.capabilities.clear()
            triton.runtime.driver._active = previous
