"""One process or several: everything the training loop needs to know about its place in a ``torchrun`` group."""

from __future__ import annotations

import contextlib
import importlib
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastunet.errors import UserError, said_once


@dataclass(frozen=True)
class Processes:
    """This process's ``rank`` among ``world``, and the ``device`` it works on."""

    rank: int
    world: int
    device: torch.device

    @property
    def leader(self) -> bool:
        """Whether this is the one process that prints and writes files."""
        return self.rank == 0

    def barrier(self) -> None:
        """Waits until every process is here."""
        if self.world > 1:
            dist.barrier()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of ``tensor`` over all processes, in place, on all of them."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def most(self, value: float) -> float:
        """The largest ``value`` that a process has."""
        tensor = torch.tensor(float(value), device=self.device)
        if self.world > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return tensor.item()

    def sum_gradients(self, parameters: list[torch.nn.Parameter], note: float = 0.0) -> float | torch.Tensor:
        """Adds up every parameter's gradient over all processes, as one message; returns the sum of their ``note``."""
        if self.world == 1:
            return note
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([*(g.reshape(-1) for g in gradients), torch.tensor([note], device=self.device)])
        dist.all_reduce(flat)
        *summed, note = flat.split([*(g.numel() for g in gradients), 1])
        for gradient, values in zip(gradients, summed, strict=True):
            gradient.copy_(values.view_as(gradient))
        return note

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Ends the block in every process with an error if it did in one: a ``UserError`` that the first of those has
        that found it, and that is empty in all others. The block itself sends nothing to other processes."""
        failure = None
        try:
            yield
        except UserError as error:
            failure = error
        if self.sum(torch.tensor(float(failure is not None), device=self.device)):
            found = [str(failure or "")] * self.world
            if self.world > 1:
                dist.all_gather_object(found, found[self.rank])
            if failure is None or found.index(str(failure)) < self.rank:
                raise UserError("") from failure
            raise failure


@contextlib.contextmanager
def process_group(device: str) -> Iterator[Processes]:
    """Joins the group that ``torchrun`` describes in the environment (gloo on a CPU, NCCL on CUDA), if there is one.

    ``device`` is "auto" or a torch device name; "cuda" without an index becomes the local rank's device.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    with said_once():
        chosen = pick_device(device)
    if world == 1:
        yield Processes(0, 1, chosen)
        return
    if chosen.type == "cuda" and chosen.index is None:
        chosen = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(chosen)
    # Its functions take the group there is when they are defined as a default argument. Imported later (an optimiser
    # imports it), they would keep the group alive, and gloo's threads with it: one that lets go of a tensor while the
    # interpreter shuts down aborts the process.
    importlib.import_module("torch.distributed.nn.functional")
    dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo")
    try:
        yield Processes(rank, world, chosen)
    except RuntimeError as error:
        if "onnection closed by peer" in str(error) or isinstance(error, dist.DistError):
            raise UserError("another process of this run has ended; --resume continues from the last state") from error
        raise
    finally:
        dist.destroy_process_group()


def memory_of(device: torch.device) -> int:
    """Bytes of memory that ``device`` has in all."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 1 << 62


def pick_device(name: str) -> torch.device:
    """The torch device called ``name``; "auto" is CUDA where there is one, else the CPU.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.partition(":")[0] not in ("cpu", "cuda"):
        raise UserError(f"device {name!r} is none that can be used; expected auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device {name!r} is not available: {str(error).splitlines()[0]}") from error
    return device
