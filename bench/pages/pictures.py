"""Pictures of result rows: a roofline, the waterfall of fusions, and bars against the rivals."""

from __future__ import annotations

from pathlib import Path

from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from bench.measuring.rows import OK, OTHER, OURS, RIVAL, Environment, Results, best, by_workload
from bench.pages.tables import milliseconds
from bench.workloads.waterfall import STEPS, SUBJECT

_COLOURS = {OURS: "#d55e00", RIVAL: "#0072b2", OTHER: "#999999"}
_MARKERS = "osD^vP*Xh<>"


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Draws what the rows allow as ``<device>-<picture>.svg`` in ``folder``; returns the files."""
    drawn = []
    for name, draw in (("rivals", rivals), ("waterfall", waterfall), ("roofline", roofline)):
        figure = draw(results)
        if figure is None:
            continue
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{results.environment.slug}-{name}.svg"
        figure.set_canvas(FigureCanvasSVG(figure))
        # without a date and with a fixed salt the file changes only with its content
        figure.savefig(path, metadata={"Date": None})
        drawn.append(path)
    return drawn


def rivals(results: Results) -> Figure | None:
    """A panel per network workload with a bar per variant, fastest on top, and its 20th to 80th percentile."""
    networks = [row for row in results.rows if row.subject in ("brats", "isbi") and row.step != "first result"]
    groups = [g for g in by_workload(networks).values() if best(g, OURS) and best(g, RIVAL)][:6]
    if not groups:
        return None
    columns = min(2, len(groups))
    lines = -(-len(groups) // columns)
    figure = _figure(6 * columns, 0.5 + 2.6 * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for place, group in zip(axes.flat, groups):
        timed = sorted((row for row in group if row.state == OK), key=lambda row: -row.p50_ms)
        medians = [row.p50_ms for row in timed]
        spread = [[r.p50_ms - r.p20_ms for r in timed], [r.p80_ms - r.p50_ms for r in timed]]
        place.barh([row.variant for row in timed], medians, xerr=spread, color=[_COLOURS[r.role] for r in timed],
                   error_kw=dict(lw=1, ecolor="#333333"))  # fmt: skip
        for y, row in enumerate(timed):
            place.text(row.p80_ms + 0.02 * max(medians), y, milliseconds(row.p50_ms), va="center", fontsize=8)
        place.set_xlim(0, 1.22 * max(row.p80_ms for row in timed))
        first = group[0]
        place.set_title(f"{first.subject} {first.step}, {first.shape}, {first.precision}", fontsize=10)
        place.set_xlabel("milliseconds, less is better", fontsize=8)
        place.tick_params(labelsize=8)
    for place in axes.flat[len(groups) :]:
        place.axis("off")
    figure.suptitle(f"{results.environment.device}: fastunet orange, rivals blue", fontsize=11)
    return figure


def waterfall(results: Results) -> Figure | None:
    """The time of each step from the plain network to all fusions, with what it brought over the bar before."""
    found = {row.variant: row for row in results.rows if row.subject == SUBJECT and row.state == OK}
    steps = [found[step.name] for step in STEPS if step.name in found]
    if len(steps) < 2:
        return None
    figure = _figure(9, 4.2)
    place = figure.subplots()
    medians = [row.p50_ms for row in steps]
    places = range(len(steps))
    spread = [[r.p50_ms - r.p20_ms for r in steps], [r.p80_ms - r.p50_ms for r in steps]]
    place.bar(places, medians, yerr=spread, color=[_COLOURS[row.role] for row in steps],
              error_kw=dict(lw=1, ecolor="#333333"))  # fmt: skip
    for x, row in enumerate(steps):
        gain = f"\n{medians[x - 1] / row.p50_ms:.2f}×" if x else ""
        place.text(x, row.p80_ms + 0.01 * max(medians), milliseconds(row.p50_ms) + gain, ha="center", va="bottom",
                   fontsize=8)  # fmt: skip
    floor = steps[0].floor_ms
    place.axhline(floor, color="#333333", lw=1, ls="--")
    place.text(len(steps) - 0.4, floor, "floor ", fontsize=8, va="bottom", ha="right")
    place.set_xticks(list(places), [_two_lines(row.variant) for row in steps], fontsize=8)
    place.set_ylim(0, 1.2 * max(row.p80_ms for row in steps))
    place.set_ylabel("milliseconds")
    place.set_title(f"{results.environment.device}: brats {steps[0].step}, {steps[0].shape}, {steps[0].precision}; "
                    "× is the gain over the bar before", fontsize=10)  # fmt: skip
    return figure


def roofline(results: Results) -> Figure | None:
    """Counted arithmetic per counted byte against achieved rate, below the ceilings that the same run measured."""
    timed = [r for r in results.rows if r.tflops and r.gbs and r.subject != SUBJECT and r.step != "first result"]
    ours = [row for group in by_workload(timed).values() if (row := best(group, OURS))]
    if not ours:
        return None
    figure = _figure(9, 5)
    place = figure.subplots()
    intensities = [row.tflops * 1e3 / row.gbs for row in ours]
    ridges = [rate * 1e3 / results.environment.copy_gbs for rate in results.environment.matmul_tflops.values()]
    low, high = min(intensities + ridges) / 4, max(intensities + ridges) * 2
    for precision in sorted({row.precision for row in ours}):
        _roof(place, results.environment, precision, low, high)
    subjects = list(dict.fromkeys(row.subject for row in ours))
    for row, intensity in zip(ours, intensities):
        index = subjects.index(row.subject)
        place.plot(intensity, row.tflops, _MARKERS[index % len(_MARKERS)], color=f"C{index % 10}", ms=7, mec="white")
    for index, subject in enumerate(subjects):
        place.plot([], [], _MARKERS[index % len(_MARKERS)], color=f"C{index % 10}", label=subject)
    place.set(xscale="log", yscale="log", xlabel="counted FLOP per counted byte", ylabel="TFLOP/s")
    place.set_title(f"{results.environment.device}: fastunet's workloads below the measured ceilings", fontsize=10)
    figure.legend(fontsize=8, loc="outside right upper")
    place.grid(alpha=0.3, which="both")
    return figure


def _roof(place, environment: Environment, precision: str, low: float, high: float) -> None:
    peak = environment.matmul_tflops.get(precision)
    if peak is None:
        return
    ridge = peak * 1e3 / environment.copy_gbs
    xs = [low, ridge, high] if low < ridge < high else [low, high]
    place.plot(xs, [min(peak, x * environment.copy_gbs / 1e3) for x in xs], color="#333333", lw=1.5)
    place.text(high, peak, f"{precision} product ", ha="right", va="bottom", fontsize=8)


def _two_lines(name: str) -> str:
    """``name`` broken before its last word."""
    return "\n".join(name.rsplit(" ", 1)) if len(name) > 12 else name


def _figure(width: float, height: float) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")
