"""Moves, loads and stores (PTX ISA, "Data Movement and Conversion Instructions": mov, ld, st, cvta)."""

from __future__ import annotations

import numpy as np

from .compiler import Emission, bits_of, instruction, runtime
from .global_memory import WIDTHS

GARBAGE = 0xFFBADBAD
"""In registers that nothing was written to."""


@instruction("mov")
def mov(e: Emission) -> list[str]:
    """Also packs {a, b} into a wider register and unpacks it."""
    to, source = e.ops
    kind = e.op[-1]
    if kind == "pred":
        return e.put(to, e.typed(source, "pred"))
    bits = bits_of(kind)
    if isinstance(to, list):
        part = bits // len(to)
        lines = [f"x = {e.full(source, bits)}"]
        for i, name in enumerate(to):
            lines += e.put(name, f"(x >> U{bits}({part * i})).astype(U{part})")
        return lines
    if isinstance(source, list):
        part = bits // len(source)
        parts = [f"({e.full(s, part)}.astype(U{bits}) << U{bits}({part * i}))" for i, s in enumerate(source)]
        return e.put(to, " | ".join(parts))
    return e.put(to, e.full(source, bits))


@instruction("cvta")
def cvta(e: Emission) -> list[str]:
    """Generic addresses are the same numbers as those of the state spaces."""
    return e.put(e.ops[0], e.value(e.ops[1], bits_of(e.op[-1])))


@instruction("ld.param")
def ld_param(e: Emission) -> list[str]:
    where = e.ops[1]
    names = e.ops[0] if isinstance(e.ops[0], list) else [e.ops[0]]
    e.need(len(names) == 1 and where.offset == 0)
    bits = bits_of(e.op[-1])
    return e.put(names[0], f"full(M.parameter({e.program.params[where.base]}, U{bits}), T)")


@instruction("ld.global", "ld.shared")
def ld(e: Emission) -> list[str]:
    """``ld.space[.v2|.v4].type d, [a]``."""
    names = e.ops[0] if isinstance(e.ops[0], list) else [e.ops[0]]
    space, kind = e.op[1].split("::")[0], e.op[-1]
    address = e.address(e.ops[1], 64 if space == "global" else 32)
    lines = [f"x = load_{space}(M, {address}, {bits_of(kind) // 8}, {len(names)}, {e.active}, {e.what})"]
    if kind[0] == "s":
        lines.append(f"x = x.view(I{bits_of(kind)})")
    return lines + e.put_all(names, "x")


@instruction("st.global", "st.shared")
def st(e: Emission) -> list[str]:
    values = e.ops[1] if isinstance(e.ops[1], list) else [e.ops[1]]
    space = e.op[1].split("::")[0]
    address = e.address(e.ops[0], 64 if space == "global" else 32)
    stacked = f"np.stack({e.values(values, bits_of(e.op[-1]))}, 1)"
    return [f"store_{space}(M, {address}, {stacked}, {e.active}, {e.what})"]


def _scattered(machine, found, width: int, lanes) -> np.ndarray:
    """(count, threads) of what the active lanes loaded."""
    if lanes is machine.all_lanes:
        return found.T
    out = np.full((found.shape[1], machine.threads), GARBAGE & ((1 << 8 * width) - 1), WIDTHS[width])
    out[:, lanes.index] = found.T
    return out


@runtime
def load_global(machine, address, width, count, active, what):
    lanes = machine.lanes(active)
    machine.count("global load", len(lanes) * width * count)
    machine.count_tile("global load", address, width * count)
    address = address[lanes.index]
    found = machine.memory.load(address, width, count, what)
    machine.memory.reading(address, machine.number[lanes.index], what)
    return _scattered(machine, found, width, lanes)


@runtime
def store_global(machine, address, values, active, what):
    lanes = machine.lanes(active)
    machine.count("global store", len(lanes) * values[0].nbytes)
    machine.count_tile("global store", address, values[0].nbytes)
    address = address[lanes.index]
    machine.memory.store(address, values[lanes.index], what)
    each = address[:, None] + np.arange(values.shape[1], dtype=np.uint64) * np.uint64(values.itemsize)
    machine.memory.writing(each, machine.number[lanes.index][:, None], what)


@runtime
def load_shared(machine, address, width, count, active, what):
    lanes = machine.lanes(active)
    machine.count("shared load", len(lanes) * width * count)
    return _scattered(machine, machine.shared.load(address[lanes.index], width, count, lanes, what), width, lanes)


@runtime
def store_shared(machine, address, values, active, what):
    lanes = machine.lanes(active)
    machine.count("shared store", len(lanes) * values[0].nbytes)
    machine.shared.store(address[lanes.index], values[lanes.index], lanes, what)
