"""Every kernel with shared memory leaves the same bytes whatever the order of its warps, programs and copies."""

from __future__ import annotations

import pytest
import torch

from fastunet.kernels import _launch

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="kernels are interpreted in this process, not compiled")


@pytest.mark.parametrize("name", ["box", "rows", "stacked", "pointer", "weight_grad", "upsample"])
def test_warps_one_by_one(name):
    from .driver import emulated
    from .launch import EAGER, LAZY, Emulator, Schedule
    from .mutants import LAUNCHES

    orders = [Schedule(warps=order, leader=leader, lazy=lazy, reverse=lazy)
              for order, leader, lazy in (("ascending", 31, False), ("descending", 5, True))]  # fmt: skip
    torch.manual_seed(0)
    with emulated(90, Emulator((LAZY, EAGER, *orders))) as emulator, _launch.poisoned():
        LAUNCHES[name]()()
    assert len(emulator.records) >= 4
