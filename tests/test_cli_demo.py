"""The demo in small: every step runs and every file is there."""

from __future__ import annotations

import base64
import io
import re

from PIL import Image

from fastunet.cli import demo
from tests.cli_helpers import files_below, run


def test_demo(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SHAPE", (32, 32, 17))
    monkeypatch.setattr(demo, "TRAINING_CASES", 4)
    monkeypatch.setattr(demo, "UNSEEN_CASES", 3)
    monkeypatch.setattr(demo, "NETWORK", dict(width=4, depth=2))
    monkeypatch.setattr(demo, "TRAINING", demo.TRAINING | dict(epochs=1, val_fraction=0.25))
    for _ in range(2):  # a second run replaces the first
        assert run("demo", "--out", tmp_path / "demo", "--seed", "3", "--device", "cpu") == 0
    files = files_below(tmp_path / "demo")
    for name in ("report.html", "scores.csv", "network.png", "run/best.safetensors", "segmentation/Phantom_000.nii.gz"):
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
        assert f"Phantom_00{index}" in page
