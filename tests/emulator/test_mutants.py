"""The checks can fail: a barrier, wait or fence taken out of a kernel is seen, unless a neighbour does its work."""

from __future__ import annotations

from collections import Counter

import pytest

from fastunet.kernels import _launch

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="kernels are interpreted in this process, not compiled")

ALWAYS = {"fence.proxy.async", "mbarrier.try_wait", "cp.async.wait_group", "cp.async.bulk.wait_group"}
"""Of these the kernels have none to spare. Of barriers and waits for products, some are followed by another."""
SPARE = {"stacked": {"fence.proxy.async"}}
"""Triton 3.9 puts one before each product of what cp.async brought; 3.6 has none there, nor does the emulator ask."""


@pytest.mark.parametrize("name", ["box", "stacked", "pointer", "upsample"])
def test_deletions_are_caught(name):
    from .mutants import study

    verdicts = list(study(name))
    survivors = [(statement, line) for statement, line, verdict in verdicts if verdict == "survives"]
    found = Counter(statement for statement, _, _ in verdicts)
    print(name, dict(found), "survivors:", survivors)
    assert ALWAYS & set(found)
    spare = SPARE.get(name, set())
    assert not [s for s in survivors if s[0] in ALWAYS - spare]
    for statement in ("bar.sync", "wgmma.wait_group", *spare):
        assert sum(s == statement for s, _ in survivors) < found[statement] or not found[statement], statement
