"""Memory of one call: the peak of what it allocates, and what autograd keeps for the backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory in use during ``call`` beyond what was there before it; on a CPU that of PyTorch's allocator."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    steps = (e.nbytes() for e in sorted(events, key=lambda e: e.start_ns()))
    return max(itertools.accumulate(steps), default=0)


def saved_bytes(call: Callable[[], object], known: Iterable[torch.Tensor]) -> int:
    """Bytes of the distinct tensors that autograd keeps during ``call``; ``known`` (parameters, inputs) count nothing.

    Views of one storage count once, with the whole storage, which they keep alive.
    """
    known_storages = {t.untyped_storage().data_ptr() for t in known}
    kept: dict[int, int] = {}
    alive = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known_storages:
            kept[storage.data_ptr()] = storage.nbytes()
            # a storage freed meanwhile could lend its address to another one
            alive.append(storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call()
    return sum(kept.values())
