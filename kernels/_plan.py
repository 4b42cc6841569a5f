"""Repeated calls of a launcher without its Python: the first call's launches with the new call's pointers.

A launcher spends far more time on choosing a configuration, on views and on packing arguments than a small kernel runs.
All of that follows from the shapes, strides, dtypes and alignments of its operands, so it is done once for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.tools.tensor_descriptor import TensorDescriptor

from . import _launch, _tuned

_aten = torch.ops.aten
_ALLOCATIONS = frozenset((_aten.empty.memory_format, _aten.empty_strided.default))
_VIEWS = frozenset((
    _aten.alias.default, _aten.as_strided.default, _aten.detach.default, _aten.expand.default, _aten.permute.default,
    _aten.select.int, _aten.slice.Tensor, _aten.squeeze.dim, _aten.transpose.int, _aten.unsqueeze.default,
    _aten.view.default,
))  # fmt: skip
_hooks = triton.knobs.runtime
_PROVEN = (3, 6) <= tuple(int(n) for n in triton.__version__.split(".")[:2]) <= (3, 9)
"""Triton's inner launch differs from version to version; on one that was not proven every call runs its launcher."""
_NEW: Any = object()
_MOST_PLANS = 4096
"""Of one launcher: images of ever new sizes must not fill the memory."""


def planned(launcher: Callable[..., Any]) -> Callable[..., Any]:
    """``launcher``, whose later calls with operands alike repeat the launches of the first.

    A call that does more than allocate, take views and launch (a copy into channels_last memory, say) is never
    repeated this way, nor is one that is recorded, searched for a configuration, or interpreted.
    """
    if not _PROVEN:
        return launcher
    plans: dict[tuple, _Plan | None] = {}

    @functools.wraps(launcher)
    def call(*operands: Any) -> Any:
        knobs = triton.knobs
        if _launch.observed() or _tuned.observed() or knobs.runtime.debug or knobs.compilation.instrumentation_mode:
            return launcher(*operands)
        tensors = [a for a in operands if isinstance(a, torch.Tensor)]
        key = (tuple([_alike(a) for a in operands]), _launch.tf32())
        plan = plans.get(key, _NEW)
        if plan is None or (plan is not _NEW and plan.hooked()):
            return launcher(*operands)
        if plan is not _NEW:
            return plan.run(tensors)
        result, plan = _traced(launcher, operands, tensors)
        if len(plans) >= _MOST_PLANS:
            plans.clear()
        plans[key] = plan
        return result

    return call


def _alike(operand: Any) -> Any:
    """What a launcher may look at: everything of a tensor but its contents and address."""
    if isinstance(operand, torch.Tensor):
        return operand.shape, operand.stride(), operand.dtype, operand.device, operand.data_ptr() % 16
    return type(operand), operand  # 1 == True == 1.0


@dataclass(frozen=True)
class _Slot:
    """Argument ``position`` is the address of byte ``offset`` of tensor ``source``, inputs counted first."""

    position: int
    source: int
    offset: int


@dataclass
class _DescriptorSlot:
    """The same for a descriptor of that address; the last is kept, for an allocator hands out few addresses again."""

    position: int
    source: int
    offset: int
    last: tuple[int, TensorDescriptor]

    def at(self, address: int) -> TensorDescriptor:
        last = self.last  # read once: another thread may replace it
        if last[0] == address:
            return last[1]
        moved = _moved(last[1], address)
        self.last = address, moved
        return moved


def _moved(descriptor: TensorDescriptor, address: int) -> TensorDescriptor:
    """``descriptor`` of another address, made without the constructor, whose checks the first call has passed."""
    moved = object.__new__(TensorDescriptor)
    moved.__dict__.update(descriptor.__dict__, base=_Address(address))
    return moved


class _Address:
    """The part of a tensor that a descriptor's encoder asks for."""

    __slots__ = ("address",)

    def __init__(self, address: int):
        self.address = address

    def data_ptr(self) -> int:
        return self.address


