"""TrainingStep: on a CPU the plain loop; on a GPU the captured step trains as the plain loop does."""

from __future__ import annotations

import copy

import pytest
import torch

from fastunet import UNet
from fastunet.losses import DiceCrossEntropyLoss
from fastunet.training.step import TrainingStep


def run(device: str, steps: int, graphed: bool) -> tuple[list[float], list[torch.Tensor]]:
    torch.manual_seed(0)
    model = UNet(width=8, depth=2, dropout=0.0).to(device)
    batches = [(torch.randn(2, 2, 16, 16), torch.randint(0, 4, (2, 16, 16))) for _ in range(steps)]
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, capturable=device == "cuda")
    loss = DiceCrossEntropyLoss(**(dict(check_labels=False) if device == "cuda" else {}))
    step = TrainingStep(model, loss, optimizer)
    curve = []
    for images, labels in batches:
        images, labels = images.to(device), labels.to(device)
        if graphed:
            curve.append(step(images, labels).item())
            continue
        optimizer.zero_grad()
        value = loss(model(images), labels)
        value.backward()
        optimizer.step()
        curve.append(value.item())
    return curve, [p.detach().cpu() for p in model.parameters()]


def test_on_a_cpu_it_is_the_plain_loop():
    plain, graphed = run("cpu", 4, False), run("cpu", 4, True)
    assert plain[0] == graphed[0]
    assert len(set(plain[0])) == 4
    assert all(torch.equal(a, b) for a, b in zip(plain[1], graphed[1]))


def test_precision_is_the_forward_pass_s():
    model = UNet(width=4, depth=1)
    seen = []

    def loss(logits, labels):
        seen.append(logits.dtype)
        return logits.float().square().mean()

    step = TrainingStep(model, loss, torch.optim.SGD(model.parameters(), 0.1), precision=torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    step(torch.randn(1, 2, 8, 8), torch.zeros(1, 8, 8))
    assert seen == [torch.bfloat16]
    assert any(not torch.equal(a, b) for a, b in zip(before.values(), model.state_dict().values()))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_captured_step_trains_as_the_plain_loop():
    plain, graphed = run("cuda", 10, False), run("cuda", 10, True)
    assert graphed[0] == pytest.approx(plain[0], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_optimiser_that_cannot_be_captured_is_refused():
    model = UNet(width=4, depth=1).cuda()
    with pytest.raises(ValueError, match="capturable=True"):
        TrainingStep(model, torch.nn.functional.cross_entropy, torch.optim.Adam(model.parameters()))
