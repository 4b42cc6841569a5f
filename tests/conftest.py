"""What every test shares: a cache of compiled code for each kind of processor."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch

# Inductor takes up code that it once compiled for wider vectors, or narrower ones, and then computes garbage.
os.environ.setdefault(
    "TORCHINDUCTOR_CACHE_DIR",
    str(Path(tempfile.gettempdir()) / f"torchinductor-fastunet-{torch.backends.cpu.get_cpu_capability()}"),
)
