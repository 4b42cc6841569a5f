"""The Dice launchers against the eager one-hot form: sums, gradients and confusion counts."""

import pytest
import torch
import torch.nn.functional as F

from fastunet.functional import dice as functional
from fastunet.functional import dice_cpu
from fastunet.kernels import dice, dice_confusion
from tests.tolerance import assert_within_budget

CLASSES = [1, 2, 3, 4, 5, 8, 33, 100]
LAYOUTS = ["NCHW", "NHWC"]
DTYPES = [torch.float32, torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
LABEL_DTYPES = [torch.uint8, torch.int16, torch.int32, torch.int64]


def ordered(x, layout):
    return x.contiguous() if layout == "NCHW" else x.transpose(1, 2).contiguous().transpose(1, 2)


def inputs(n, c, s, dtype, device, layout="NCHW", label_dtype=torch.uint8):
    """Logits with ignored labels 200; of 16 pixels or more, one label of sample 0 is out of range."""
    generator = torch.Generator().manual_seed(c * s + n)
    logits = ordered(torch.randn(n, c, s, generator=generator).mul(3).to(device, dtype), layout)
    labels = torch.randint(0, max(c, 2), (n, s), generator=generator)
    labels[:, ::5] = 200
    if n and s > 15:
        labels[0, 1] = 180
    return logits, labels.to(device, label_dtype)


def eager(logits, targets, weights, ignore_index):
    """The sums by a one-hot tensor, in the dtype of ``logits``."""
    c = logits.shape[1]
    k = max(c, 2)
    z = logits if c > 1 else torch.cat([torch.zeros_like(logits), logits], 1)
    if targets.ndim == 2:
        valid = (targets.long() < k) & (targets.long() >= 0) & (targets != ignore_index)
        wrong = ((targets != ignore_index) & ~valid).sum(1).to(z.dtype)
        t = F.one_hot(torch.where(valid, targets.long(), 0), k).movedim(2, 1) * valid[:, None]
    else:
        valid, wrong = torch.ones_like(z[:, 0]), torch.zeros_like(z[:, 0, 0])
        t = targets if c > 1 else torch.cat([1 - targets, targets], 1)
    t = t.to(z.dtype)
    p = z.softmax(1) * valid[:, None]
    weighted = t if weights is None else t * weights.to(z.dtype)[:, None]
    sums = [(p * t).sum(2), p.sum(2), t.sum(2)]
    nll = -(weighted * z.log_softmax(1)).sum((1, 2))
    return torch.cat([*(x[:, k - c :] for x in sums), torch.stack([nll, weighted.sum((1, 2)), wrong], 1)], 1)


def check_sums(actual, logits, targets, weights, ignore_index):
    c = logits.shape[1]
    same = eager(logits.float(), targets, weights, ignore_index)
    exact = eager(logits.double(), targets, weights, ignore_index)
    edges = [0, c, 2 * c, 3 * c, 3 * c + 1, 3 * c + 2, 3 * c + 3]
    for name, a, b in zip(["I", "P", "T", "cross-entropy", "weight", "wrong"], edges, edges[1:]):
        assert_within_budget(actual[:, a:b], same[:, a:b], exact[:, a:b], name)


def check_gradient(actual, grad, logits, targets, weights, ignore_index):
    found = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.detach().clone().requires_grad_()
        eager(leaf.to(dtype), targets, weights, ignore_index).backward(grad.to(dtype))
        found.append(leaf.grad)
    wide = logits.detach().double().requires_grad_()
    eager(wide, targets, weights, ignore_index).backward(grad.double())
    assert_within_budget(actual, found[0], wide.grad, "dlogits")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", CLASSES)
def test_hard_labels(c, layout, dtype, device):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("the interpreter truncates bfloat16 casts; needs a CUDA device")
    logits, labels = inputs(2, c, 1100 if c <= 4 else 70, dtype, device, layout)
    weights = torch.rand(max(c, 2), device=device)
    grad = torch.randn(2, 3 * c + 3, device=device)
    check_sums(dice.sums(logits, labels, weights, 200, True), logits, labels, weights, 200)
    dlogits = dice.sums_grad(grad, logits, labels, weights, 200, True)
    assert dlogits.dtype == dtype
    assert dlogits.stride() == logits.stride()
    check_gradient(dlogits, grad, logits, labels, weights, 200)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [1, 2, 3, 4, 33])
