"""The checks can fail: a barrier, wait or fence taken out of a kernel is seen, unless a neighbour does its work."""

from __future__ import annotations

from collections import Counter

import pytest

from fastunet.kernels import _launch

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="kernels are interpreted in this process, not compiled")

ALWAYS = {"fence.proxy.async", "mbarrier.try_wait", "cp.async.wait_group", "cp.async.bulk.wait_group"}
"""Of these the kernels have none to spare. Of barriers and waits for products, some are followed by another."""


@pytest.mark.parametrize("name", ["box", "two_rows", "pointer", "upsample"])
def test_deletions_are_caught(name):
    from .mutants import study

    verdicts = list(study(name))
    survivors = [(statement, line) for statement, line, verdict in verdicts if verdict == "survives"]
    found = Counter(statement for statement, _, _ in verdicts)
    print(name, dict(found), "survivors:", survivors)
    assert ALWAYS & set(found)
    assert not [s for s in survivors if s[0] in ALWAYS]
    for statement in ("bar.sync", "wgmma.wait_group"):
        assert sum(s == statement for s, _ in survivors) < found[statement] or not found[statement], statement
