"""The layers of a U-Net for one input size: shapes, parameters, arithmetic and memory, without running it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fastunet.architecture import Architecture

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Layer:
    """One layer: its ``inputs`` by name, its output ``shape`` (C, H, W) and where it stands in the drawing.

    ``flop`` counts two for each multiply-add of the plain form, biases and activations left out. ``column`` is 0 for
    the contracting path, 1 for the bottleneck, 2 for the expanding path; ``level`` is the number of poolings above.
    """

    name: str
    kind: str
    inputs: tuple[str, ...]
    input_shapes: tuple[Shape, ...]
    shape: Shape
    parameters: int
    flop: int
    column: int
    level: int

    def activation_bytes(self, element_size: int = 4) -> int:
        """Bytes of the output of one image."""
        channels, height, width = self.shape
        return channels * height * width * element_size


class _Builder:
    """Appends layers, naming those with weights after the state dict, which lists them in order of use."""

    def __init__(self, weight_keys: Iterable[str], style: Architecture) -> None:
        self.layers: list[Layer] = []
        self.style = style
        names = (key.removesuffix(".weight") for key in weight_keys if key.endswith(".weight"))
        self._names = iter(name for name in names if not name.rpartition(".")[2].startswith("norm"))
        self._by_name: dict[str, Layer] = {}

    def add(self, kind: str, inputs: list[str], shape: Shape, column: int, level: int, *, name: str = "",
            taps: int = 0, bias: bool = True, spread: int = 1, norm: bool = False) -> str:
        """``taps`` is kernel height × width, 0 without weights; ``spread`` the outputs that share one set of taps;
        ``norm`` adds weight and bias of one."""
        sources = tuple(self._by_name[i].shape for i in inputs)
        channels_in = sum(s[0] for s in sources)
        weights = shape[0] * channels_in * taps
        layer = Layer(
            name=next(self._names) if taps else name,
            kind=kind,
            inputs=tuple(inputs),
            input_shapes=sources,
            shape=shape,
            parameters=weights + (shape[0] if taps and bias else 0) + (2 * shape[0] if norm else 0),
            flop=2 * weights * shape[1] * shape[2] // spread,
            column=column,
            level=level,
        )
        self.layers.append(layer)
        self._by_name[layer.name] = layer
        return layer.name

    def shape(self, name: str) -> Shape:
        return self._by_name[name].shape

    def conv(self, source: str, channels: int, pad: int, column: int, level: int, stride: int = 1) -> str:
        _, h, w = self.shape(source)
        shape = (channels, (h - 3 + 2 * pad) // stride + 1, (w - 3 + 2 * pad) // stride + 1)
        first = "Conv 3×3" if stride == 1 else f"Conv 3×3 / {stride}"
        kind = " + ".join([first, *([f"{self.style.norm} norm"] if self.style.norm else []), self.activation])
        return self.add(kind, [source], shape, column, level, taps=9, bias=self.style.bias, norm=bool(self.style.norm))

    @property
    def activation(self) -> str:
        return "LeakyReLU" if self.style.negative_slope else "ReLU"


def layers(model: Any, height: int, width: int) -> list[Layer]:
    """The layers of ``model`` (a ``UNet`` of this package) for inputs of ``height`` × ``width``, in order of use.

    Raises:
        ValueError: the size does not fit a network with valid padding; the message names the nearest that do.
    """
    config, style = model.config, model.architecture
    depth, widths, valid = style.depth, style.widths, style.padding == "valid"
    pad = 0 if valid else 1
    out_height, out_width = model.output_size(height, width)
    build = _Builder(model.state_dict(), style)
    last = build.add("Input", [], (config["in_channels"], height, width), 0, 0, name="input")
    padded = (height, width) if valid else style.padded_size(height, width)
    if padded != (height, width):
        shape = (config["in_channels"], *padded)
        last = build.add("Pad to a multiple", [last], shape, 0, 0, name="pad")
    skips = []
    for level in range(depth):
        for index in range(2):
            strided = style.down == "stride" and level > 0 and index == 0
            last = build.conv(last, widths[level], pad, 0, level, 2 if strided else 1)
        skips.append(last)
        channels, h, w = build.shape(last)
        if style.down == "pool":
            last = build.add("Max-pool 2×2", [last], (channels, h // 2, w // 2), 0, level, name=f"pool{level}")
    for index in range(2):
        strided = style.down == "stride" and depth > 0 and index == 0
        last = build.conv(last, widths[depth], pad, 1, depth, 2 if strided else 1)
    if config["dropout"]:
        last = build.add(f"Dropout {config['dropout']:g}", [last], build.shape(last), 1, depth, name="dropout")
    for level in reversed(range(depth)):
        last = _up(build, last, config["up"], widths[level], level)
        (up_channels, h, w), skip = build.shape(last), skips[level]
        if style.odd != "image" and (h, w) != build.shape(skip)[1:]:
            _, h, w = build.shape(skip)
            last = build.add(f"Pad ({style.odd})", [last], (up_channels, h, w), 2, level, name=f"pad{level}")
        kind = "Concat (skip cropped)" if valid else "Concat"
        shape = (build.shape(skip)[0] + up_channels, h, w)
        last = build.add(kind, [skip, last], shape, 2, level, name=f"concat{level}")
        for _ in range(2):
            last = build.conv(last, widths[level], pad, 2, level)
    _, h, w = build.shape(last)
    last = build.add("Conv 1×1", [last], (config["num_classes"], h, w), 2, 0, taps=1)
    if (h, w) != (out_height, out_width):
        last = build.add("Crop", [last], (config["num_classes"], out_height, out_width), 2, 0, name="crop")
    build.add("Softmax", [last], build.shape(last), 2, 0, name="softmax")
    return build.layers


def _up(build: _Builder, source: str, up: str, channels: int, level: int) -> str:
    _, h, w = build.shape(source)
    shape = (channels, 2 * h, 2 * w)
    if up == "transpose":
        return build.add("Transposed conv 2×2", [source], shape, 2, level, taps=4, spread=4)
    return build.add(f"Upsample ×2, conv 2×2 + {build.activation}", [source], shape, 2, level, taps=4)


def table(rows: list[Layer], element_size: int = 4) -> str:
    """``rows`` as text: name, type, output shape, parameters, GFLOP and activation memory of one image, and totals."""
    header = ("layer", "type", "output C×H×W", "parameters", "GFLOP", "MiB")
    cells = [
        (r.name, r.kind, "×".join(map(str, r.shape)), f"{r.parameters:,}" if r.parameters else "",
         f"{r.flop / 1e9:.3f}" if r.flop else "", f"{r.activation_bytes(element_size) / 2**20:.2f}")
        for r in rows
    ]  # fmt: skip
    totals = ("total", "", "", f"{sum(r.parameters for r in rows):,}", f"{sum(r.flop for r in rows) / 1e9:.3f}",
              f"{sum(r.activation_bytes(element_size) for r in rows) / 2**20:.2f}")  # fmt: skip
    widths = [max(len(row[i]) for row in [header, totals, *cells]) for i in range(len(header))]

    def line(row: tuple[str, ...]) -> str:
        left = [cell.ljust(width) for cell, width in zip(row[:3], widths[:3])]
        return "  ".join(left + [cell.rjust(width) for cell, width in zip(row[3:], widths[3:])]).rstrip()

    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    return "\n".join([line(header), rule, *map(line, cells), rule, line(totals)])