class _Start:
    """A compiled kernel on a grid, with all arguments but the addresses."""

    def __init__(self, started: _launch.Started, slots: list[_Slot | _DescriptorSlot]):
        compiled, self._grid = started.compiled, (*started.grid, 1, 1)[:3]
        self.kernel = started.kernel
        self._hooked, self._run = compiled[self._grid], compiled.run
        self._function, self._metadata = compiled.function, compiled.packed_metadata
        self._arguments = [None if _has_address(value) else value for value in started.arguments]
        self._pointers = [(s.position, s.source, s.offset) for s in slots if not isinstance(s, _DescriptorSlot)]
        self._descriptors = [s for s in slots if isinstance(s, _DescriptorSlot)]

    def __call__(self, stream: int, addresses: list[int]) -> None:
        arguments = self._arguments.copy()
        for position, source, offset in self._pointers:
            arguments[position] = addresses[source] + offset
        for slot in self._descriptors:
            arguments[slot.position] = slot.at(addresses[slot.source] + slot.offset)
        if _hooks.launch_enter_hook.calls or _hooks.launch_exit_hook.calls:
            self._hooked(*arguments, stream=stream)
        else:
            self._run(*self._grid, stream, self._function, self._metadata, None, None, None, *arguments)


@dataclass(frozen=True)
class _Result:
    """Tensor ``made`` of those allocated, or the ``view`` (shape, strides, offset) of it."""

    made: int
    view: tuple | None


@dataclass(frozen=True)
class _Plan:
    """``made`` are (shape, strides, dtype, device) of the tensors to allocate; ``single``: one result, no tuple."""

    made: list[tuple]
    starts: list[_Start]
    results: list[_Result]
    single: bool

    def hooked(self) -> bool:
        """Whether a kernel has hooks that must see the arguments of each launch."""
        return any(start.kernel.pre_run_hooks for start in self.starts)

    def run(self, inputs: list[torch.Tensor]) -> Any:
        made = [torch.empty_strided(shape, strides, dtype=dtype, device=device)
                for shape, strides, dtype, device in self.made]  # fmt: skip
        addresses = [t.data_ptr() for t in inputs]
        addresses += [t.data_ptr() for t in made]
        if self.starts:
            driver = triton.runtime.driver.active
            stream = driver.get_current_stream(driver.get_current_device())
            for start in self.starts:
                start(stream, addresses)
        results = [made[r.made] if r.view is None else made[r.made].as_strided(*r.view) for r in self.results]
        return results[0] if self.single else tuple(results)


class _Operations(TorchDispatchMode):
    """Collects allocations, and whether anything ran that a plan does not repeat."""

    def __init__(self):
        super().__init__()
        self.allocated: list[torch.Tensor] = []
        self.repeatable = True

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function in _ALLOCATIONS:
            self.allocated.append(result)
        elif function not in _VIEWS:
            self.repeatable = False
        return result


def _traced(launcher: Callable, operands: tuple, tensors: list[torch.Tensor]) -> tuple[Any, _Plan | None]:
    """The launcher's result, and how to repeat it, if it can be."""
    with _Operations() as operations, _launch.tracing() as started:
        result = launcher(*operands)
    if not operations.repeatable:
        return result, None
    known = [*tensors, *operations.allocated]
    sources = {t.untyped_storage()._cdata: i for i, t in enumerate(known)}
    if len(sources) < len(known):  # two operands of one storage: an address would be ambiguous
        return result, None
    starts = []
    for start in started:
        slots = [_slot(i, value, known, sources) for i, value in enumerate(start.arguments) if _has_address(value)]
        if None in slots:  # a tensor that was made some other way
            return result, None
        starts.append(_Start(start, slots))
    made = [_layout(t) for t in operations.allocated]
    results = []
    for tensor in result if isinstance(result, tuple) else (result,):
        index = sources.get(tensor.untyped_storage()._cdata, -1) - len(tensors)
        if index < 0 or tensor.dtype != made[index][2]:  # an operand itself, or one type seen as another
            return result, None
        view = None if _layout(tensor) == made[index] else (tensor.shape, tensor.stride(), tensor.storage_offset())
        results.append(_Result(index, view))
    return result, _Plan(made, starts, results, not isinstance(result, tuple))


def _layout(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device


def _has_address(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, TensorDescriptor))


def _slot(position: int, value: Any, known: list[torch.Tensor],
          sources: dict[int, int]) -> _Slot | _DescriptorSlot | None:
    """Where the address in argument ``position`` comes from; None if not from a known tensor."""
    tensor = value.base if isinstance(value, TensorDescriptor) else value
    source = sources.get(tensor.untyped_storage()._cdata)
    if source is None:
        return None
    where = position, source, tensor.data_ptr() - known[source].data_ptr()
    if tensor is value:
        return _Slot(*where)
    return _DescriptorSlot(*where, (-1, _moved(value, -1)))  # without the tensor, whose memory it would keep
