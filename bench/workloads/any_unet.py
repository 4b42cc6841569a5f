"""Workloads "any U-Net made faster": other people's networks as they are, compiled, in engines, and under
``fastunet.fuse``; those that are presets, as ``fastunet.UNet``."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

import fastunet
from bench.measuring.floors import Floor
from bench.measuring.precision import DTYPES
from bench.measuring.rows import OTHER, OURS
from bench.workloads import engines
from bench.workloads.common_unet import CommonUNet
from bench.workloads.losses import one_hot_dice_cross_entropy
from bench.workloads.networks import TRAINING, TrainingStep
from bench.workloads.variants import CHANNELS_LAST, COMPILED, ENGINES, FASTUNET, FROZEN, PLAIN, Variant
from bench.workloads.workload import Workload
from fastunet import reference
from fastunet.architecture import Architecture
from fastunet.functional.dice import dice_cross_entropy
from fastunet.inspection.repeats import Function

FUSED = (Variant("fastunet.fuse", "fuse", OURS, channels_last=False),
         Variant("fastunet.fuse, channels_last", "fuse", OURS))  # fmt: skip
FROZEN_OPENVINO = Variant('fastunet, freeze(engine="openvino")', "fastunet frozen, engine", OTHER, channels_last=False)
"""Beside the others, since it is the engine's speed."""
_CLASSES, _CHANNELS, _SEED = 4, 2, 1


def _basic(norm: object) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        from monai.networks.nets import BasicUNet

        return BasicUNet(2, _CHANNELS, _CLASSES, norm=norm)

    return build


def _monai() -> nn.Module:
    from monai.networks.nets import UNet

    return UNet(2, _CHANNELS, _CLASSES, channels=(32, 64, 128, 256), strides=(2, 2, 2), num_res_units=2)


def _nnunet() -> nn.Module:
    from dynamic_network_architectures.architectures.unet import PlainConvUNet

    net = PlainConvUNet(_CHANNELS, 6, (32, 64, 128, 256, 512, 512), nn.Conv2d, 3, (1, 2, 2, 2, 2, 2), 2, _CLASSES, 2,
                        True, nn.InstanceNorm2d, {"affine": True}, None, None, nn.LeakyReLU, {"inplace": True})
    net.decoder.seg_layers = net.decoder.seg_layers[-1:]  # the others are for deep supervision alone
    return net


def _preset(name: str, **width: int) -> Callable[[], nn.Module]:
    architecture = Architecture.from_preset(name, in_channels=_CHANNELS, num_classes=_CLASSES, **width)
    return lambda: reference.UNet(**architecture.as_dict())


NETWORKS: dict[str, tuple[str, Callable[[], nn.Module]]] = {
    "batch-norm U-Net": ("torch", lambda: CommonUNet(width=32, depth=4, in_channels=_CHANNELS, num_classes=_CLASSES)),
    "bilinear U-Net": ("torch", lambda: CommonUNet(True, width=32, depth=4, in_channels=_CHANNELS,
                                                   num_classes=_CLASSES)),
    "MONAI BasicUNet": ("monai", _basic(("instance", {"affine": True}))),
    "MONAI BasicUNet, batch norm": ("monai", _basic("batch")),
    "MONAI BasicUNet, group norm": ("monai", _basic(("group", {"num_groups": 8}))),
    "MONAI UNet": ("monai", _monai),
    "nnU-Net PlainConvUNet": ("dynamic_network_architectures", _nnunet),
    "preset milesial, 32 wide": ("torch", _preset("milesial", width=32)),
    "preset monai_basic": ("torch", _preset("monai_basic")),
    "preset nnunet2d": ("torch", _preset("nnunet2d")),
}  # fmt: skip
"""The package that each is from, and its constructor."""


