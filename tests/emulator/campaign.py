"""The kernels' tests in the emulator for a target, in processes that may be interrupted and go on later."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
OLDEST = ROOT / ".venv" / "triton-3.6.0"
_DTYPES = {"bf16": "bf16 or bfloat16", "fp16": "(fp16 or float16) and not bfloat16", "fp32": "fp32 or float32",
           "tf32": "fp32 or float32"}  # fmt: skip


@dataclass(frozen=True)
class Target:
    """``triton`` is "3.6.0" or "newest"."""

    architecture: int
    triton: str
    tf32: bool

    @property
    def label(self) -> str:
        """Names the target and the state of the kernels, so that results of other kernels do not count."""
        return f"sm_{self.architecture} {self.triton}{' tf32' if self.tf32 else ''} {fingerprint()}"


def fingerprint() -> str:
    """Of every file in kernels/."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def collected() -> set[str]:
    """The names of the tests of all kernels as they are now."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "tests.emulator.plugin", "tests/kernels",
               "--emulate", "90", "--log", os.devnull, "--label", "none"]
    lines = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    return {line for line in lines if "::" in line}


def targets(architectures: list[int], tritons: list[str], dtype: str | None) -> list[Target]:
    """bfloat16, float16 and IEEE float32 in one run, tf32 in another."""
    modes = [dtype == "tf32"] if dtype else [False, True]
    return [Target(a, t, mode) for mode in modes for t in tritons for a in architectures]


def run(target: Target, log: Path, *, jobs: int = 1, dtype: str | None = None, keyword: str = "",
        subset: bool = False, files: tuple[str, ...] = ("",)) -> None:  # fmt: skip
    """Runs what ``log`` does not hold yet of ``target``, in ``jobs`` processes, and appends to it; of the tests of all
    kernels or of some ``files``."""
    wanted = [f"({part})" for part in (_DTYPES["tf32"] if target.tf32 else _DTYPES.get(dtype or ""), keyword) if part]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=no", "-p", "tests.emulator.plugin",
               *(f"tests/kernels/{file}" for file in files), "-k", " and ".join(wanted),
               "--emulate", str(target.architecture), "--log", str(log), "--label", target.label]
    command += ["--tf32"] * target.tf32 + ["--subset"] * subset
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    if target.triton == "3.6.0":
        environment["PYTHONPATH"] = os.pathsep.join([str(OLDEST), environment.get("PYTHONPATH", "")])
    log.parent.mkdir(parents=True, exist_ok=True)
    processes = [subprocess.Popen([*command, "--share", f"{i + 1}/{jobs}"], cwd=ROOT, env=environment)
                 for i in range(jobs)]  # fmt: skip
    try:
        for process in processes:
            process.wait()
    finally:
        for process in processes:
            process.terminate()
