"""What threads of a warp do together (PTX ISA: "shfl.sync", "redux.sync", "vote.sync", "elect.sync"), and what this
machine need not do: ``nanosleep``, ``griddepcontrol``, ``membar`` and ``fence`` between threads that run one by one."""

from __future__ import annotations

import numpy as np

from .compiler import Emission, instruction, runtime
from .global_memory import Fault
from .numbers import I32, U32, U64


def _whole_warp(e: Emission, mask: str) -> list[str]:
    """A check that the mask of threads that take part is all of the warp's."""
    return [f"check_mask({e.value(mask, 32)}, {e.what})"]


@runtime
def check_mask(mask, what):
    if (mask != 0xFFFFFFFF).any():
        raise NotImplementedError(f"by some threads of a warp: {what}")


@instruction("shfl.sync")
def shfl(e: Emission) -> list[str]:
    """Within the whole warp: the segment mask c is 31 (0 for "up")."""
    mode, (name, *predicate) = e.op[2], e.ops[0].split("|")
    e.need(int(e.ops[3], 0) == (0 if mode == "up" else 31) and e.op[-1] == "b32")
    call = f"shuffle(M, {mode!r}, {e.full(e.ops[1], 32)}, {e.full(e.ops[2], 32)}, {e.active}, {e.what})"
    found = e.put(predicate[0], "ok") if predicate else []
    return [*_whole_warp(e, e.ops[4]), f"x, ok = {call}", *e.put(name, "x"), *found]


@runtime
def shuffle(machine, mode, a, b, active, what):
    lane = machine.laneid.astype(np.int64)
    offset = (b & U32(31)).astype(np.int64)
    source = {"bfly": lane ^ offset, "idx": offset, "down": lane + offset, "up": lane - offset}[mode]
    ok = (source >= 0) & (source <= 31)
    index = np.arange(machine.threads) - lane + np.where(ok, source, lane)
    if active is not None and (active & ~active[index]).any():
        raise Fault(f"shuffle from an inactive lane: {what}")
    return a[index], ok


@instruction("redux.sync")
def redux(e: Emission) -> list[str]:
    e.need(e.op[-1] in ("u32", "s32", "b32"))
    return _whole_warp(e, e.ops[2]) + e.put(e.ops[0], f"reduce_warp({e.op[2]!r}, {e.op[-1]!r}, {e.full(e.ops[1], 32)})")


@runtime
def reduce_warp(operation, kind, a):
    a = (a.view(I32) if kind == "s32" else a).reshape(-1, 32)
    function = {"add": np.add, "min": np.minimum, "max": np.maximum, "and": np.bitwise_and, "or": np.bitwise_or,
                "xor": np.bitwise_xor}[operation]  # fmt: skip
    return np.repeat(function.reduce(a, axis=1, dtype=a.dtype).view(U32), 32)


@instruction("vote.sync.ballot")
def ballot(e: Emission) -> list[str]:
    return _whole_warp(e, e.ops[2]) + e.put(e.ops[0], f"ballot_warp(full({e.typed(e.ops[1], 'pred')}, T))")


@runtime
def ballot_warp(p):
    bits = p.reshape(-1, 32).astype(U64) << np.arange(32, dtype=U64)
    return np.repeat(bits.sum(1).astype(U32), 32)


@instruction("elect.sync")
def elect(e: Emission) -> list[str]:
    """The ISA leaves open which lane is elected: machines differ in ``leader``."""
    name, predicate = e.ops[0].split("|")
    return e.put(name, "U32(M.schedule.leader)") + e.put(predicate, "M.laneid == M.schedule.leader")


@instruction("membar", "fence", "bar.warp.sync", "nanosleep", "griddepcontrol")
def nothing(e: Emission) -> list[str]:
    """Statements run in the order of the program, so plain memory fences hold by themselves."""
    e.need(e.op[:2] != ["fence", "proxy"])
    return []
