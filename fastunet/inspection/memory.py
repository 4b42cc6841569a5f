"""How much memory a forward pass holds at once, measured on tensors without data."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that operators allocate while the mode is on.

    Attributes:
        total: bytes of all storages, as if none were ever freed.
        peak: most bytes alive at one time.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.total = self.peak = self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(tensor, torch.Tensor):
                self._known.add(tensor.untyped_storage()._cdata)
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        self._live += storage.nbytes()
        self.total += storage.nbytes()
        self.peak = max(self.peak, self._live)
        weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())

    def _free(self, identity: int, size: int) -> None:
        self._known.discard(identity)
        self._live -= size


def inference_bytes(run: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor) -> tuple[int, int]:
    """``(peak, total)`` bytes that ``run(x)`` allocates without gradients; ``run`` and ``x`` may be on "meta"."""
    with torch.no_grad(), LiveBytes() as count:
        run(x)
    return count.peak, count.total