def any_unet_workload(name: str, step: str, batch: int, side: int, precision: str, *,
                      without: tuple[tuple[str, str], ...] = ()) -> Workload:
    """A network of :data:`NETWORKS` on square images, for inference or a training step with loss and Adam."""
    build_network = NETWORKS[name][1]
    stored = torch.float32 if step == TRAINING else DTYPES[precision]

    def network(device: torch.device) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            return build_network().to(device, stored).train(step == TRAINING)

    def operands(device: torch.device, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        images = torch.randn((batch, _CHANNELS, side, side), generator=generator, device=device).to(stored)
        if step != TRAINING:
            return [images]
        return [images, torch.randint(_CLASSES, (batch, side, side), generator=generator, device=device)]

    def build(variant: Variant, device: torch.device) -> Function:
        model = network(device)
        if variant in ENGINES:
            predict = engines.predictor(variant.form, model, operands(device, 0)[0])
            return lambda x: (predict(x),)
        if "fastunet" in variant.form:
            plain, model = model, fastunet.UNet(**model.architecture.as_dict()).to(device, stored)
            model.load_state_dict(plain.state_dict())
            model.train(plain.training)
        if variant.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if variant.form == "fuse":
            model = fastunet.fuse(model, inplace=True)[0]
        if "frozen" in variant.form:
            model = model.freeze(engine="openvino" if variant is FROZEN_OPENVINO else "fastunet")
        if step != TRAINING:
            wrapped = variant.wrap(model)
            return torch.no_grad()(lambda x: (wrapped(x),))
        loss = dice_cross_entropy if variant.form == FASTUNET.form else one_hot_dice_cross_entropy
        return TrainingStep(model, variant.wrap(lambda x, y: loss(model(x), y)), precision)

    def exact(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model = network(tensors[0].device).double()
        if step == TRAINING:
            loss = one_hot_dice_cross_entropy(model(tensors[0].double()), tensors[1])
            loss.backward()
            return loss.detach(), *(p.grad for p in model.parameters())
        with torch.no_grad():
            return (model(tensors[0].double()),)

    floor, depth = _floor(build_network, batch, side, DTYPES[precision], step == TRAINING)
    return Workload(name, step, f"{batch}×{_CHANNELS}×{side}×{side}", batch, precision, floor, depth,
                    _variants(name, step, precision), operands, build, exact, without)  # fmt: skip


def _variants(name: str, step: str, precision: str) -> tuple[Variant, ...]:
    """Engines infer in float32; a preset is run by the module instead of being fused."""
    found = [PLAIN, CHANNELS_LAST, COMPILED]
    found += ENGINES if step != TRAINING and precision == "fp32" else []
    if not name.startswith("preset"):
        return (*found, *FUSED)
    found += [replace(FASTUNET, channels_last=False), replace(FASTUNET, name="fastunet, channels_last")]
    found += [FROZEN] if step != TRAINING else []
    found += [FROZEN_OPENVINO] if step != TRAINING and importlib.util.find_spec("openvino") else []
    return tuple(found)


def installed() -> list[str]:
    """The networks whose package is here."""
    return [name for name, (package, _) in NETWORKS.items() if importlib.util.find_spec(package) is not None]


def _floor(build: Callable[[], nn.Module], batch: int, side: int, dtype: torch.dtype,
           training: bool) -> tuple[Floor, int]:
    """What the convolutions must read, write and multiply, three times in training; and their number."""
    parts: list[tuple[int, int]] = []

    def count(layer: nn.Module, inputs: tuple, y: torch.Tensor) -> None:
        weight, transposed = layer.weight, isinstance(layer, nn.ConvTranspose2d)
        products = math.prod(weight.shape[1:]) * (inputs[0] if transposed else y).numel()
        parts.append(((inputs[0].numel() + weight.numel() + y.numel()) * dtype.itemsize, 2 * products))

    with torch.device("meta"), torch.no_grad():
        model = build().eval()
        for layer in model.modules():
            if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
                layer.register_forward_hook(count)
        model(torch.empty(batch, _CHANNELS, side, side))
    return Floor(tuple(parts) * (3 if training else 1)), len(parts) * (2 if training else 1)
