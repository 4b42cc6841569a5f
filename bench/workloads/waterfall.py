"""What each fusion brings: the plain network's code with one operator after another replaced by fastunet's."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from bench.measuring import floors
from bench.measuring.precision import DTYPES
from bench.measuring.rows import OURS, RIVAL
from bench.workloads.networks import LABELS, model_with_weights
from bench.workloads.variants import Variant
from bench.workloads.workload import Workload
from fastunet import functional, reference
from fastunet.architecture import Architecture
from fastunet.functional.blocks import decoder_block_head
from fastunet.inspection.repeats import Function
from fastunet.reference import centre_crop

EPILOGUES, CONCAT_FREE, SUB_PIXEL, FUSED_HEAD = range(1, 5)
STEPS = (
    Variant("plain", "plain", RIVAL, channels_last=False),
    Variant("channels_last", "plain", RIVAL),
    Variant("compiled", "plain", RIVAL, compile_mode="default"),
    Variant("+ fused epilogues", f"stage {EPILOGUES}", OURS),
    Variant("+ concat-free", f"stage {CONCAT_FREE}", OURS),
    Variant("+ sub-pixel upsampling", f"stage {SUB_PIXEL}", OURS),
    Variant("+ fused head", f"stage {FUSED_HEAD}", OURS),
    Variant("+ graph", f"stage {FUSED_HEAD}", OURS, graph=True),
)
"""The steps in order; from "+ fused epilogues" on, each is eager and holds those between it and that one."""

SUBJECT = "waterfall"


def waterfall_workload(device: torch.device) -> Workload:
    """The brats network from images to labels, in each of :data:`STEPS`: batch 16 of 240² in bf16 on a GPU, batch 4 of
    128² in fp32 on a CPU. A step that does not exist on the device is left out."""
    batch, side, precision = (16, 240, "bf16") if device.type == "cuda" else (4, 128, "fp32")
    architecture = Architecture.from_preset("brats", dropout=0.0)
    dtype = DTYPES[precision]

    def operands(on: torch.device, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator(on).manual_seed(seed)
        return [torch.randn((batch, architecture.in_channels, side, side), generator=generator, device=on).to(dtype)]

    def build(variant: Variant, on: torch.device) -> Function:
        model = model_with_weights("plain", architecture, on, dtype).eval()
        if variant.channels_last:
            model = model.to(memory_format=torch.channels_last)
        stage = int(variant.form.removeprefix("stage ")) if variant.form != "plain" else 0
        predict = variant.wrap((lambda x: staged_labels(model, x, stage)) if stage else model.predict)
        return torch.no_grad()(lambda x: (predict(x),))

    def exact(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model = model_with_weights("plain", architecture, x.device, dtype).double()
        with torch.no_grad():
            return (torch.cat([model(image.double()) for image in x.split(1)]),)

    floor = floors.of_inference(architecture, batch, side, side, "labels", dtype)
    return Workload(SUBJECT, LABELS, f"{batch}×{architecture.in_channels}×{side}×{side}", batch, precision, floor,
                    5 * architecture.depth + 3, STEPS, operands, build, exact)  # fmt: skip


def staged_labels(model: reference.UNet, x: torch.Tensor, stage: int) -> torch.Tensor:
    """The labels of a "same", "upsample" network whose forward pass holds the fusions up to ``stage``."""
    skips = []
    for encoder in model.encoders:
        x = functional.conv_relu(x, encoder.conv1.weight, encoder.conv1.bias)
        skip, x = functional.conv_relu_pool(x, encoder.conv2.weight, encoder.conv2.bias)
        skips.append(skip)
    x = functional.conv_relu(x, model.bottleneck.conv1.weight, model.bottleneck.conv1.bias)
    x = functional.conv_relu(x, model.bottleneck.conv2.weight, model.bottleneck.conv2.bias)
    last = len(model.decoders) - 1
    for index, decoder in enumerate(model.decoders):
        if stage >= FUSED_HEAD and index == last:
            layers = (decoder.up, decoder.conv1, decoder.conv2, model.head)
            parameters = [p for layer in layers for p in (layer.weight, layer.bias)]
            return decoder_block_head(x, skips.pop(), *parameters, up="upsample", output="labels")
        x = _decode(decoder, x, skips.pop(), stage)
    return model.head(x).argmax(dim=1).to(torch.uint8)


def _decode(decoder: reference.DecoderBlock, x: torch.Tensor, skip: torch.Tensor, stage: int) -> torch.Tensor:
    up, conv1, conv2 = decoder.up, decoder.conv1, decoder.conv2
    if stage >= SUB_PIXEL:
        x = functional.upsample_conv_relu(x, up.weight, up.bias)
    else:
        x = F.relu(up(F.pad(F.interpolate(x, scale_factor=2, mode="nearest"), (0, 1, 0, 1))))
    if stage >= CONCAT_FREE:
        x = functional.conv_relu(x, conv1.weight, conv1.bias, skip=skip)
    else:
        x = torch.cat([centre_crop(skip, *x.shape[2:]), x], dim=1)
        x = functional.conv_relu(x, conv1.weight, conv1.bias)
    return functional.conv_relu(x, conv2.weight, conv2.bias)
