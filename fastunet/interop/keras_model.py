"""The ``config.json`` of a Keras 3 functional model for a network of "same" convolutions and nearest upsampling."""

from __future__ import annotations

from typing import Any

from fastunet.architecture import Architecture


class _Graph:
    """Layers in the order in which they are added; each is named by its class and count, as Keras does."""

    def __init__(self) -> None:
        self.layers: list[dict[str, Any]] = []
        self._counts: dict[str, int] = {}

    def add(self, kind: str, stem: str, inputs: list[str], **config: Any) -> str:
        """Adds a layer that reads the layers ``inputs``, and returns its name."""
        count = self._counts.get(stem, 0)
        self._counts[stem] = count + 1
        name = f"{stem}_{count}" if count else stem
        tensors = [{"class_name": "__keras_tensor__", "config": {"shape": [None] * 4, "dtype": "float32",
                    "keras_history": [i, 0, 0]}} for i in inputs]  # fmt: skip
        nodes: list[Any] = [{"args": [tensors] if len(tensors) > 1 else tensors, "kwargs": {}}] if inputs else []
        self.layers.append({"module": "keras.layers", "class_name": kind, "config": {"name": name, **config},
                            "registered_name": None, "name": name, "inbound_nodes": nodes})  # fmt: skip
        return name

    def conv(self, x: str, filters: int, side: int = 3, activation: str = "relu") -> str:
        return self.add("Conv2D", "conv2d", [x], filters=filters, kernel_size=[side, side], padding="same",
                        activation=activation, kernel_initializer="he_normal")  # fmt: skip


def functional_config(architecture: Architecture) -> dict[str, Any]:
    """The model with a softmax head, for ``keras.saving.load_model``: images of any size that 2**depth divides.

    Raises:
        ValueError: valid or transposed convolutions, norms and the like, which the Keras source does not have.
    """
    if not architecture.is_classic:
        raise ValueError("a .keras archive is written of networks of convolutions, ReLU and pooling alone")
    if (architecture.padding, architecture.up) != ("same", "upsample"):
        raise ValueError(f"a .keras archive is written for padding 'same' and up 'upsample', not "
                         f"{architecture.padding!r} and {architecture.up!r}: save .weights.h5")  # fmt: skip
    graph = _Graph()
    x = graph.add("InputLayer", "input_layer", [], batch_shape=[None, None, None, architecture.in_channels])
    *levels, bottom = architecture.widths
    skips = []
    for filters in levels:
        x = graph.conv(graph.conv(x, filters), filters)
        skips.append(x)
        x = graph.add("MaxPooling2D", "max_pooling2d", [x], pool_size=[2, 2])
    x = graph.add("Dropout", "dropout", [graph.conv(graph.conv(x, bottom), bottom)], rate=architecture.dropout)
    for filters in reversed(levels):
        x = graph.conv(graph.add("UpSampling2D", "up_sampling2d", [x], size=[2, 2]), filters, side=2)
        x = graph.add("Concatenate", "concatenate", [skips.pop(), x], axis=3)
        x = graph.conv(graph.conv(x, filters), filters)
    x = graph.conv(x, architecture.num_classes, side=1, activation="softmax")
    config = {"name": "unet", "trainable": True, "layers": graph.layers, "input_layers": ["input_layer", 0, 0],
              "output_layers": [x, 0, 0]}  # fmt: skip
    return {"module": "keras.src.models.functional", "class_name": "Functional", "config": config,
            "registered_name": "Functional", "build_config": {"input_shape": None}, "compile_config": None}  # fmt: skip
