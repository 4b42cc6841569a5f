"""The kernel timeline of a training step and of inference: ``python -m bench.gpu.profile --preset brats --out DIR``.

Writes ``timeline-<preset>.json`` (open it in Perfetto), ``kernels-<preset>.json`` (time by kernel),
``expensive-<preset>.txt`` (the names of the ten most expensive kernels, for Nsight Compute) and
``processor-<preset>.json`` (the processor's time for the launches of a step).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

import fastunet
from fastunet.functional.dice import dice_cross_entropy

SIZES = {"brats": (16, 240), "isbi": (2, 572)}
"""Images and pixels a side."""
SMALL = {"brats": (1, 64), "isbi": (1, 188)}
"""The same where the GPU has so little to do that the processor sets the pace."""


def workload(preset: str, device: str = "cuda", images: int = 0, size: int = 0, **options) -> Callable[[], None]:
    """One training step (forward, loss, backward, Adam) and one prediction of labels, in bfloat16 autocast."""
    images, size = images or SIZES[preset][0], size or SIZES[preset][1]
    model = fastunet.UNet.from_preset(preset, **options).to(device)
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    x = torch.randn(images, model.config["in_channels"], size, size, device=device)
    x = x.to(memory_format=torch.channels_last)
    labels = torch.randint(model.config["num_classes"], (images, *model.output_size(size, size)), device=device)
    labels = labels.to(torch.uint8)

    def run() -> None:
        with torch.autocast(device, torch.bfloat16):
            loss = dice_cross_entropy(model(x), labels, check_labels=False)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        with torch.autocast(device, torch.bfloat16):
            model.predict(x)

    return run


def kernel_times(profiler: torch.profiler.profile) -> list[dict]:
    """Total microseconds and calls of each kernel on the device, the most expensive first."""
    rows = [dict(kernel=event.key, microseconds=event.device_time_total, calls=event.count)
            for event in profiler.key_averages() if event.device_type == torch.autograd.DeviceType.CUDA]  # fmt: skip
    return sorted(rows, key=lambda row: -row["microseconds"])


def processor_microseconds(run: Callable[[], None], synchronize: Callable[[], None]) -> float:
    """What the processor takes to start all of ``run``, on a device that keeps up."""
    run()
    synchronize()
    repeats, started = 20, time.perf_counter()
    for _ in range(repeats):
        run()
    elapsed = time.perf_counter() - started
    synchronize()
    return elapsed / repeats * 1e6


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu.profile", description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=SIZES, required=True)
    parser.add_argument("--out", type=Path, required=True, help="folder of the four files")
    parser.add_argument("--once", action="store_true", help="run once, without the profiler, for Nsight Compute")
    options = parser.parse_args()
    run = workload(options.preset)
    run()
    torch.cuda.synchronize()
    if options.once:
        return
    run()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(3):
            run()
        torch.cuda.synchronize()
    profiler.export_chrome_trace(str(options.out / f"timeline-{options.preset}.json"))
    rows = kernel_times(profiler)
    (options.out / f"kernels-{options.preset}.json").write_text(json.dumps(rows, indent=1) + "\n")
    names = [row["kernel"] for row in rows if row["kernel"].isidentifier()][:10]
    (options.out / f"expensive-{options.preset}.txt").write_text("\n".join(names) + "\n")
    launches = sum(row["calls"] for row in rows) // 3
    host = processor_microseconds(workload(options.preset, "cuda", *SMALL[options.preset]), torch.cuda.synchronize)
    (options.out / f"processor-{options.preset}.json").write_text(
        json.dumps(dict(microseconds_a_step=host, launches=launches), indent=1) + "\n")  # fmt: skip
    print(f"{host:10.1f} µs of the processor for {launches} launches of a step and a prediction, one small image")
    for row in rows[:10]:
        print(f"{row['microseconds'] / 3:10.1f} µs a step  {row['calls'] // 3:3d} calls  {row['kernel'][:80]}")


if __name__ == "__main__":
    main()
