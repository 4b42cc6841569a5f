"""A quick version of the campaigns: nothing may be lost."""

from __future__ import annotations

import pytest

from tests.faults.__main__ import run

QUICK = {"volumes": 60, "documents": 60, "kills": 2, "disk": 3, "two": 3, "arguments": 250, "guard": 36, "soak": 1}


@pytest.mark.parametrize("name", QUICK)
def test_nothing_is_lost(name, tmp_path):
    outcome = run(name, tmp_path, QUICK[name], 0, 600)
    assert outcome.tried >= QUICK[name]
    assert not outcome.lost, "\n".join(outcome.lost[:10])
