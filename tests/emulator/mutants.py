"""Can the checks fail? Deletes one synchronising statement of a kernel at a time and runs it again.

    python -m tests.emulator.mutants [box rows stacked pointer weight_grad upsample]

A deletion is caught by a fault (race, missing fence, a read of what a copy in flight writes, …) or by other results.
What survives is redundant on this path: a neighbour orders the same accesses, or the launch does not make them.
"""

from __future__ import annotations

import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from unittest import mock

import torch

from fastunet.kernels import _launch, upsample_conv
from fastunet.kernels._stride2 import Stride2Config
from fastunet.kernels.conv import forward, weight_grad
from fastunet.kernels.conv.convolution import ConvConfig
from fastunet.kernels.conv.weight_grad_config import WeightGradConfig

from .compiler import Program
from .driver import emulated
from .global_memory import Fault
from .launch import LAZY, Emulator
from .parser import parse

STATEMENTS = {
    "bar.sync": r"^\s*bar\.sync[^\n]*;\n",
    "fence.proxy.async": r"^\s*fence\.proxy\.async[^\n]*;\n",
    "wgmma.wait_group": r"^\s*wgmma\.wait_group[^\n]*;\n",
    "cp.async.wait_group": r"^\s*cp\.async\.wait_group[^\n]*;\n",
    "cp.async.bulk.wait_group": r"^\s*cp\.async\.bulk\.wait_group[^\n]*;\n",
    "mbarrier.try_wait": r"^\s*\{\s*\.reg \.pred\s+complete;.*?\n\s*\}\n",
}


def image(*shape: int) -> torch.Tensor:
    return torch.randn(shape).bfloat16().contiguous(memory_format=torch.channels_last)


def convolution(config: ConvConfig) -> Callable:
    operands = image(1, 32, 8, 32), image(32, 32, 3, 3) / 17, torch.randn(32).bfloat16(), 1, True, config
    return lambda: forward.forward_pool(*operands)


def weight_gradient() -> Callable:
    config = WeightGradConfig("bulk", block_k=64, block_c=16, block_w=16, rows=4, num_stages=2)
    dz, x = image(1, 64, 8, 16), image(1, 16, 8, 16)
    return lambda: weight_grad.weight_grad(dz, x, None, 1, False, config)


def upsampling() -> Callable:
    x, weight = image(1, 32, 8, 8), image(16, 32, 2, 2) / 11
    return lambda: upsample_conv.forward(x, weight, None, 0.0, config=Stride2Config(4, 8, 64, 16, 4, 2, True))


LAUNCHES = {
    "box": lambda: convolution(ConvConfig("box", block_k=64, block_w=16, block_h=4, block_c=16)),
    "rows": lambda: convolution(ConvConfig("rows", block_k=64, block_w=16, block_h=4, block_c=32)),
    "stacked": lambda: convolution(ConvConfig("rows", block_k=32, block_w=32, block_h=4, block_c=16)),
    "pointer": lambda: convolution(ConvConfig("pointer", block_k=32, block_w=64, block_c=16)),
    "weight_grad": weight_gradient,
    "upsample": upsampling,
}


class _Recorder(Emulator):
    """Keeps the greatest launch, its operands alive and what it wrote."""

    def run(self, program, grid, arguments, num_warps, shared):
        self.launched.append((program, grid, arguments, num_warps, shared))
        super().run(program, grid, arguments, num_warps, shared)


def study(name: str) -> Iterator[tuple[str, int, str]]:
    """(statement, line, verdict) of each deletion in the longest kernel of a launch; inside of ``emulated``."""
    torch.manual_seed(0)
    emulator = _Recorder((LAZY,))
    emulator.launched = []
    kept: list[torch.Tensor] = []  # a launch holds addresses only
    start = LAUNCHES[name]()
    empty = _launch.empty
    keeping = mock.patch.object(_launch, "empty", lambda *a, **k: kept.append(empty(*a, **k)) or kept[-1])
    with emulated(90, emulator), _launch.poisoned(), keeping:
        result = start()
    written = list(result) if isinstance(result, tuple) else [result]
    program, *launch = max(emulator.launched, key=lambda one: len(one[0].kernel.text))
    written = _written(emulator, program, launch, [_flat(tensor) for tensor in written + kept])

    def outcome(one: Program) -> list[torch.Tensor]:
        for tensor in written:
            tensor.fill_(0xFF)
        Emulator.run(emulator, one, *launch)
        return [tensor.clone() for tensor in written]

    want = outcome(program)
    text = program.kernel.text
    for statement, pattern in STATEMENTS.items():
        for match in re.finditer(pattern, text, flags=re.M | re.S):
            mutant = Program(parse(text[: match.start()] + text[match.end() :]))
            try:
                verdict = "survives" if all(map(torch.equal, outcome(mutant), want)) else "other results"
            except Fault as fault:
                verdict = str(fault).split("): ", 1)[-1].split(":")[0]
            yield statement, text[: match.start()].count("\n") + 1, verdict


def _written(emulator: Emulator, program: Program, launch: list, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Those of ``tensors`` that the kernel writes: reordered weights are allocated as results are, but read."""
    before = [tensor.clone() for tensor in tensors]
    for tensor in tensors:
        tensor.fill_(0xFF)
    Emulator.run(emulator, program, *launch)
    changed = [bool((tensor != 0xFF).any()) for tensor in tensors]
    for tensor, old in zip(tensors, before):
        tensor.copy_(old)
    return [tensor for tensor, change in zip(tensors, changed) if change]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a dense tensor."""
    return tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset()).view(torch.uint8)


def table(names: Iterable[str] = LAUNCHES) -> str:
    """How many deletions of each statement are caught, in Markdown."""
    lines = ["| launch | " + " | ".join(STATEMENTS) + " |", "| --- |" + " ---: |" * len(STATEMENTS)]
    for name in names:
        verdicts = list(study(name))
        all_, caught = (Counter(s for s, _, verdict in verdicts if verdict not in left) for left in ((), ("survives",)))
        cells = [f"{caught[s]} of {all_[s]}" if all_[s] else "" for s in STATEMENTS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    for one in sys.argv[1:] or LAUNCHES:
        for statement, line, verdict in study(one):
            print(f"{one}, line {line}, {statement}: {verdict}", flush=True)
