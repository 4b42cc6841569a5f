"""Markdown tables from result rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from bench.measuring.rows import FAILED, OK, OURS, RIVAL, WRONG, Environment, Results, Row, best, by_workload
from bench.workloads import any_unet

_NETWORKS = ("brats", "isbi")
_LOSSES = ("dice_cross_entropy", "dice_loss")


def device_report(results: Results) -> str:
    """All tables of one device: networks, losses, first results, other U-Nets, operators, and what failed."""
    rows = [row for row in results.rows if row.subject != "waterfall"]
    timed = [row for row in rows if row.step != "first result"]
    parts = [
        _heading(results.environment),
        _comparison("Networks", [row for row in timed if row.subject in _NETWORKS], memory=True),
        _comparison("Losses", [row for row in timed if row.subject in _LOSSES], memory=True),
        _first_results([row for row in rows if row.step == "first result"]),
        _comparison("Other U-Nets", [row for row in timed if row.subject in any_unet.NETWORKS], memory=True),
        _comparison("Operators", [row for row in timed
                                  if row.subject not in (*_NETWORKS, *_LOSSES, *any_unet.NETWORKS)]),
        _problems(results.rows),
    ]
    return "\n\n".join(part for part in parts if part)


def headlines(results: Results) -> str:
    """One table: the networks and losses of a device, our median beside the best rival's, losses as losses."""
    rows = [row for row in results.rows if row.subject in (*_NETWORKS, *_LOSSES) and row.step != "first result"]
    lines = []
    for group in by_workload(rows).values():
        ours, rival = best(group, OURS), best(group, RIVAL)
        if ours is not None and rival is not None:
            what = f"{ours.subject} {ours.step}, {ours.shape}, {ours.precision}"
            times = [f"{milliseconds(row.p50_ms)}, {row.variant}" for row in (ours, rival)]
            lines.append([what, *times, f"{rival.p50_ms / ours.p50_ms:.2f}×"])
    at = f"{results.environment.device}, commit {results.environment.commit}, {results.environment.date[:10]}"
    return markdown([at, "fastunet", "fastest rival", "times as fast"], lines)


def markdown(header: Sequence[str], lines: Iterable[Sequence[str]], right_from: int = 1) -> str:
    """A table whose columns from ``right_from`` on are right-aligned."""
    rule = ["---" if i < right_from else "---:" for i in range(len(header))]
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *lines))


def milliseconds(value: float) -> str:
    """Three significant digits, with the unit that suits."""
    if value >= 9999.5:
        return f"{value / 1e3:.3g} s"
    if value >= 999.5:
        return f"{value:.0f} ms"
    return f"{value:.3g} ms" if value >= 1 else f"{value * 1e3:.3g} µs"


def megabytes(value: int) -> str:
    """Decimal megabytes, "–" for what was not measured."""
    return f"{value / 1e6:.3g} MB" if value else "–"


def _number(value: float) -> str:
    """Three significant digits without an exponent."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:.3g}"


def _heading(environment: Environment) -> str:
    products = ", ".join(f"{rate * 1e3:.3g} GFLOP/s in {name}" if rate < 1 else f"{rate:.3g} TFLOP/s in {name}"
                         for name, rate in environment.matmul_tflops.items())  # fmt: skip
    versions = ", ".join(f"{name} {version}" for name, version in environment.versions.items() if name != "fastunet")
    return (
        f"### {environment.device}\n\n"
        f"Commit {environment.commit}, {environment.date[:10]}; {versions}; driver or kernel "
        f"{environment.driver or 'unknown'}; {environment.threads} CPU threads. Ceilings in the same run: copy "
        f"{_number(environment.copy_gbs)} GB/s, matrix product {products}."
    )


def _comparison(title: str, rows: list[Row], *, memory: bool = False) -> str:
    """One line per workload: our fastest variant against the fastest rival and against the plain build."""
    lines = []
    for group in by_workload(rows).values():
        ours, rival = best(group, OURS), best(group, RIVAL)
        if ours is None or rival is None:
            continue
        plain = next((row for row in group if row.variant == "plain" and row.state == OK), None)
        line = [
            f"{ours.subject} {ours.step}, {ours.shape}, {ours.precision}",
            f"{milliseconds(ours.p50_ms)} ({milliseconds(ours.p20_ms)} – {milliseconds(ours.p80_ms)})",
            ours.variant,
            f"{rival.variant}: {milliseconds(rival.p50_ms)}",
            f"**{rival.p50_ms / ours.p50_ms:.2f}×**",
            f"{plain.p50_ms / ours.p50_ms:.2f}×" if plain else "–",
            f"{ours.share_of_floor:.0%}",
        ]
        if memory:
            line[2:2] = [_number(ours.images_per_second)]
            line.append(_memory(ours, plain))
        lines.append(line)
    if not lines:
        return ""
    header = ["", "fastunet, median (p20–p80)", "as", "best rival", "against it", "against plain", "share of floor"]
    if memory:
        header[2:2] = ["images/s"]
        header.append("memory / plain's")
    return f"**{title}**\n\n" + markdown(header, lines)


def _memory(ours: Row, plain: Row | None) -> str:
    """What a network's training step keeps for its backward pass, otherwise the peak; beside the plain build's."""
    training = ours.saved_bytes and ours.subject in _NETWORKS
    field, word = ("saved_bytes", "kept") if training else ("peak_bytes", "peak")
    mine, other = getattr(ours, field), getattr(plain, field) if plain else 0
    ratio = f" ({mine / other:.2f})" if other else ""
    return f"{word} {megabytes(mine)} / {megabytes(other)}{ratio}"


def _first_results(rows: list[Row]) -> str:
    if not rows:
        return ""
    lines = [[row.variant, f"{row.p50_ms / 1e3:.1f} s" if row.state == OK else row.note] for row in rows]
    what = f"{rows[0].subject}, {rows[0].shape}, {rows[0].precision}"
    return (f"**Time to the first result** (new process, empty compiler caches, {what})\n\n"
            + markdown(["", "import + build + compile + first call"], lines))  # fmt: skip


def _problems(rows: Iterable[Row]) -> str:
    """Rows that are wrong or failed, so that a missing rival explains itself."""
    bad = [row for row in rows if row.state in (WRONG, FAILED)]
    lines = [f"- {row.subject} {row.step}, {row.shape}, {row.precision}, {row.variant}: {row.state} ({row.note})"
             for row in bad]  # fmt: skip
    return "Not timed:\n\n" + "\n".join(lines) if lines else ""