def test_soft_targets(c, layout, device):
    logits, _ = inputs(2, c, 70, torch.float16, device, layout)
    targets = torch.rand(2, c, 70, device=device) if c == 1 else torch.randn(2, c, 70, device=device).softmax(1)
    weights = torch.rand(max(c, 2), device=device)
    grad = torch.randn(2, 3 * c + 3, device=device)
    check_sums(dice.sums(logits, targets, weights, None, True), logits, targets, weights, None)
    check_gradient(dice.sums_grad(grad, logits, targets, weights, None, True), grad, logits, targets, weights, None)


@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, ids=str)
def test_label_dtypes(label_dtype, device):
    logits, labels = inputs(1, 4, 40, torch.float32, device, label_dtype=label_dtype)
    if label_dtype != torch.uint8:
        labels[0, 2] = -7
    if label_dtype == torch.int64:
        labels[0, 3] = 2**32 + 1
    check_sums(dice.sums(logits, labels, None, 200, True), logits, labels, None, 200)


@pytest.mark.parametrize("s", [1, 15, 16, 17, 129])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [3, 4])
def test_sizes_around_a_tile(c, layout, s, device):
    config = dice.DiceConfig(block_s=16, keep=4)
    logits, labels = inputs(3, c, s, torch.float16, device, layout)
    grad = torch.randn(3, 3 * c + 3, device=device)
    check_sums(dice.sums(logits, labels, None, 200, True, config), logits, labels, None, 200)
    check_gradient(dice.sums_grad(grad, logits, labels, None, 200, True, config), grad, logits, labels, None, 200)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_program_walks_several_tiles(layout, device, monkeypatch):
    monkeypatch.setattr(dice, "_PROGRAMS", 4)
    logits, labels = inputs(2, 4, 150, torch.float32, device, layout)
    check_sums(dice.sums(logits, labels, None, 200, True, dice.DiceConfig(16, 4)), logits, labels, None, 200)


def test_without_cross_entropy(device):
    logits, labels = inputs(2, 4, 40, torch.float32, device)
    with_it = dice.sums(logits, labels, None, 200, True)
    without = dice.sums(logits, labels, None, 200, False)
    with_it[:, 12] = 0
    assert torch.equal(without, with_it)
    grad = torch.randn(2, 15, device=device)
    silent = torch.cat([grad[:, :12], torch.zeros_like(grad[:, :3])], 1)
    check_gradient(dice.sums_grad(grad, logits, labels, None, 200, False), silent, logits, labels, None, 200)


@pytest.mark.parametrize("shape", [(0, 4, 16), (2, 4, 0)], ids=str)
def test_nothing_to_read(shape, device):
    logits, labels = inputs(*shape, torch.float32, device)
    assert torch.equal(dice.sums(logits, labels, None, None, True), torch.zeros(shape[0], 15, device=device))
    assert dice.sums_grad(torch.zeros(shape[0], 15, device=device), logits, labels, None, None, True).shape == shape


def test_impossible_class_is_infinitely_wrong_only_where_true(device):
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [-torch.inf, -torch.inf]]], device=device)
    finite = dice.sums(logits, torch.tensor([[0, 1]], device=device), None, None, True)
    assert torch.allclose(finite[0, 9], torch.tensor(2 * 2.0).log())
    assert dice.sums(logits, torch.tensor([[0, 2]], device=device), None, None, True)[0, 9] == torch.inf


