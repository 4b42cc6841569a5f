"""Networks as ONNX files, of standard operators only, by PyTorch's own exporter. Needs onnx and onnxscript."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastunet import reference
from fastunet.arguments import checked
from fastunet.blocks import ConvBlock, DecoderBlock
from fastunet.errors import UserError
from fastunet.files import write_bytes
from fastunet.touched import attached, why_touched
from fastunet.unet import UNet

_FORWARDS = UNet.forward, reference.UNet.forward
_PLAIN: dict[type[nn.Module], type[nn.Module]] = {ConvBlock: reference.ConvBlock, DecoderBlock: reference.DecoderBlock}


@checked
def to_onnx(model: reference.UNet, path: str | Path) -> None:
    """Writes the network's logits in evaluation mode as ONNX: "images" (N, C_in, H, W) float32 → "logits".

    N, H and W stay free: with "same" any size works, odd ones too; with "valid" those that ``model.output_size`` takes.
    What hangs on a module or sits in a layer's place is exported with it.

    Raises:
        TypeError: the model is no U-Net of this package.
        ValueError: onnx or onnxscript is not installed, the model has hooks or a forward of its own, or
            the file cannot be written.
    """
    if type(model).forward not in _FORWARDS or attached(model, backward=False):
        raise ValueError("to_onnx exports what is inside of the model: take off its own hooks, or its own forward")
    try:
        import onnx
        import onnxscript  # noqa: F401 - what the exporter is written in
    except ImportError as error:
        raise UserError("ONNX files need onnx and onnxscript: pip install 'fastunet[onnx]'") from error
    twin = plain_twin(model).float().cpu().eval()
    for block in [*twin.modules()]:
        for name, norm in block.named_children():
            if type(norm) in (nn.InstanceNorm2d, nn.GroupNorm) and why_touched(norm, type(norm)) is None:
                setattr(block, name, _Spelled(norm))
    plain = _AnySize(twin)
    free = torch.export.Dim.DYNAMIC
    # A cache of fake tensors asks of each size what its symbols imply, which takes half of the time.
    with warnings.catch_warnings(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
        warnings.simplefilter("ignore")
        program = torch.onnx.export(plain, (plain.example(),), dynamo=True, verbose=False, input_names=["images"],
                                    output_names=["logits"], dynamic_shapes={"x": {0: free, 2: free, 3: free}})
    assert program is not None  # with ``dynamo`` there always is one
    proto = program.model_proto
    onnx.checker.check_model(proto, full_check=True)
    write_bytes(path, proto.SerializeToString())


def plain_twin(model: reference.UNet) -> reference.UNet:
    """A copy whose blocks are those of the plain build; what was attached or replaced stays as it is."""
    twin = copy.deepcopy(model)
    for module in [twin, *twin.modules()]:
        module.__class__ = _PLAIN.get(type(module), type(module))
    return twin


class _Spelled(nn.Module):
    """Instance or group norm by means over the image, for PyTorch's exporter keeps the sizes of its example."""

    def __init__(self, norm: Any):
        super().__init__()
        self.norm = norm
        self.groups = norm.num_groups if isinstance(norm, nn.GroupNorm) else norm.num_features

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm = self.norm
        if getattr(norm, "running_mean", None) is not None:
            y: torch.Tensor = norm(x)
            return y
        parts = x.unflatten(1, (self.groups, -1))
        centred = parts - parts.mean((2, 3, 4), keepdim=True)
        variance = (centred * centred).mean((2, 3, 4), keepdim=True)
        y = (centred / (variance + norm.eps).sqrt()).flatten(1, 2)
        if norm.weight is not None:
            y = y * norm.weight[:, None, None]
        return y if norm.bias is None else y + norm.bias[:, None, None]


class _AnySize(nn.Module):
    """The plain forward pass with its padding written so that sizes stay symbols."""

    def __init__(self, model: reference.UNet):
        super().__init__()
        self.model = model

    def example(self) -> torch.Tensor:
        """Images of a size that fits, its sides unlike each other and unlike any constant."""
        architecture = self.model.architecture
        sides = (28, 36)
        if architecture.padding == "valid":
            sides = max(architecture.nearest_inputs(99)), max(architecture.nearest_inputs(160))
        return torch.zeros(2, architecture.in_channels, *sides)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        model, (height, width) = self.model, x.shape[2:]
        same = model.architecture.padding == "same"
        if same:
            multiple = 2**model.architecture.depth if model.architecture.odd == "image" else 1
            x = F.pad(x, (0, -width % multiple, 0, -height % multiple))
        y = model.logits_of_padded(x)
        return y[..., :height, :width] if same else y
