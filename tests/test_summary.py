"""The layer table and the drawing describe what the network really does."""

from __future__ import annotations

import io
import re
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from PIL import Image
from torch import nn

from fastunet import reference
from fastunet.pictures.network import draw
from fastunet.pictures.summary import layers, table
from tests.cli_helpers import run

NETWORKS = [
    (dict(width=2), (32, 48)),
    (dict(width=3, depth=3, up="transpose", dropout=0.0), (17, 31)),
    (dict(width=2, depth=4, padding="valid", up="transpose", in_channels=1, num_classes=2), (188, 204)),
    (dict(width=2, depth=0, padding="valid"), (9, 12)),
]


@pytest.mark.parametrize("options, size", NETWORKS)
def test_shapes_and_parameters_are_those_of_a_forward_pass(options, size):
    model = reference.UNet(**options).eval()
    rows = layers(model, *size)
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            module.register_forward_hook(lambda m, args, out, name=name: shapes.__setitem__(name, tuple(out.shape[1:])))
    with torch.inference_mode():
        out = model(torch.zeros(1, model.architecture.in_channels, *size))
    by_name = {row.name: row for row in rows}
    assert {name: by_name[name].shape for name in shapes} == shapes
    assert rows[-1].shape == tuple(out.shape[1:])
    assert sum(row.parameters for row in rows) == sum(p.numel() for p in model.parameters())
    for name, module in model.named_modules():
        if name in shapes:
            assert by_name[name].parameters == sum(p.numel() for p in module.parameters())
    for row in rows:
        assert row.input_shapes == tuple(by_name[source].shape for source in row.inputs)


def test_arithmetic_of_the_reference_networks():
    """6.83 GFLOP for 128×128 by hand: 2 · taps · C_in · C_out a pixel; pinned sizes of the 572 → 388 walk."""
    with torch.device("meta"):
        brats, isbi = reference.UNet.from_preset("brats"), reference.UNet.from_preset("isbi")
    total = 2 * 128 * 128 * 9 * (2 * 32 + 32 * 32)  # encoder 0
    for level, width in ((1, 64), (2, 128), (3, 256), (4, 512)):
        total += 2 * (128 >> level) ** 2 * 9 * (width // 2 * width + width * width)
    for level, width in ((3, 256), (2, 128), (1, 64), (0, 32)):
        total += 2 * (128 >> level) ** 2 * (4 * 2 * width * width + 9 * (2 * width * width + width * width))
    total += 2 * 128 * 128 * 32 * 4
    rows = layers(brats, 128, 128)
    assert sum(row.flop for row in rows) == total
    assert 6.83e9 < total < 6.84e9
    assert "7,759,908" in table(rows)
    walk = [row.shape[1] for row in layers(isbi, 572, 572) if row.kind.startswith(("Conv 3", "Max", "Trans"))]
    assert walk == [570, 568, 284, 282, 280, 140, 138, 136, 68, 66, 64, 32, 30, 28,
                    56, 54, 52, 104, 102, 100, 200, 198, 196, 392, 390, 388]  # fmt: skip
    assert "31,030,658" in table(layers(isbi, 572, 572))


def test_activation_memory():
    rows = layers(reference.UNet(width=2, depth=1), 4, 4)
    assert [row.activation_bytes() for row in rows[:3]] == [2 * 16 * 4, 2 * 16 * 4, 2 * 16 * 4]
    assert rows[1].activation_bytes(2) == 2 * 16 * 2


@pytest.mark.parametrize("options, size", NETWORKS)
def test_drawing_names_every_layer_and_shape(options, size, tmp_path):
    rows = layers(reference.UNet(**options), *size)
    svg, png = draw(rows, tmp_path / "net.v1", title="a network")
    assert (svg.name, png.name) == ("net.v1.svg", "net.v1.png")
    texts = " ".join(t.text or "" for t in ElementTree.parse(svg).iter("{http://www.w3.org/2000/svg}text"))
    for row in rows:
        assert row.name in texts or row.kind in texts
        assert "×".join(map(str, row.shape)) in texts
    image = Image.open(io.BytesIO(png.read_bytes()))
    assert min(image.size) > 300
    assert len(image.convert("RGB").getcolors(2**24)) > 20


def test_command(checkpoint, tmp_path, capsys):
    assert run("summary", checkpoint, "--size", "40", "24", "--out", tmp_path / "sub" / "net") == 0
    out = capsys.readouterr().out
    assert "4×40×24" in out
    assert sorted(p.name for p in (tmp_path / "sub").iterdir()) == ["net.png", "net.svg"]
    assert run("summary", "--preset", "isbi") == 0
    out = capsys.readouterr().out
    assert re.search(r"head +Conv 1×1 +2×388×388", out)
    assert "31,030,658" in out
