"""Pictures of cells: the same for the same seed, and no easier than they say."""

from __future__ import annotations

import numpy as np
import pytest

from fastunet.data import make_cells, read_labels, read_volume
from fastunet.data.border_weights import border_term, components
from fastunet.data.cells import cells
from fastunet.errors import UserError


def test_files(tmp_path):
    cases = make_cells(tmp_path, 3, 7, sizes=((64, 64), (70, 90)))
    assert [case.name for case in cases] == ["cells_000", "cells_001", "cells_002"]
    assert [read_volume(case.files[0]).data.shape for case in cases] == [(64, 64, 1), (70, 90, 1), (64, 64, 1)]
    assert cases[0].label_map.values == (0, 255)
    pixels, mask = cells(np.random.default_rng([7, 1]), (70, 90))
    np.testing.assert_array_equal(read_volume(cases[1].files[0]).data[..., 0], pixels)
    np.testing.assert_array_equal(read_labels(cases[1].label, cases[1].label_map)[..., 0], mask == 255)
    with pytest.raises(UserError, match="at least 64 pixels, got 64 × 63"):
        make_cells(tmp_path / "small", 1, 0, sizes=((64, 63),))
    with pytest.raises(UserError, match="1 pictures of cells take 476837 MB"):
        make_cells(tmp_path / "large", 1, 0, sizes=((10**6, 10**6),))
    with pytest.raises(UserError, match="at least one size"):
        make_cells(tmp_path / "none", 1, 0, sizes=())


def test_cells_touch_and_no_threshold_finds_them():
    for seed in range(3):
        pixels, mask = cells(np.random.default_rng(seed), (160, 160))
        inside = mask > 0
        assert 0.1 < inside.mean() < 0.9
        assert components(inside)[1] > 10
        assert (border_term(inside.astype(np.uint8)) > 5).mean() > 0.01  # gaps between neighbours
        best = max(
            2 * (guess & inside).sum() / (guess.sum() + inside.sum())
            for threshold in range(256) for guess in (pixels > threshold, pixels < threshold)
        )  # fmt: skip
        assert best < 0.9
