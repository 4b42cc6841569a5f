"""Every kernel that the reference networks launch, compiled for several GPUs, holds what an expert wants to see.

By default every distinct kernel in bfloat16 for sm_90, and one of each kernel function for the other dtypes and
architectures; ``--full`` compiles all of them.
"""

from __future__ import annotations

import contextlib
import json
import os

import pytest
import torch
from fastunet.kernels import _launch, _tuned

from fastunet.kernel_table import distinct, examine_all, format_table, uses
from fastunet.layers import CASES
from fastunet.machine_code import GFX942

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter has no machine code")

THREADS = min(2, os.cpu_count())
MODES = {"bf16": torch.bfloat16, "fp16": torch.float16, "tf32": torch.float32, "ieee": torch.float32}
ALL = [(architecture, mode) for architecture in (80, 90, 100) for mode in MODES] + [(GFX942, "bf16"), (GFX942, "ieee")]

MOST_KERNELS = {"brats 128": 80, "brats 240": 80, "isbi 572": 80}
"""How many kernels the first training step of a network may compile at batch 16."""


@contextlib.contextmanager
def products(mode: str):
    previous = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = mode != "ieee"
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32 = previous


def one_of_each(all_uses):
    """The first use of each kernel function by each operator."""
    found = {}
    for use in all_uses:
        found.setdefault((use.launch.kernel.__name__, use.call.operator), use)
    return list(found.values())


def check(all_uses, show_table, title):
    rows = examine_all(all_uses, THREADS)
    show_table(f"{title}\n{format_table(rows)}")
    assert rows
    wrong = [f"{r.report.kernel} ({r.use.case}, {r.use.call.layer}, {r.use.call.operator}, batch "
             f"{next(iter(r.use.call.arguments.values())).shape[0]}): {'; '.join(r.failures)}"
             for r in rows if r.failures]  # fmt: skip
    assert not wrong, f"{len(wrong)} of {len(rows)} kernels\n" + "\n".join(wrong)


@pytest.mark.parametrize("architecture, mode", ALL)
def test_kernels(architecture, mode, show_table, request):
    with products(mode):
        if request.config.getoption("--full", default=False) or (architecture, mode) == (90, "bf16"):
            chosen = uses(architecture, MODES[mode]) + uses(architecture, MODES[mode], batch=1)
        else:
            chosen = one_of_each(uses(architecture, MODES[mode], names=["brats 128"])
                                 + uses(architecture, MODES[mode], names=["isbi 572"]))  # fmt: skip
        check(chosen, show_table, f"{architecture} {mode}")


@pytest.mark.parametrize("file", _tuned.files(), ids=lambda path: path.stem)
@pytest.mark.parametrize("mode", MODES)
def test_committed_winners(file, mode, show_table):
    architecture = json.loads(file.read_text())["architecture"]
    with products(mode):
        check(uses(architecture, MODES[mode], gpu=file.stem), show_table, f"{file.stem} {mode}")


@pytest.mark.parametrize("name", CASES)
def test_first_use_compiles_few_kernels(name):
    compiled = distinct(uses(90, torch.bfloat16, names=[name]))
    assert len(compiled) <= MOST_KERNELS[name]
