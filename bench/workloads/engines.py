"""Inference engines that a user without a GPU would reach for: the plain build, exported to ONNX, in each of them."""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Callable

import numpy as np
import torch

from fastunet.inference import frozen_openvino

OPENVINO, ONNX_RUNTIME = "OpenVINO", "ONNX Runtime"
_PACKAGES = {OPENVINO: "openvino", ONNX_RUNTIME: "onnxruntime"}


def why_not(form: str, device: torch.device) -> str | None:
    """Why an engine cannot run here, or None; other forms are no engines and can."""
    if form not in _PACKAGES:
        return None
    if device.type != "cpu":
        return f"{form} is measured on a CPU only"
    missing = [name for name in (_PACKAGES[form], "onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    return f"{' and '.join(missing)} not installed" if missing else None


def predictor(form: str, predict: torch.nn.Module, x: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """``predict`` as that engine runs it on float32 images of ``x``'s shape, with PyTorch's number of threads."""
    run = {OPENVINO: _openvino, ONNX_RUNTIME: _onnx_runtime}[form](_exported(predict, x))
    return lambda images: torch.from_numpy(run(images.numpy()))


def _exported(predict: torch.nn.Module, x: torch.Tensor) -> bytes:
    buffer = io.BytesIO()
    torch.onnx.export(predict, (x,), dynamo=True, verbose=False, optimize=True).save(buffer)
    return buffer.getvalue()


def _openvino(model: bytes) -> Callable[[np.ndarray], np.ndarray]:
    core = frozen_openvino.core()
    options = {"INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY",
               "INFERENCE_NUM_THREADS": torch.get_num_threads()}  # fmt: skip
    request = core.compile_model(core.read_model(io.BytesIO(model)), "CPU", options).create_infer_request()
    return lambda images: request.infer([images], share_inputs=True)[0]


def _onnx_runtime(model: bytes) -> Callable[[np.ndarray], np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    return lambda images: session.run(None, {name: images})[0]
