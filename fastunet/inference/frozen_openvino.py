"""A U-Net as OpenVINO runs it in float32 on a CPU: the plain build, exported by PyTorch. Needs openvino."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from fastunet import reference
from fastunet.dispatch import autocasts
from fastunet.errors import UserError
from fastunet.functional.upsample_conv import transposed_kernel
from fastunet.inference import bounds


class CompiledNetwork:
    """The logits of padded images of one shape, by the threads that PyTorch has when it is built.

    Memory: one more copy of the weights for each. OpenVINO's ReLU turns NaN into 0; it is for images in ``within``.
    """

    def __init__(self, model: Any, x: torch.Tensor):
        self.limit = bounds.largest_images(model, x.shape[2] * x.shape[3])
        with warnings.catch_warnings(), _untold():
            warnings.simplefilter("ignore")
            graph = _openvino().convert_model(torch.export.export(_plain(model), (torch.zeros(x.shape),)))
        graph.reshape(list(x.shape))
        options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
                   "INFERENCE_NUM_THREADS": torch.get_num_threads()}  # fmt: skip
        self.request = core().compile_model(graph, "CPU", options).create_infer_request()

    def within(self, x: torch.Tensor) -> bool:
        """Whether no sum can overflow, so that there is no NaN to lose."""
        values = x.detach().numpy()  # PyTorch's threads would keep the cores from OpenVINO's for a while
        return bool(-self.limit < values.min() and values.max() < self.limit)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(self.request.infer([x.detach().contiguous().numpy()], share_inputs=True)[0])


@functools.cache
def core() -> Any:
    """One for the process: each gives the thread new memory to handle signals on and takes it back at its end. After
    two that end in another order than the reverse, the next signal, such as Ctrl-C, would end the process."""
    return _openvino().Core()


def check_installed() -> None:
    """Raises UserError if openvino is missing."""
    _openvino()


def check_operands(x: torch.Tensor, weight: torch.Tensor) -> None:
    """Raises ValueError for what OpenVINO is not asked to compute in or on."""
    for name, tensor in (("images", x), ("weights", weight)):
        if tensor.dtype != torch.float32 or tensor.device.type != "cpu":
            raise ValueError(f"engine='openvino' computes in float32 on a CPU; the {name} are {tensor.dtype} on "
                             f"{tensor.device}")  # fmt: skip
    if autocasts("cpu"):
        raise ValueError("engine='openvino' computes in float32: call it outside of autocast")


def _openvino() -> Any:
    try:
        import openvino
    except ImportError as error:
        raise UserError("engine='openvino' needs openvino: pip install 'fastunet[openvino]'") from error
    return openvino


@contextlib.contextmanager
def _untold() -> Iterator[None]:
    """Inside, OpenVINO sends no word of a conversion to its makers, for which it would fork this process."""
    try:
        import openvino_telemetry
        from openvino.tools.ovc.telemetry_stub import Telemetry
    except ImportError:
        yield
        return
    before, openvino_telemetry.Telemetry = openvino_telemetry.Telemetry, Telemetry
    try:
        yield
    finally:
        openvino_telemetry.Telemetry = before


class _Decoder(reference.DecoderBlock):
    def upsampled(self, x: torch.Tensor) -> torch.Tensor:
        if self.up_kind == "transpose":
            return super().upsampled(x)
        up: Any = self.up
        x = F.conv_transpose2d(x, transposed_kernel(up.weight), up.bias, 2, 1, 1)  # 9/16 of the products
        return reference.activation(x, self.style.negative_slope)


class _InstanceNorm(nn.InstanceNorm2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2:].numel() == 1:
            return super().forward(x)  # which refuses it
        y = F.layer_norm(x, x.shape[2:], eps=self.eps)  # which OpenVINO has an operation for
        return y * self.weight[:, None, None] + self.bias[:, None, None]


class _Plain(reference.UNet):
    decoder_block = _Decoder

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.logits_of_padded(x)


def _plain(model: Any) -> _Plain:
    """The plain build on the parameters of ``model``."""
    with torch.device("meta"):
        plain = _Plain(**model.config).eval()
    for module in plain.modules():
        if type(module) is nn.InstanceNorm2d:
            module.__class__ = _InstanceNorm
    plain.load_state_dict(model.state_dict(), assign=True)
    return plain
