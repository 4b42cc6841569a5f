"""On a GPU: whole networks on the Triton kernels beside the plain build, in training, on streams and in CUDA graphs."""

from __future__ import annotations

import contextlib

import pytest
import torch

pytest.importorskip("triton")

import fastunet
from fastunet.functional.dice import dice_cross_entropy

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

SMALL = {"brats": dict(size=64, width=16, depth=3), "isbi": dict(size=92, width=16, depth=2)}


def build(preset: str, kind=fastunet.UNet, device: str = "cuda", **options):
    """A small network of a preset's kind, always with the same parameters and without dropout."""
    torch.manual_seed(0)
    shape = {key: value for key, value in SMALL[preset].items() if key != "size"}
    return kind.from_preset(preset, dropout=0.0, **shape, **options).to(device)


def batch(model, preset: str, seed: int = 0, images: int = 4, device: str = "cuda"):
    """Images with a bright disc somewhere, and its mask as labels."""
    generator = torch.Generator().manual_seed(seed)
    size = SMALL[preset]["size"]
    centre = torch.rand(images, 2, 1, 1, generator=generator) * size / 2 + size / 4
    rows, columns = torch.arange(size).view(1, -1, 1), torch.arange(size).view(1, 1, -1)
    disc = ((rows - centre[:, 0]) ** 2 + (columns - centre[:, 1]) ** 2) < (size / 6) ** 2
    x = torch.randn(images, model.config["in_channels"], size, size, generator=generator) + 2.0 * disc[:, None]
    height, width = model.output_size(size, size)
    top, left = (size - height) // 2, (size - width) // 2
    labels = disc[:, top : top + height, left : left + width].to(torch.uint8)
    return x.to(device).to(memory_format=torch.channels_last), labels.to(device)


def train(model, preset, steps, *, dtype=None, scaler=False, device="cuda", backend="auto"):
    """Losses of ``steps`` steps of Adam, each on another batch; with autocast to ``dtype``."""
    optimiser = torch.optim.Adam(model.parameters(), lr=1e-3)
    scale = torch.amp.GradScaler(device, enabled=scaler)
    losses = []
    for step in range(steps):
        x, labels = batch(model, preset, step, device=device)
        with torch.autocast(device, dtype) if dtype else contextlib.nullcontext():
            loss = dice_cross_entropy(model(x), labels, backend=backend)
        optimiser.zero_grad(set_to_none=True)
        scale.scale(loss).backward()
        scale.step(optimiser)
        scale.update()
        losses.append(loss.item())
    return torch.tensor(losses)


def smooth(losses, window=20):
    return losses.unfold(0, window, window).mean(1)


@pytest.mark.parametrize("preset", SMALL)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_200_training_steps_follow_the_plain_build(preset, dtype):
    ours = train(build(preset, backend="triton"), preset, 200, dtype=dtype, backend="triton")
    plain = train(build(preset, fastunet.reference.UNet), preset, 200, dtype=dtype, backend="torch")
    assert smooth(plain)[-1] < 0.5 * smooth(plain)[0], "the plain build does not learn: nothing to compare with"
    assert ours[0] == pytest.approx(plain[0], rel=2e-2 if dtype else 2e-3)
    # training amplifies rounding: single losses part, their course does not
    assert (smooth(ours) - smooth(plain)).abs().max() < 0.1 * smooth(plain)[0]


@pytest.mark.parametrize("preset", SMALL)
def test_fp16_with_a_gradient_scaler_stays_finite(preset):
    losses = train(build(preset, backend="triton"), preset, 200, dtype=torch.float16, scaler=True, backend="triton")
    assert losses.isfinite().all()
    assert smooth(losses)[-1] < 0.5 * smooth(losses)[0]


@pytest.mark.parametrize("preset", SMALL)
def test_a_training_step_repeats_bit_for_bit(preset):
    model = build(preset, backend="triton")
    x, labels = batch(model, preset)

    def gradients():
        model.zero_grad(set_to_none=True)
        dice_cross_entropy(model(x), labels, backend="triton").backward()
        return [p.grad.clone() for p in model.parameters()]

    first = gradients()
    for _ in range(10):
        for a, b in zip(gradients(), first):
            assert torch.equal(a, b)


@torch.no_grad()
def test_a_stream_of_its_own():
    model = build("brats", backend="triton")
    x, _ = batch(model, "brats")
    expected = model(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10_000_000)
        late = x * 1.0
        result = model(late)
    stream.synchronize()
    assert torch.equal(result, expected)


@torch.no_grad()
def test_two_models_on_two_streams():
    models = [build(preset, backend="triton") for preset in SMALL]
    inputs = [batch(model, preset)[0] for model, preset in zip(models, SMALL)]
    expected = [model(x) for model, x in zip(models, inputs)]
    streams = [torch.cuda.Stream() for _ in models]
    torch.cuda.synchronize()
    for _ in range(20):
        results = []
        for model, x, stream in zip(models, inputs, streams):
            with torch.cuda.stream(stream):
                results.append(model(x))
        torch.cuda.synchronize()
        assert all(torch.equal(a, b) for a, b in zip(results, expected))


@torch.no_grad()
@pytest.mark.parametrize("method", ["forward", "predict", "predict_proba"])
def test_inference_in_a_cuda_graph(method):
    model = build("brats", backend="triton").eval()
    run = getattr(model, method)
    static, _ = batch(model, "brats", 0)
    graph = capture(lambda: run(static))
    for seed in (1, 2):
        x, _ = batch(model, "brats", seed)
        static.copy_(x)
        result = graph()
        assert torch.equal(result, run(x))


def test_a_training_step_in_a_cuda_graph():
    """Forward, loss and backward in one graph; a replay on new data gives the gradients of an eager step."""
    model = build("brats", backend="triton")
    static, static_labels = batch(model, "brats", 0)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def step():
        for parameter in model.parameters():
            parameter.grad.zero_()
        dice_cross_entropy(model(static), static_labels, check_labels=False, backend="triton").backward()

    graph = capture(step)
    x, labels = batch(model, "brats", 5)
    static.copy_(x)
    static_labels.copy_(labels)
    graph()
    replayed = [p.grad.clone() for p in model.parameters()]
    step()
    for eager, again in zip((p.grad for p in model.parameters()), replayed):
        assert torch.equal(eager, again)


def capture(run):
    """Warms ``run`` up on a side stream, captures it, and returns a function that replays it for its result."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay():
        graph.replay()
        torch.cuda.synchronize()
        return result

    return replay
