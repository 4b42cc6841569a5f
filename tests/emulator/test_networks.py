"""A whole network in bfloat16 for sm_90, every call twice, so that kernels/_plan.py repeats launches.

Asynchronous copies come late. The network's first calls run under the race detector too; what is launched again, on
other numbers of the same shapes, has no other races. test_kernels.py compares schedules kernel by kernel, and
tests/kernels/test_unet.py has networks of two levels and of valid, transposed convolutions, which launch a dozen
kernels more of the same functions; tests/aot/test_plan.py has plans of both ways up.
"""

from __future__ import annotations

import copy
import dataclasses
from unittest import mock

import pytest
import torch

from fastunet import UNet, reference
from fastunet.functional.dice import dice_cross_entropy, dice_loss
from fastunet.functional.dice_confusion import confusion_matrix
from fastunet.kernels import _launch, _plan
from fastunet.losses import DiceCrossEntropyLoss
from fastunet.training.step import TrainingStep
from tests.tolerance import assert_within_budget

pytestmark = pytest.mark.skipif(_launch.INTERPRETED, reason="kernels are interpreted in this process, not compiled")

NETWORK, SIZE = dict(width=16, depth=1, dropout=0.0), (16, 24)
DTYPE = torch.bfloat16


@pytest.fixture(scope="module")
def emulator():
    from .driver import emulated
    from .launch import Emulator

    with emulated(90, Emulator()) as found:
        yield found


@pytest.fixture
def detect(emulator):
    """Called with whether the launches that follow run under the race detector; at first they do."""
    from .launch import LAZY

    def switch(on: bool):
        emulator.schedules = (dataclasses.replace(LAZY, detect=on),)

    switch(True)
    return switch


@pytest.fixture
def plans(detect):
    """How often launches were repeated from a plan. What torch.empty makes is NaN until written."""
    repeated, run = [], _plan._Plan.run

    def counted(self, inputs):
        repeated.append(self)
        return run(self, inputs)

    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)  # which fills memory
    with mock.patch.object(_plan._Plan, "run", counted):
        yield repeated
    torch.use_deterministic_algorithms(deterministic)


def builds():
    """The plain build in float64 and in bfloat16, and fastunet's on the kernels, all with the same weights."""
    torch.manual_seed(0)
    plain = reference.UNet(**NETWORK)
    for key, parameter in plain.named_parameters():
        if key.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)
    fast = UNet(**NETWORK, backend="triton")
    fast.load_state_dict(plain.state_dict())
    plain, fast = plain.to(DTYPE), fast.to(DTYPE)
    return copy.deepcopy(plain).double(), plain, fast


def gradients(model, x, labels, backend) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    logits = model(x)
    loss = dice_cross_entropy(logits, labels, backend=backend)
    names, parameters = zip(*model.named_parameters())
    found = torch.autograd.grad(loss, [x, *parameters])
    return {"logits": logits, "loss": loss} | dict(zip(["x", *names], found))


def test_inference_loss_and_every_gradient(plans, detect):
    """Rounding turns a ReLU here and there, in PyTorch's build at other places than in ours, so gradients are held to
    PyTorch's largest error relative to its tensor, over all tensors, and not one by one."""
    exact, plain, fast = builds()
    for first in (True, False):
        detect(first)
        x = torch.randn(1, 2, *SIZE).to(DTYPE)
        labels = torch.randint(0, 4, (1, *plain.output_size(*SIZE)))
        started = len(plans)
        with torch.no_grad():
            got, same, want = fast.predict_proba(x), plain.predict_proba(x), exact.predict_proba(x.double())
            assert_within_budget(got, same, want, "probabilities")
            top = want.topk(2, dim=1).values
            decided = top[:, 0] - top[:, 1] > 0.05
            assert torch.equal(fast.predict(x)[decided].long(), want.argmax(1)[decided])
        got, same = gradients(fast, x, labels, "triton"), gradients(plain, x, labels, "torch")
        want = gradients(exact, x.double(), labels, "torch")
        logits, loss = got.pop("logits").detach(), got.pop("loss")
        assert_within_budget(logits, same.pop("logits"), want.pop("logits"), "logits")
        # of the same logits: PyTorch's error of a single number may be nothing by chance
        losses = [dice_cross_entropy(one, labels, backend="torch") for one in (logits, logits.double())]
        assert_within_budget(loss, *losses, "loss")
        del same["loss"], want["loss"]
        errors = [max((found[k].double() - w).abs().max().item() / w.abs().max().item() for k, w in want.items())
                  for found in (got, same)]  # fmt: skip
        assert errors[0] <= 2 * errors[1] + 2 * torch.finfo(DTYPE).eps
    assert len(plans) - started > started, "the second turn repeats more launches than the first"


def test_training_steps(plans, detect):
    """Three steps of AdamW under autocast: the loss falls as it does in the plain build, and launches are repeated."""
    detect(False)  # the network is the one of the test above
    torch.manual_seed(1)
    fast, plain = UNet(**NETWORK, backend="triton"), reference.UNet(**NETWORK)
    plain.load_state_dict(fast.state_dict())
    x, labels = torch.randn(1, 2, *SIZE), torch.randint(0, 4, (1, *plain.output_size(*SIZE)))
    curves = []
    for model, backend in ((fast, "triton"), (plain, "torch")):
        step = TrainingStep(model, DiceCrossEntropyLoss(backend=backend), torch.optim.AdamW(model.parameters(), 1e-3),
                            precision=DTYPE)  # fmt: skip
        curves.append([step(x, labels).item() for _ in range(3)])
    assert curves[0] == pytest.approx(curves[1], rel=0.01)
    assert curves[0][2] < curves[0][0]
    assert len(plans) > 20


OPTIONS = [dict(include_background=False, ignore_index=3), dict(reduction="sample", empty="skip")]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_fused_losses_and_their_gradients(options, plans):
    torch.manual_seed(2)
    for _ in range(2):
        logits = (3 * torch.randn(2, 4, 19, 23)).to(DTYPE).contiguous(memory_format=torch.channels_last)
        labels = torch.randint(0, 4, (2, 19, 23), dtype=torch.uint8)
        for function in (dice_cross_entropy, dice_loss):
            found = []
            for dtype, backend in ((DTYPE, "triton"), (torch.float32, "torch"), (torch.float64, "torch")):
                leaf = logits.to(dtype).requires_grad_()
                loss = function(leaf, labels, backend=backend, **options)
                found.append((loss.detach(), torch.autograd.grad(loss, leaf)[0]))
            (loss, gradient), (same, same_gradient), (want, want_gradient) = found
            assert_within_budget(loss, same, want, function.__name__)
            assert_within_budget(gradient, same_gradient.to(DTYPE), want_gradient, "gradient")
    assert plans


def test_confusion_matrix(plans):
    torch.manual_seed(3)
    for _ in range(2):
        logits, labels = torch.randn(2, 4, 19, 23).to(DTYPE), torch.randint(0, 4, (2, 19, 23), dtype=torch.uint8)
        got = confusion_matrix(logits, labels, 4, ignore_index=1, backend="triton")
        assert torch.equal(got, confusion_matrix(logits, labels, 4, ignore_index=1, backend="torch"))
        assert got.sum() == (labels != 1).sum()
