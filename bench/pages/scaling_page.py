"""The figures of ``docs/scaling.md`` from committed rows and link speeds: ``python -m bench.pages.scaling_page``."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from pathlib import Path

from bench.measuring.rows import RESULTS, Results, Row, devices, scaling_results
from bench.pages import links
from bench.pages.tables import markdown, milliseconds
from bench.report import replaced
from bench.scaling import AXES, STRONG, WEAK, exponent

PAGE = Path(__file__).parents[2] / "docs" / "scaling.md"
BEGIN, END = "<!-- scaling:begin -->", "<!-- scaling:end -->"
GPUS = (8, 64, 512)
GRADIENT_BYTES = {"brats": 4 * 7_759_908, "isbi": 4 * 31_030_658}
"""float32 gradients: four bytes a parameter."""
_TRAINING = "training step"
_GLOBAL_BATCH = 512


def section(root: Path = RESULTS) -> str:
    """The generated part of the page."""
    parts = [_exchanges()]
    found = [results for slug in devices(root) if (results := scaling_results(slug, root)) is not None]
    gpus = [results for results in found if not results.environment.slug.startswith("cpu-")]
    parts += [_many_gpus(results) for results in gpus]
    if not gpus:
        parts.append("**Training steps on many GPUs:** pending. No scaling rows of a GPU are committed, and this page "
                     "computes them from nothing else.")  # fmt: skip
    parts += [_measured(results) for results in found]
    if not found:
        parts.append("**Measured growth:** pending. No scaling rows are committed; `python -m bench.scaling --out "
                     "bench/results` takes them.")  # fmt: skip
    return "\n\n".join(part for part in parts if part)


def _exchanges() -> str:
    lines = [[preset, f"{size / 1e6:.1f} MB", *(milliseconds(1e3 * links.exchange_seconds(n, size)) for n in GPUS)]
             for preset, size in GRADIENT_BYTES.items()]  # fmt: skip
    speeds = "; ".join(f"{link.name}: {link.gbs:g} GB/s in one direction, {link.latency_us:g} µs a step (assumed)"
                       for link in (links.NVLINK, links.INFINIBAND))  # fmt: skip
    table = markdown(["network", "gradients", *(f"{n} GPUs" for n in GPUS)], lines)
    return f"**Exchange of the gradients, computed** ({speeds})\n\n{table}"


def _many_gpus(results: Results) -> str:
    """Weak scaling of the largest measured batch, strong scaling of a global batch of 512, of the brats network."""
    points = {row.value: row.p50_ms / 1e3 for row in _on_axis(results, "batch", _TRAINING)}
    if len(points) < 2:
        return ""
    compute_of, gradients = interpolated(points), GRADIENT_BYTES["brats"]
    largest = max(points)
    lines = []
    for gpus in (1, *GPUS):
        weak = [links.step_seconds(gpus, points[largest], gradients, overlapped=o) for o in (False, True)]
        own = _GLOBAL_BATCH / gpus
        strong = links.step_seconds(gpus, compute_of(own), gradients, overlapped=True)
        alone = compute_of(_GLOBAL_BATCH)
        lines.append([str(gpus), f"{points[largest] / weak[0]:.1%}", f"{points[largest] / weak[1]:.1%}", f"{own:g}",
                      milliseconds(1e3 * strong), f"{alone / strong:.1f}×"])  # fmt: skip
    header = ["GPUs", f"weak, {largest} images each", "the same, overlapped", "strong: images each", "step", "speed-up"]
    limit = links.strong_scaling_limit(_GLOBAL_BATCH, compute_of, gradients)
    shape = _on_axis(results, "batch", _TRAINING)[0].shape.partition("×")[2]
    return (
        f"**Training steps on many {results.environment.device}, computed** from steps measured on one (brats, "
        f"batch×{shape}; batches above {largest} extrapolated)\n\n{markdown(header, lines)}\n\n"
        f"A global batch of {_GLOBAL_BATCH} images stops gaining at {limit} GPUs: twice as many are less than 1.25 "
        "times as fast."
    )


def interpolated(points: dict[int, float]) -> Callable[[float], float]:
    """Seconds of a batch between measured ones, linear in the batch; in proportion above the largest one, constant
    below the smallest."""
    known = sorted(points.items())

    def seconds(batch: float) -> float:
        if batch <= known[0][0]:
            return known[0][1]
        for (low, below), (high, above) in itertools.pairwise(known):
            if batch <= high:
                return below + (above - below) * (batch - low) / (high - low)
        return known[-1][1] * batch / known[-1][0]

    return seconds


def _measured(results: Results) -> str:
    """Fitted exponents along each axis and the efficiency over processes, of one device."""
    lines = []
    for step in (_TRAINING, "inference, logits"):
        for axis in AXES:
            rows = _on_axis(results, axis, step)
            if len(rows) < 2:
                continue
            k = exponent([row.value for row in rows], [row.p50_ms for row in rows])
            ends = ", ".join(f"{row.value}: {milliseconds(row.p50_ms)}" for row in (rows[0], rows[-1]))
            lines.append([step, axis, f"{rows[0].value} – {rows[-1].value}", ends, f"{k:.2f}"])
    table = markdown(["step", "axis", "range", "smallest and largest", "exponent"], lines, right_from=3)
    parts = [f"**Measured growth on {results.environment.device}** (commit {results.environment.commit})"]
    parts += [table] if lines else []
    parts += [text for text in (_efficiency(results, axis) for axis in (WEAK, STRONG)) if text]
    return "\n\n".join(parts) if len(parts) > 1 else ""


def _efficiency(results: Results, axis: str) -> str:
    rows = _on_axis(results, axis, _TRAINING)
    if len(rows) < 2 or rows[0].value != 1:
        return ""
    one = rows[0].p50_ms
    kind = axis.partition(", ")[2]
    shares = [f"{r.value} processes {one / r.p50_ms / (r.value if axis == STRONG else 1):.0%} "
              f"({milliseconds(r.p50_ms)}; 1 process {milliseconds(one)})" for r in rows[1:]]  # fmt: skip
    return f"Efficiency of {kind} scaling of a training step, {rows[0].shape} in one process: {'; '.join(shares)}."


def _on_axis(results: Results, axis: str, step: str) -> list[Row]:
    return sorted((r for r in results.rows if r.axis == axis and r.step == step), key=lambda row: row.value)


def main() -> int:
    """Rewrites the generated part of the page; exit code 2 where it lacks its markers."""
    try:
        PAGE.write_text(replaced(PAGE.read_text(), section(), BEGIN, END))
    except ValueError as error:
        print(f"{PAGE.name}: {error}", file=sys.stderr)
        return 2
    print(f"wrote {PAGE.name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
