"""Everything that needs a GPU, in one go: ``python -m bench.gpu --out DIR --minutes 9 --stage correctness``.

Stages: ``correctness`` (kernel and network tests, compute-sanitizer), ``tune`` (``bench.tune``), ``bench``
(``bench.run``), ``profile`` (torch profiler, and Nsight Compute where it is installed). Needs torch, Triton, numpy and
pytest only, and this checkout installed. Every step is written to DIR when it ends, and the stage ends in time. Exit 0
if all steps passed, 1 if one failed, 2 without a GPU.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from bench.gpu.run import Stage

ROOT = Path(__file__).parents[2]
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--no-header"]
SANITIZER = ["compute-sanitizer", "--error-exitcode", "9", "--target-processes", "all"]
COUNTERS = ["ncu", "--clock-control", "none", "--set", "detailed", "--launch-count", "10"]


def correctness(stage: Stage) -> None:
    """The first numbers, then the tests of kernels and networks on kernels compiled in parallel, the sanitizer last."""
    stage.command("first", [sys.executable, "-m", "bench.gpu.first"], share=0.3)
    stage.command("compile", [sys.executable, "-m", "bench.gpu.compile"], share=0.3)
    marked = [str(path) for path in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    for path in marked:
        stage.command(Path(path).stem, [*PYTEST, "-m", "gpu", path], share=0.6, none_is_ok=True)
    for path in sorted((ROOT / "tests" / "kernels").glob("test_*.py")):
        stage.command(f"kernels-{path.stem}", [*PYTEST, str(path)], none_is_ok=True)
    for tool in ("memcheck", "racecheck"):
        stage.command(tool, [*SANITIZER, "--tool", tool, sys.executable, "-m", "bench.gpu.small"], share=0.5)


def tune(stage: Stage) -> None:
    """The offline search, which ends by itself a little before the deadline."""
    minutes = str(max(0.1, (stage.left - 20) / 60))
    stage.command("tune", [sys.executable, "-m", "bench.tune", "--out", str(stage.folder), "--minutes", minutes])


def bench(stage: Stage) -> None:
    """Predicted beside measured times, then the benchmarks; both end by themselves a little before the deadline."""
    minutes = str(max(0.1, stage.left / 60 / 5))
    stage.command("predict", [sys.executable, "-m", "bench.gpu.predict", "--out", str(stage.folder),
                              "--minutes", minutes], share=0.3)  # fmt: skip
    minutes = str(max(0.1, (stage.left - 20) / 60))
    stage.command("run", [sys.executable, "-m", "bench.run", "--out", str(stage.folder), "--minutes", minutes])


def profile(stage: Stage) -> None:
    """The timeline of both networks; then hardware counters of their most expensive kernels."""
    for preset in ("brats", "isbi"):
        timeline = [sys.executable, "-m", "bench.gpu.profile", "--preset", preset, "--out", str(stage.folder)]
        stage.command(f"timeline-{preset}", timeline, share=0.5)
        names = stage.folder / f"expensive-{preset}.txt"
        if names.exists():
            counters = [*COUNTERS, "--kernel-name", f"regex:^({'|'.join(names.read_text().split())})$",
                        "--export", str(stage.folder / f"counters-{preset}"), "--force-overwrite",
                        *timeline, "--once"]  # fmt: skip
            stage.command(f"counters-{preset}", counters, share=0.6)


STAGES = dict(correctness=correctness, tune=tune, bench=bench, profile=profile)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for results and logs")
    parser.add_argument("--minutes", type=float, default=9.0, help="end within this time (default: 9)")
    parser.add_argument("--stage", choices=STAGES, required=True)
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("bench.gpu: no CUDA device here", file=sys.stderr)
        return 2
    stage = Stage(options.stage, options.out.absolute(), 60 * options.minutes)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, stage {options.stage}", flush=True)
    STAGES[options.stage](stage)
    print(stage.summary())
    return 1 if stage.failed else 0


if __name__ == "__main__":
    sys.exit(main())