def test_one_extreme_logit(device):
    """log(1 + exp(z)) of ±200 must not pass through exp(200)."""
    logits = torch.tensor([[[200.0, -200.0, 200.0, -200.0]]], device=device)
    labels = torch.tensor([[0, 0, 1, 1]], device=device)
    sums = dice.sums(logits, labels, None, None, True)
    assert sums.tolist() == [[1, 2, 2, 400, 4, 0]]
    dlogits = dice.sums_grad(torch.eye(6, device=device)[3:4], logits, labels, None, None, True)
    assert dlogits.tolist() == [[[1, 0, 0, -1]]]


def test_nan_logits_show(device):
    logits, labels = inputs(1, 4, 16, torch.float32, device)
    logits[0, 2, 3] = torch.nan
    assert dice.sums(logits, labels, None, 200, True)[0, 4:8].isnan().all()


def test_fp16_sums_beyond_its_range(device):
    """65,504 is the greatest float16: more pixels of one class than that, and the sums are still right."""
    logits = torch.zeros(1, 2, 70_000, dtype=torch.float16, device=device)
    labels = torch.zeros(1, 70_000, dtype=torch.uint8, device=device)
    config = dice.DiceConfig(block_s=8192, keep=1024)
    sums = dice.sums(logits, labels, None, None, True, config)
    assert sums[0, :6].tolist() == [35_000, 0, 35_000, 35_000, 70_000, 0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_function_runs_on_the_kernels(memory_format, device):
    """Loss, gradient and counts through autograd and the registered operators, against the PyTorch backend."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 9, 11, generator=generator).to(device).contiguous(memory_format=memory_format)
    labels = torch.randint(0, 3, (2, 9, 11), generator=generator).to(device)
    options = dict(class_weights=torch.tensor([0.5, 1.0, 2.0], device=device), empty="skip", reduction="sample")
    found = {}
    runs = [("kernel", "triton", torch.float32), ("torch", "torch", torch.float32), ("exact", "torch", torch.float64)]
    for name, backend, dtype in runs:
        leaf = logits.detach().to(dtype).requires_grad_()
        loss = functional.dice_cross_entropy(leaf, labels, backend=backend, **options)
        found[name] = loss.detach(), torch.autograd.grad(loss, leaf)[0]
    for name, *values in zip(["loss", "gradient"], found["kernel"], found["torch"], found["exact"]):
        assert_within_budget(*values, name)
    counts = [functional.confusion_matrix(logits, labels, 3, backend=backend) for backend in ("triton", "torch")]
    assert torch.equal(*counts)
    labels[1, 2, 3] = 7
    with pytest.raises(ValueError, match="1 labels are out of range, 7 among them"):
        functional.dice_cross_entropy(logits, labels, backend="triton")


@pytest.mark.gpu
def test_cuda_graph(device):
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a CUDA device")
    logits = torch.randn(8, 4, 1024, 1024, device=device, dtype=torch.float16).requires_grad_()
    labels = torch.randint(0, 4, (8, 1024, 1024), device=device, dtype=torch.uint8)
    want = functional.dice_cross_entropy(logits, labels)
    (want_gradient,) = torch.autograd.grad(want, logits)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = functional.dice_cross_entropy(logits, labels)
        (gradient,) = torch.autograd.grad(loss, logits)
    graph.replay()
    assert torch.equal(loss, want)
    assert torch.equal(gradient, want_gradient)
    assert loss.isfinite()
    assert gradient.isfinite().all()
    labels[0, 0, 0] = 9
    graph.replay()
    assert loss.isnan()


def test_repeats_are_bit_identical(device):
    logits, labels = inputs(2, 3, 1500, torch.float16, device, "NHWC")
    grad = torch.randn(2, 12, device=device)
    assert torch.equal(dice.sums(logits, labels, None, 200, True), dice.sums(logits, labels, None, 200, True))
    assert torch.equal(*(dice.sums_grad(grad, logits, labels, None, 200, True) for _ in range(2)))


def test_memory_in_neither_order_is_refused(device):
    logits, labels = inputs(2, 4, 32, torch.float32, device)
    with pytest.raises(ValueError, match=r"strides \(128, 32, 2\)"):
        dice.sums(logits[:, :, ::2], labels[:, ::2], None, None, True)


def test_too_many_samples_are_refused(device):
    logits = torch.zeros(65536, 2, 1, device=device)
    labels = torch.zeros(65536, 1, dtype=torch.uint8, device=device)
    with pytest.raises(ValueError, match="a batch of 65536 images"):
        dice.sums(logits, labels, None, None, True)
    with pytest.raises(ValueError, match="a batch of 65536 images"):
        dice_confusion.confusion(logits, labels, 2, None)


def test_heuristic_is_pinned():
    assert dice.choose_config(4, "planes", 4) == dice.DiceConfig(block_s=512, keep=128)
    assert dice.choose_config(3, "triplets", 2) == dice.DiceConfig(block_s=1024, keep=128)
    assert dice.choose_config(100, "rows", 2) == dice.DiceConfig(block_s=16, keep=4)


@pytest.mark.parametrize("ignore_index", [None, 200, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [1, 2, 3, 4, 33])
def test_confusion_of_logits(c, layout, ignore_index, device):
    logits, labels = inputs(2, c, 300, torch.float16, device, layout)
    logits = logits.round()  # many ties: the first maximum wins
    logits[1, c - 1, 7] = torch.nan
    k = max(c, 2)
    counts = dice_confusion.confusion(logits, labels, k, ignore_index)
    classes = logits if c > 1 else torch.cat([torch.zeros_like(logits), logits], 1)
    assert torch.equal(counts, slow_confusion(classes.argmax(1), labels, k, ignore_index))
    assert torch.equal(counts, dice_cpu.confusion(logits, labels, k, ignore_index))


@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, ids=str)
def test_confusion_of_labels(label_dtype, device):
    _, labels = inputs(2, 7, 300, torch.float32, device, label_dtype=label_dtype)
    predictions = labels.flip(1).to(torch.int32)
    predictions[1, 4] = -3
    counts = dice_confusion.confusion(predictions, labels, 7, 200)
    assert torch.equal(counts, slow_confusion(predictions, labels, 7, 200))


@pytest.mark.parametrize("pairs", [False, True], ids=["product", "pairs"])
def test_confusion_in_several_tiles_a_program(pairs, device):
    logits, labels = inputs(1, 4, 600, torch.float32, device)
    config = dice_confusion.ConfusionConfig(block_s=128, programs=2, pairs=pairs)
    counts = dice_confusion.confusion(logits, labels, 4, 200, config)
    assert torch.equal(counts, slow_confusion(logits.argmax(1), labels, 4, 200))


def test_confusion_of_nothing(device):
    logits, labels = inputs(2, 4, 0, torch.float32, device)
    counts = dice_confusion.confusion(logits, labels, 4, None)
    assert torch.equal(counts[:, :-1], torch.zeros(2, 17, dtype=torch.int64, device=device))
    assert (counts[:, -1] == dice_cpu.NONE_WRONG).all()


def slow_confusion(predictions, labels, k, ignore_index):
    """Pixel by pixel."""
    rows = []
    for predicted, truth in zip(predictions.tolist(), labels.tolist()):
        row, wrong = [0] * (k * k + 1), [dice_cpu.NONE_WRONG]
        for p, t in zip(predicted, truth):
            if t == ignore_index:
                continue
            if 0 <= p < k and 0 <= t < k:
                row[t * k + p] += 1
            else:
                row[-1] += 1
                wrong += [v for v in (p, t) if not 0 <= v < k]
        rows.append([*row, max(wrong)])
    return torch.tensor(rows, device=labels.device)
