"""Small PTX kernels for the emulator's own tests, on NumPy arrays."""

from __future__ import annotations

import numpy as np
import torch

from .bulk_copies import TensorMap
from .compiler import Program
from .launch import EAGER, LAZY, Emulator, Record
from .parser import parse

BOTH = (EAGER, LAZY)


def run(body: str, *arguments: np.ndarray | TensorMap | int, threads: int = 32, grid: int = 1, shared: int = 0,
        schedules=BOTH) -> list[Record]:  # fmt: skip
    """Runs ``body`` on arrays, which it finds by ``kernel_param_0``, …; registers %p, %rs, %r, %rd, %f are declared."""
    kinds = {np.ndarray: ".param .u64 .ptr .global .align 1 {}", int: ".param .u32 {}",
             TensorMap: ".param .align 64 .b8 {}[128]"}  # fmt: skip
    params = ", ".join(kinds[type(a)].format(f"kernel_param_{i}") for i, a in enumerate(arguments))
    text = f"""
.version 8.7
.target sm_90a
.address_size 64
.visible .entry kernel({params})
.reqntid {threads}
{{
.reg .pred %p<99>; .reg .b16 %rs<99>; .reg .b32 %r<999>; .reg .b64 %rd<99>; .reg .f32 %f<99>;
{body}
ret;
}}
"""
    emulator = Emulator(tuple(schedules))
    passed = [torch.from_numpy(a) if isinstance(a, np.ndarray) else a for a in arguments]
    emulator.run(Program(parse(text)), (grid, 1, 1), passed, threads // 32, shared)
    return emulator.records


def thread_addresses(sizes: list[int]) -> str:
    """%rd{i} = parameter i + thread · sizes[i]; %r0 is the thread, of all in the grid."""
    lines = ["mov.u32 %r0, %tid.x; mov.u32 %r1, %ctaid.x; mov.u32 %r2, %ntid.x; mad.lo.s32 %r0, %r1, %r2, %r0;"]
    for i, size in enumerate(sizes):
        lines.append(f"ld.param.u64 %rd{50 + i}, [kernel_param_{i}]; mad.wide.u32 %rd{i}, %r0, {size}, %rd{50 + i};")
    return "\n".join(lines)


_REGISTER = {1: "%rs", 2: "%rs", 4: "%r", 8: "%rd"}


def each(instruction: str, out: np.dtype, *inputs: np.ndarray) -> np.ndarray:
    """The result of ``instruction``, of operands ``{d}``, ``{a}``, ``{b}``, ``{c}``, on each thread's elements."""
    inputs = [np.ascontiguousarray(x) for x in inputs]
    count = len(inputs[0])
    assert count % 32 == 0
    result = np.zeros(count, out)
    sizes = [result.itemsize, *(x.itemsize for x in inputs)]
    names = {"d": f"{_REGISTER[sizes[0]]}20"} | {
        letter: f"{_REGISTER[size]}{21 + i}" for i, (letter, size) in enumerate(zip("abc", sizes[1:]))}  # fmt: skip
    lines = [thread_addresses(sizes)]
    for i, (letter, size) in enumerate(zip("abc", sizes[1:])):
        lines.append(f"ld.global.b{8 * size} {names[letter]}, [%rd{1 + i}];")
    lines.append(instruction.format(**names))
    lines.append(f"st.global.b{8 * sizes[0]} [%rd0], {names['d']};")
    run("\n".join(lines), result, *inputs, grid=count // 32)
    return result
