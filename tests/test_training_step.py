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


def test_an_optimiser_that_needs_a_closure_is_refused():
    model = UNet(width=4, depth=1)
    with pytest.raises(ValueError, match="LBFGS computes the loss itself, by a closure"):
        TrainingStep(model, torch.nn.functional.cross_entropy, torch.optim.LBFGS(model.parameters()))


class FakeGraph:
    """Replays a step as a CUDA graph does: parameters change, and PyTorch does not count it."""

    def __init__(self, model):
        self.model, self.replays = model, 0

    def replay(self):
        self.replays += 1
        for p in self.model.parameters():
            p.data.mul_(1.01)


def captured_step(monkeypatch):
    """A step on a CPU that believes in a captured graph of its shape."""
    model = UNet(width=4, depth=1, dropout=0.0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    step = TrainingStep(model, torch.nn.functional.cross_entropy, optimizer)
    images, labels = torch.randn(1, 2, 8, 8), torch.randint(4, (1, 8, 8))
    for _ in range(2):
        step(images, labels)
    graph = FakeGraph(model)
    step._device = torch.device("cuda")
    key = images.shape, images.dtype, labels.shape, labels.dtype
    step._calls[key], step._graphs[key] = 4, (graph, images.clone(), labels.clone(), torch.zeros(()), step._captured())
    monkeypatch.setattr(step, "_on_a_side_stream", lambda *_: "a real step")
    return step, graph, images, labels


def test_a_frozen_network_follows_replayed_steps(monkeypatch):
    step, graph, images, labels = captured_step(monkeypatch)
    frozen = step.model.freeze()
    step.model.eval()
    before = frozen(images)
    step.model.train()
    step(images, labels)
    assert graph.replays == 1
    step.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(frozen(images), step.model(images))
    assert not torch.allclose(frozen(images), before)


CHANGES = {
    "state loaded": lambda step: step.optimizer.load_state_dict(copy.deepcopy(step.optimizer.state_dict())),
    "learning rate": lambda step: step.optimizer.param_groups[0].update(lr=5e-4),
    "eval": lambda step: step.model.eval(),
    "a part in eval": lambda step: step.model.dropout.eval(),
    "loss": lambda step: setattr(step, "loss", lambda z, y: z.square().mean()),
    "precision": lambda step: setattr(step, "precision", torch.bfloat16),
    "frozen": lambda step: step.model.head.requires_grad_(False),
    "replaced": lambda step: setattr(step.model.head.weight, "data", step.model.head.weight.data.clone()),
    "another optimiser": lambda step: setattr(step, "optimizer", torch.optim.Adam(step.model.parameters())),
    "flags": lambda step: setattr(torch.backends.cudnn, "deterministic", True),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_captured_step_that_is_no_longer_so_is_captured_again(change, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    step, graph, images, labels = captured_step(monkeypatch)
    step(images, labels)
    assert graph.replays == 1
    CHANGES[change](step)
    assert step(images, labels) == "a real step"
    assert graph.replays == 1


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
