"""Workloads of whole networks: inference to logits or labels, and a training step with loss, backward and Adam."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.measuring import floors
from bench.measuring.precision import DTYPES
from bench.measuring.rows import OTHER
from bench.workloads import engines
from bench.workloads.losses import one_hot_dice_cross_entropy
from bench.workloads.variants import ENGINES, FROZEN, NETWORK_VARIANTS, Variant
from bench.workloads.workload import Workload
from fastunet import UNet, reference
from fastunet.architecture import Architecture
from fastunet.functional.dice import dice_cross_entropy
from fastunet.inspection.repeats import Function

LOGITS, LABELS, TRAINING = "inference, logits", "inference, labels", "training step"
_WEIGHT_SEED = 1
_LOSS_SCALE = 1024.0
"""Of float16 training, whose small gradients would underflow; constant, where users let a scaler choose it."""


def network_workload(preset: str, step: str, batch: int, side: int, precision: str, *,
                     without: tuple[tuple[str, str], ...] = (), **overrides) -> Workload:
    """A preset's network on ``batch`` square images; dropout off, so that every variant computes the same.

    Inference stores weights and activations in the precision's dtype. Training in fp16 and bf16 keeps float32 weights
    and runs under autocast. Adam runs fused for everyone, with learning rate 0: a step does all of its work and leaves
    the weights as they were, so that it can be checked as often as it is timed.
    """
    architecture = Architecture.from_preset(preset, dropout=0.0, **overrides)
    dtype = DTYPES[precision]
    stored = torch.float32 if step == TRAINING else dtype
    height, width = architecture.output_size(side, side)

    def operands(device: torch.device, seed: int) -> list[torch.Tensor]:
        generator = torch.Generator(device).manual_seed(seed)
        images = torch.randn((batch, architecture.in_channels, side, side), generator=generator, device=device)
        if step != TRAINING:
            return [images.to(stored)]
        return [images, torch.randint(architecture.num_classes, (batch, height, width), generator=generator,
                                      device=device, dtype=torch.uint8)]  # fmt: skip

    def build(variant: Variant, device: torch.device) -> Function:
        if variant in ENGINES:
            plain = model_with_weights("plain", architecture, device, stored).eval()
            images = operands(device, 0)[0]
            predict = engines.predictor(variant.form, plain if step == LOGITS else _Labels(plain), images)
            return lambda x: (predict(x),)
        model = model_with_weights(variant.form, architecture, device, stored)
        if variant.channels_last:
            model = model.to(memory_format=torch.channels_last)
        if step != TRAINING:
            model = model.eval()
            runnable = model.freeze() if variant.form == FROZEN.form else model
            if step == LOGITS:
                predict = runnable
            elif hasattr(runnable, "predict"):
                predict = runnable.predict
            else:
                predict = lambda x: runnable(x).argmax(1).to(torch.uint8)  # noqa: E731
            wrapped = variant.wrap(predict)
            return torch.no_grad()(lambda x: (wrapped(x),))
        ours = variant.form == "fastunet"
        loss = (lambda z, y: dice_cross_entropy(z, y, check_labels=False)) if ours else one_hot_dice_cross_entropy
        return TrainingStep(model, variant.wrap(lambda x, y: loss(model(x), y)), precision)

    def exact(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        model = model_with_weights("plain", architecture, tensors[0].device, stored).double()
        if step == TRAINING:
            return _exact_training_step(model, _scale(precision), *tensors)
        with torch.no_grad():
            return (torch.cat([model(image.double()) for image in tensors[0].split(1)]),)

    if step == TRAINING:
        floor = floors.of_training_step(architecture, batch, side, side, dtype)
    else:
        output = "logits" if step == LOGITS else "labels"
        floor = floors.of_inference(architecture, batch, side, side, output, dtype)
    # MONAI's has four levels and upsamples by itself; weights are packed for inference only
    left_out = [v for v in NETWORK_VARIANTS if v.role == OTHER and (preset != "brats" or architecture.depth != 4)]
    left_out += [FROZEN] if step == TRAINING else []
    left_out += ENGINES if step == TRAINING or precision != "fp32" else []
    variants = tuple(v for v in NETWORK_VARIANTS if v not in left_out)
    depth = 5 * architecture.depth + 3
    return Workload(preset, step, f"{batch}×{architecture.in_channels}×{side}×{side}", batch, precision, floor,
                    depth if step != TRAINING else 2 * depth, variants, operands, build, exact, without)  # fmt: skip


def model_with_weights(form: str, architecture: Architecture, device: torch.device,
                       dtype: torch.dtype) -> torch.nn.Module:
    """The network of a form with the one set of weights; MONAI's has its own."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_WEIGHT_SEED)
        plain = reference.UNet(**architecture.as_dict())
        if form == "MONAI BasicUNet":
            return _monai(architecture).to(device, dtype)
    if form == "plain":
        return plain.to(device, dtype)
    model = UNet(**architecture.as_dict())
    model.load_state_dict(plain.state_dict())
    return model.to(device, dtype)


class _Labels(torch.nn.Module):
    """The labels of a network's logits, as part of what is exported."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model(x).argmax(1).to(torch.uint8)


def _monai(architecture: Architecture) -> torch.nn.Module:
    from monai.networks.nets import BasicUNet

    features = (*architecture.widths, architecture.width)
    return BasicUNet(spatial_dims=2, in_channels=architecture.in_channels, out_channels=architecture.num_classes,
                     features=features, act=("RELU", {"inplace": True}), norm=None, dropout=0.0)  # fmt: skip


class TrainingStep:
    """Forward, loss, backward and Adam; called with images and labels, returns loss and gradients.

    The gradients are those of the scaled loss; ``parameters`` are the model's. ``exchange`` sums their gradients over
    processes.
    """

    def __init__(self, model: torch.nn.Module, loss_of: Callable, precision: str,
                 exchange: Callable[[list], None] | None = None):
        self.parameters = list(model.parameters())
        device = self.parameters[0].device.type
        # with capturable and without autocast's cache, whose memory would outlive it, a CUDA graph can hold the step
        self._optimiser = torch.optim.Adam(self.parameters, lr=0.0, fused=True, capturable=device == "cuda")
        self._loss_of, self._scale, self._exchange = loss_of, _scale(precision), exchange
        self._autocast = torch.autocast(device, DTYPES[precision], precision in ("fp16", "bf16"), cache_enabled=False)

    def __call__(self, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self._optimiser.zero_grad(set_to_none=True)
        with self._autocast:
            loss = self._loss_of(images, labels)
        (loss * self._scale if self._scale != 1 else loss).backward()
        if self._exchange:
            self._exchange(self.parameters)
        self._optimiser.step()
        return loss.detach(), *(p.grad for p in self.parameters)


def _scale(precision: str) -> float:
    return _LOSS_SCALE if precision == "fp16" else 1.0


def _exact_training_step(model: torch.nn.Module, scale: float, images: torch.Tensor, labels: torch.Tensor):
    """Loss and gradients in float64, image by image: the gradient of the logits first, for the loss couples them."""
    with torch.no_grad():
        logits = torch.cat([model(image.double()) for image in images.split(1)])
    logits.requires_grad_()
    loss = one_hot_dice_cross_entropy(logits, labels)
    (d_logits,) = torch.autograd.grad(scale * loss, logits)
    for image, d_image in zip(images.split(1), d_logits.split(1)):
        model(image.double()).backward(d_image)
    return loss.detach(), *(p.grad for p in model.parameters())
