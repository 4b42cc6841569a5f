"""Work and traffic of each kernel, counted while it runs, beside what fastunet/inspection/traffic.py says of its tiles.

    python -m tests.emulator.traffic
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from fastunet.architecture import Architecture
from fastunet.inspection import traffic
from fastunet.inspection.layers import Call, Tensor, network_calls
from fastunet.inspection.machine_code import compile_launch
from fastunet.kernels import _launch

from .driver import emulated
from .launch import Emulator
from .machine import Schedule

NETWORK, SIZE = Architecture(width=32, depth=1), (32, 32)


@dataclass(frozen=True)
class Row:
    """A launch: ``claimed`` by its tiles, ``counts`` of its execution; ``useful`` operations of the whole call."""

    layer: str
    kernel: str
    programs: int
    claimed: traffic.Traffic
    counts: Counter[str]
    useful: int

    @property
    def read(self) -> int:
        """Bytes of the tiles that were asked for: what is masked off counts, what two threads share counts once."""
        return int(self.counts["global load of tiles"] + self.counts["bulk load of tiles"])

    @property
    def written(self) -> int:
        return int(self.counts["global store of tiles"] + self.counts["bulk store of tiles"])

    @property
    def inside(self) -> int:
        """Bytes that were read or written in all; shared ones once for each thread."""
        return int(sum(self.counts[f"{how} {what}"] for how in ("global", "bulk") for what in ("load", "store")))


def rows(architecture: int = 90, dtype: torch.dtype = torch.bfloat16, network: Architecture = NETWORK,
         size: tuple[int, int] = SIZE) -> Iterator[Row]:  # fmt: skip
    """Every launch of training and inference of a small network, of a narrow and of a wide head, and of bilinear
    upsampling."""
    calls = [call for training in (True, False) for call in network_calls(network, 1, *size, training=training)]
    for width in {16, 32} - {network.width}:
        other = network_calls(replace(network, width=width), 1, *size)
        calls += [call for call in other if call.operator == "segmentation_head_backward"]
    for align_corners in (False, True):
        for operator, name, scale in (("upsample_bilinear2d", "x", 1), ("upsample_bilinear2d_backward", "dy", 2)):
            image = Tensor((1, 32, 12 * scale, 20 * scale))
            calls.append(Call("up", operator, {name: image, "align_corners": align_corners}, 0))
    with emulated(architecture, Emulator((Schedule(tiles=True),))) as emulator:
        for call in calls:
            yield from _of(call, emulator, architecture, dtype)


def _of(call: Call, emulator: Emulator, architecture: int, dtype: torch.dtype) -> Iterator[Row]:
    operands = call.random(dtype, "cpu")
    emulator.records.clear()
    call.launcher()(*operands)
    records = list(emulator.records)
    with _launch.recording(architecture) as launches:
        call.launcher()(*operands)
    with FlopCounterMode(display=False) as flops:
        call.reference(operands)
    for launch, record in zip(launches, records, strict=True):
        assert launch.kernel.__name__ == record.kernel
        code = compile_launch(launch, architecture).asm
        claimed = traffic.count(launch, code["ttir"], code["ttgir"])
        yield Row(call.layer, record.kernel, record.programs, claimed, record.counts, flops.get_total_flops())


def table(found: list[Row]) -> str:
    """Of each kernel the greatest launch, in Markdown: operations and bytes, claimed / executed."""
    greatest: dict[str, Row] = {}
    for row in found:
        if row.claimed.bytes > (greatest[row.kernel].claimed.bytes if row.kernel in greatest else -1):
            greatest[row.kernel] = row
    columns = ("kernel", "layer", "programs", "operations", "useful", "read", "written", "inside of tensors",
               "shared loaded", "shared stored", "wgmma", "mma", "bulk copies", "barriers", "waits")  # fmt: skip
    lines = ["| " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]
    for row in greatest.values():
        c = row.counts
        cells = (row.kernel.removesuffix("_kernel"), row.layer, row.programs, f"{row.claimed.flop} / {int(c['flop'])}",
                 row.useful if row.claimed.flop else "", f"{row.claimed.read} / {row.read}",
                 f"{row.claimed.written} / {row.written}", row.inside, c["shared load"], c["shared store"],
                 int(c["wgmma"]), c["mma"], c["bulk loads"] + c["bulk stores"], c["barriers"], c["waits"])  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(list(rows())))
