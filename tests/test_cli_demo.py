"""The demo in small: every step runs and every file is there."""

from __future__ import annotations

import base64
import dataclasses
import io
import re

import pytest
from PIL import Image

from fastunet.cli import demo
from tests.cli_helpers import files_below, run


@pytest.mark.parametrize(
    ("preset", "options", "case", "suffixes"),
    [
        ("brats", dict(shape=(32, 32, 17)), "Phantom_00", (".nii.gz", ".png")),
        ("isbi", dict(sizes=((64, 64), (64, 80))), "cells_00", (".png", "_overlay.png")),
    ],
)
def test_demo(preset, options, case, suffixes, tmp_path, monkeypatch, capsys):
    plan = demo.PLANS[preset]
    training = plan.training | dict(width=4, depth=2, epochs=1, val_fraction=0.25)
    small = dict(options=options, training_cases=4, unseen_cases=3, training=training)
    monkeypatch.setitem(demo.PLANS, preset, dataclasses.replace(plan, **small))
    for name in ("data/stale", "segmentation/stale", demo._MARKER) if preset == "isbi" else ():  # an earlier demo
        (tmp_path / "demo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "demo" / name).write_text("")
    assert run("demo", "--preset", preset, "--out", tmp_path / "demo", "--seed", "3", "--device", "cpu") == 0
    files = files_below(tmp_path / "demo")
    assert not [name for name in files if "stale" in name]
    assert {name.split("/")[0] for name in files} <= {*demo._MADE}, "the next demo would not replace it"
    made = [f"segmentation/{case}0{suffix}" for suffix in suffixes]
    for name in ("report.html", "scores.csv", "network.png", "run/best.safetensors", *made):
        assert name in files
    out = capsys.readouterr().out
    assert "Mean foreground Dice" in out
    page = (tmp_path / "demo" / "report.html").read_text()
    pictures = re.findall(r'<img alt="([^"]*)" src="data:image/png;base64,([^"]+)"', page)
    assert len(pictures) == 5
    for _, data in pictures:
        Image.open(io.BytesIO(base64.b64decode(data))).verify()
    captions = " ".join(caption for caption, _ in pictures)
    for word in ("median", "best", "worst", "Loss and Dice"):
        assert word in captions
    assert not re.search(r'(src|href)="(?!data:)', page)
    for index in range(3):
        assert f"{case}{index}" in page
