"""The frozen network's CUDA graphs, most of it with stand-ins for CUDA."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from fastunet import UNet
from fastunet.inference import frozen as frozen_module
from tests.test_frozen import build


def test_a_graph_is_made_anew_when_what_it_cannot_follow_changes(monkeypatch):
    model, frozen, x = build()
    made = []

    class Graph:
        def __init__(self, function, images, memory):
            made.append((function, memory))

    monkeypatch.setattr(frozen_module, "_Graph", Graph)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    first = frozen._graph(x, "logits")
    assert frozen._graph(x, "logits") is first
    frozen._graph(x, "labels")
    model.backend = "torch"
    frozen._graph(x, "logits")
    monkeypatch.setenv("FASTUNET_BACKEND", "torch")
    frozen._graph(x, "logits")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    frozen._graph(x, "logits")
    assert len(made) == 5
    assert len({id(memory) for _, memory in made}) == 1
    frozen.graphs = 2
    frozen._graph(x[:1], "logits")
    assert len(frozen._graphs) == 2


def test_a_call_on_a_gpu_replays_the_graph_of_its_shape(monkeypatch):
    """With stand-ins for CUDA's streams and graphs: a call copies its images in, replays, and copies the result out."""
    model, frozen, x = build()
    replayed = []
    stream = SimpleNamespace(wait_stream=lambda _: None, wait_event=lambda _: None, record_event=lambda: "event")
    for name in ("current_stream", "Stream"):
        monkeypatch.setattr(torch.cuda, name, lambda device: stream)
    for name in ("device", "stream", "graph"):
        monkeypatch.setattr(torch.cuda, name, lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replayed.append(1)))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    class OnGPU(torch.Tensor):
        is_cuda = True

    for count in (1, 2):
        torch.testing.assert_close(torch.Tensor(frozen(x.as_subclass(OnGPU))), model(x), rtol=1e-5, atol=1e-5)
        assert (len(replayed), len(frozen._graphs)) == (count, 1)


def test_graphs_that_share_memory_wait_for_each_other():
    """On another stream, too: the first call's result must be out before the second writes over it."""
    happened = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_event(self, event):
            happened.append((self.name, "waits for", event))

    memory = frozen_module._Memory("pool")
    memory.wait(Stream("a"))
    assert happened == []
    memory.done = "the copy of a's result"
    memory.wait(Stream("b"))
    assert happened == [("b", "waits for", "the copy of a's result")]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_replay_and_the_least_recent_is_dropped():
    torch.manual_seed(0)
    model = UNet(width=8, depth=2).cuda().eval()
    frozen = model.freeze(graphs=2)
    for side in (16, 24, 32, 16):
        x = torch.randn(1, 2, side, side, device="cuda")
        with torch.no_grad():
            assert torch.equal(frozen(x), model(x))
    assert len(frozen._graphs) == 2
    first = frozen(x).clone()
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert not torch.equal(frozen(x), first)
