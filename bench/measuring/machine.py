"""What machine this is: names, versions, cache sizes, and clocks and temperature as they are (nothing is set)."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
from importlib import metadata
from pathlib import Path

import torch

from bench.measuring.ceilings import measure_ceilings
from bench.measuring.rows import Environment

_REPOSITORY = Path(__file__).parents[2]


def default_device() -> torch.device:
    """CUDA if there is a usable device, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def environment(device: torch.device) -> Environment:
    """Describes the machine and measures its ceilings (a few seconds)."""
    copy_gbs, matmul_tflops = measure_ceilings(device)
    name = device_name(device)
    return Environment(
        device=name,
        slug=slug(name, device),
        driver=_nvidia_smi("driver_version") if device.type == "cuda" else platform.release(),
        versions=versions(),
        commit=commit(),
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        threads=torch.get_num_threads(),
        copy_gbs=copy_gbs,
        matmul_tflops=matmul_tflops,
        telemetry=telemetry(device),
    )


def device_name(device: torch.device) -> str:
    """The GPU's name, or the CPU's with its number of usable cores."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = re.search(r"model name\s*:\s*(.+)", _read("/proc/cpuinfo"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{model.group(1).strip() if model else platform.processor() or platform.machine()}, {cores} cores"


def slug(name: str, device: torch.device) -> str:
    """``name`` as a folder name; those of CPUs start with "cpu-"."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return plain if device.type == "cuda" else f"cpu-{plain}"


def commit() -> str:
    """The short commit of this checkout, "-dirty" if files other than results differ, "unknown" outside of git."""
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        changed = _git("status", "--porcelain", "--", "fastunet", "kernels", "bench/*.py")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return f"{head}-dirty" if changed else head


def versions() -> dict[str, str]:
    """Versions of what decides the speed."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "monai", "fastunet"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        found |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return found


def cache_bytes(device: torch.device) -> int:
    """The last-level cache that a rotation of inputs must exceed."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    text = _read("/sys/devices/system/cpu/cpu0/cache/index3/size").strip()
    return int(text[:-1]) * 1024 if text.endswith("K") else 32 * 2**20


def telemetry(device: torch.device) -> dict[str, float]:
    """Clock, temperature and power of a GPU, or the load average of a CPU, at this moment."""
    if device.type != "cuda":
        return {"load": os.getloadavg()[0]}
    names = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")
    found = {}
    for name, text in zip(names, _nvidia_smi(",".join(names)).split(",")):
        try:
            found[name] = float(text)
        except ValueError:
            continue
    return found


def _nvidia_smi(query: str) -> str:
    """The answer of a pure query about the current device; "" where the tool is missing or does not answer."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    index = str(torch.cuda.current_device())
    command = [tool, f"--query-gpu={query}", "--format=csv,noheader,nounits", "-i", index]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except subprocess.TimeoutExpired:
        return ""
    return answer.stdout.strip() if answer.returncode == 0 else ""


def _git(*arguments: str) -> str:
    run = subprocess.run(["git", *arguments], cwd=_REPOSITORY, capture_output=True, text=True, check=True)
    return run.stdout.strip()


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
