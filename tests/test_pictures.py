"""Pictures show what they should, where they should."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from fastunet.inference.scores import Score
from fastunet.pictures.curves import curves
from fastunet.pictures.overlay import BACKDROP, CLASS_COLOURS, PALE, overlay, shown_name, upright

NAMES = ("background", "necrotic core", "oedema", "enhancing tumour")


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).astype(int)


def close_to(image: np.ndarray, colour: str) -> np.ndarray:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return (np.abs(image - wanted) <= 30).all(-1)


@pytest.fixture
def head() -> np.ndarray:
    y, x = np.mgrid[:80, :80]
    return np.where(np.hypot(y - 40, x - 40) < 34, 100.0, 0.0)


def test_each_panel_outlines_its_own_labels(head):
    left, right = np.zeros((2, 80, 80), dtype=np.uint8)
    left[20:40, 20:40] = 2
    right[50:60, 50:60] = 3
    image = pixels(overlay(head, [("image", None), ("truth", left), ("prediction", right)], NAMES))
    panels = np.array_split(image[: int(image.shape[0] * 0.88)], 3, axis=1)
    counts = [[close_to(panel, CLASS_COLOURS[c - 1]).sum() for c in (1, 2, 3)] for panel in panels]
    assert counts[0] == [0, 0, 0]
    assert counts[1][1] > 100
    assert counts[1][0] == counts[1][2] == 0
    assert counts[2][2] > 50
    assert counts[2][0] == counts[2][1] == 0
    # The outline lies where the labels lie: their centre relative to the head's window, which spans 74 pixels.
    ys, xs = np.nonzero(close_to(panels[1], CLASS_COLOURS[1]))
    height, width = panels[1].shape[:2]
    assert abs((xs.min() + xs.max()) / 2 / width - (30 - 4) / 74) < 0.05
    assert ys.mean() < height / 2


def test_legend_lists_the_classes_shown(head):
    labels = np.zeros((80, 80), dtype=np.uint8)
    labels[30:50, 30:50] = 1
    with_one = pixels(overlay(head, [("truth", labels)], NAMES))
    legend = with_one[int(with_one.shape[0] * 0.9) :]
    assert close_to(legend, CLASS_COLOURS[0]).sum() > 20
    assert close_to(legend, CLASS_COLOURS[1]).sum() == 0


def test_names_are_no_formulas_and_no_control_characters(head):
    bad = [r"p$\frac$", "_hidden", "a$1_$", "\x1b[31m"]
    labels = np.arange(head.size, dtype=np.uint8).reshape(head.shape) % 5
    for name in bad:
        assert overlay(head, [(name, labels)], ["", *bad]).startswith(b"\x89PNG")
    assert curves([{"epoch": 1, "a": 0.5}], dict.fromkeys(bad, "a"), ("mean", "a")).startswith(b"\x89PNG")
    assert [shown_name(name) for name in bad] == [bad[0], " _hidden", bad[2], r"\x1b[31m"]


@pytest.mark.parametrize("image", [np.zeros((20, 20)), np.full((20, 20), 3.0), np.eye(20)])
def test_featureless_slices_are_drawn(image):
    assert pixels(overlay(image, [("a", None), ("b", np.zeros((20, 20), dtype=np.uint8))], NAMES)).size


def test_upright_puts_the_front_and_the_top_above():
    """Axes run to the left, the back and the top: voxel (x, y, z)."""
    volume = np.zeros((4, 5, 6))
    volume[3, 0, 5] = 1  # left, front, top
    assert np.argwhere(upright(volume[:, :, 5], 2)).tolist() == [[0, 3]]
    assert np.argwhere(upright(volume[:, 0, :], 1)).tolist() == [[0, 3]]
    assert np.argwhere(upright(volume[3, :, :], 0)).tolist() == [[0, 0]]


def test_curves_of_one_and_many_epochs():
    def row(epoch: int) -> dict:
        row = {"epoch": epoch, "train_loss": 1 / epoch, "val_loss": 1.2 / epoch, "dice_foreground": 0.5}
        return row | {f"dice_{name}": 1 - 0.5 / epoch for name in NAMES}

    columns, mean = {name: f"dice_{name}" for name in NAMES[1:]}, ("mean", "dice_foreground")
    short, long = (pixels(curves([row(e) for e in range(1, n + 1)], columns, mean)) for n in (1, 40))
    assert short.shape == long.shape
    assert close_to(long[:, : long.shape[1] // 2], "#0072b2").sum() > 100, "the training loss is on the left"
    assert close_to(long[:, long.shape[1] // 2 :], "#0072b2").sum() == 0


def test_the_legend_ends_where_the_picture_does(head):
    labels = np.arange(head.size, dtype=np.uint8).reshape(head.shape) % 60
    drawn = pixels(overlay(head, [("a", labels), ("b", labels)], ["", *(f"organ number {c}" for c in range(60))]))
    legend = drawn[-40:]
    assert close_to(legend, PALE).any()
    for border in (legend[:, :4], legend[:, -4:]):
        assert close_to(border, BACKDROP).all()


def test_curves_of_many_structures(recwarn):
    """Their names would leave no room for the axes."""
    curves([{"epoch": 1, "a": 0.5}], {f"rib {number}": "a" for number in range(117)}, ("mean", "a"))
    assert not recwarn.list


def test_report_is_one_page_that_needs_nothing_else(head):
    from html.parser import HTMLParser

    from fastunet.pictures.report import Picture, commands, page, score_table

    picture = overlay(head, [("image", None)], NAMES)
    nan = float("nan")
    scores = [Score("case <1>", "oedema", "class", 0.75, 0.6, 1.0, nan, 0.5, 10, 12),
              Score("case <1>", "whole tumour", "region", nan, nan, nan, nan, nan, 0, 0)]  # fmt: skip
    html = page(title="T & T", lead="a < b", facts=[("1", "one")],
                sections=[("S", [Picture(picture, 'the "caption"'), score_table(scores),
                                 commands(["train", "my data"])])])  # fmt: skip
    seen: list[tuple[str, dict]] = []
    text: list[str] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag, attrs):
            seen.append((tag, dict(attrs)))

        def handle_data(self, data):
            text.append(data)

    Reader().feed(html)
    links = [v for _, attrs in seen for k, v in attrs.items() if k in ("src", "href")]
    assert len(links) == 1
    assert links[0].startswith("data:image/png;base64,")
    assert "url(" not in html
    for words in ("T & T", "a < b", "case <1>", "oedema", "0.750", "–", 'the "caption"', "train 'my data'"):
        assert any(words in part for part in text), words
