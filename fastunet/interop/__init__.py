"""Networks and weights of other libraries, in and out.

Imports the network and its operators; the other libraries are imported at the call that needs them.
"""

from fastunet.interop.checkpoints import load_torch_weights
from fastunet.interop.fusion import fuse
from fastunet.interop.keras import load_keras_weights, save_keras_weights
from fastunet.interop.onnx import to_onnx
from fastunet.interop.pretrained import from_pretrained, save_pretrained

__all__ = [
    "from_pretrained",
    "fuse",
    "load_keras_weights",
    "load_torch_weights",
    "save_keras_weights",
    "save_pretrained",
    "to_onnx",
]
