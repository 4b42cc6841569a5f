"""What a measurement leaves behind: a :class:`Row` per variant of a workload, in a file per device, day and commit."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from fastunet.files import write_text

RESULTS = Path(__file__).parents[1] / "results"
"""Committed result files, ``<device>/<date>-<commit>.json``."""
UNCOMMITTED = Path(__file__).parents[2] / ".benchmarks"
"""Where a run that was not asked to keep its rows leaves them; git ignores it."""

OURS, RIVAL, OTHER = "ours", "rival", "other"
"""Roles of a variant: ``other`` computes a different network of the same size and takes no part in ratios."""
OK, WRONG, FAILED = "ok", "wrong", "failed"
"""States of a row: a wrong variant missed its error budget and was not timed, a failed one raised."""


@dataclass(frozen=True)
class Environment:
    """The machine and software of a run, and the ceilings measured in it."""

    device: str
    slug: str
    driver: str
    """NVIDIA driver, or the operating system's kernel on a CPU."""
    versions: dict[str, str]
    commit: str
    date: str
    """ISO date and time, UTC."""
    threads: int
    """CPU threads that PyTorch uses."""
    copy_gbs: float
    """Device memory copy, GB/s, bytes read plus bytes written."""
    matmul_tflops: dict[str, float]
    """Large matrix product by precision, TFLOP/s."""
    telemetry: dict[str, float] = field(default_factory=dict)
    """Temperature and load at the start."""


@dataclass(frozen=True)
class Row:
    """One variant of one workload. Times are for one call, in milliseconds; 0 where nothing was timed."""

    subject: str
    """An operator, a preset or a loss."""
    step: str
    """"forward", "forward + backward", "inference, logits", "inference, labels", "training step", "first result"."""
    shape: str
    batch: int
    precision: str
    """fp32 (IEEE), tf32, fp16 or bf16."""
    variant: str
    role: str
    state: str
    note: str = ""
    """Why the row is wrong or failed, or what else is to be known."""
    p20_ms: float = 0.0
    p50_ms: float = 0.0
    p80_ms: float = 0.0
    rounds: int = 0
    images_per_second: float = 0.0
    tflops: float = 0.0
    """Counted arithmetic (after sub-pixel upsampling has saved its share) over the median, TFLOP/s."""
    gbs: float = 0.0
    """Counted bytes (every tensor in once, out once) over the median, GB/s."""
    share_of_ceiling: float = 0.0
    """The larger of tflops and gbs as a share of the ceiling measured in the same run."""
    floor_ms: float = 0.0
    """The sum over layers of the larger of memory and arithmetic time at the ceilings: the best that could be."""
    peak_bytes: int = 0
    """Most memory allocated during a call beyond what was there before it; 0 where not measured."""
    saved_bytes: int = 0
    """Tensors that autograd keeps for backward, parameters and inputs not counted; 0 without a backward pass."""
    max_error: float = 0.0
    """Largest error of any result as a share of its budget; above 1 is wrong."""
    clock_mhz: float = 0.0
    temperature_c: float = 0.0
    axis: str = ""
    """In a scaling run, what varies: batch, side, width, classes, "processes, weak" or "processes, strong"."""
    value: int = 0

    @property
    def workload(self) -> tuple[str, str, str, str, str, int]:
        """What all variants in one comparison share."""
        return self.subject, self.step, self.shape, self.precision, self.axis, self.value

    @property
    def share_of_floor(self) -> float:
        """The floor's time over the median: 1 would be the floor itself."""
        return self.floor_ms / self.p50_ms if self.p50_ms else 0.0


@dataclass(frozen=True)
class Results:
    """A result file: one environment, many rows."""

    environment: Environment
    rows: tuple[Row, ...]

    @property
    def filename(self) -> str:
        """``<date>-<commit>.json``."""
        return f"{self.environment.date[:10]}-{self.environment.commit}.json"


def write(path: Path, environment: Environment, rows: list[Row]) -> None:
    """Writes a result file whole: a reader, or a run cut short, finds the former one or this one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(_without_defaults(row), ensure_ascii=False) for row in rows)
    text = f'{{"environment": {json.dumps(asdict(environment), indent=1)},\n"rows": [\n{lines}\n]}}\n'
    write_text(path, text)


def read(path: Path) -> Results:
    """Reads a result file.

    Raises:
        ValueError: the file is not one; the message names it and what is wrong.
    """
    try:
        content = json.loads(Path(path).read_text())
        return Results(Environment(**content["environment"]), tuple(Row(**row) for row in content["rows"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result file of this version: {error}") from error


def newest(slug: str, root: Path = RESULTS) -> Results | None:
    """The newest committed results of a device that are not of a scaling run, or None."""
    files = [path for path in (root / slug).glob("*.json") if not path.stem.endswith("-scaling")]
    return max((read(path) for path in files), key=lambda results: results.environment.date, default=None)


def scaling_results(slug: str, root: Path = RESULTS) -> Results | None:
    """The newest row of every point of a device's scaling runs, which are files of their own; None without any."""
    files = [read(path) for path in (root / slug).glob("*-scaling.json")]
    if not files:
        return None
    files.sort(key=lambda results: results.environment.date)
    rows = {(row.workload, row.variant): row for results in files for row in results.rows}
    return Results(files[-1].environment, tuple(rows.values()))


def devices(root: Path = RESULTS) -> list[str]:
    """The slugs of all devices with committed results; CPUs first."""
    slugs = [path.name for path in root.iterdir() if path.is_dir()] if root.is_dir() else []
    return sorted(slugs, key=lambda slug: (not slug.startswith("cpu-"), slug))


def best(rows: list[Row] | tuple[Row, ...], role: str) -> Row | None:
    """The fastest row of a role among those that are right and timed."""
    timed = [row for row in rows if row.role == role and row.state == OK and row.p50_ms]
    return min(timed, key=lambda row: row.p50_ms, default=None)


def by_workload(rows: list[Row] | tuple[Row, ...]) -> dict[tuple, list[Row]]:
    """Rows grouped by :attr:`Row.workload`, in the order of first appearance."""
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.workload, []).append(row)
    return groups


def _without_defaults(row: Row) -> dict:
    """The fields that differ from their defaults, numbers to five digits: files stay small and diffs readable."""
    values = {f.name: getattr(row, f.name) for f in fields(row) if getattr(row, f.name) != f.default}
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in values.items()}
