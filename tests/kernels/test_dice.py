"""The Dice launchers against the eager one-hot form: sums and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fastunet.functional import dice as functional
from fastunet.functional.dice_confusion import confusion_matrix
from fastunet.kernels import _launch
from fastunet.kernels.dice import sums as dice
from tests.kernels.conftest import DTYPES
from tests.kernels.dice_cases import LABEL_DTYPES, LAYOUTS, inputs
from tests.tolerance import assert_within_budget

CLASSES = [1, 2, 3, 4, 5, 8, 33, 100]


def eager(logits, targets, weights, ignore_index, smoothing=0.0):
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
    smooth = ((1 - smoothing) * t + smoothing / k * valid[:, None]) * (1 if weights is None else weights.to(z)[:, None])
    nll = -(smooth * z.log_softmax(1)).sum((1, 2))
    return torch.cat([*(x[:, k - c :] for x in sums), torch.stack([nll, weighted.sum((1, 2)), wrong], 1)], 1)


def check_sums(actual, logits, targets, *options):
    c = logits.shape[1]
    same, exact = eager(logits.float(), targets, *options), eager(logits.double(), targets, *options)
    edges = [0, c, 2 * c, 3 * c, 3 * c + 1, 3 * c + 2, 3 * c + 3]
    for name, a, b in zip(["I", "P", "T", "cross-entropy", "weight", "wrong"], edges, edges[1:]):
        assert_within_budget(actual[:, a:b], same[:, a:b], exact[:, a:b], name)


def gradient(slopes, *arguments, **options):
    """With doubled slopes and a factor of one half, which is exact."""
    return dice.sums_grad(torch.full((), 0.5, device=slopes.device), 2 * slopes, *arguments, **options)


def check_gradient(actual, slopes, logits, targets, *options):
    gradients = []
    for dtype in (torch.float32, torch.float64):
        leaf = logits.detach().to(logits.dtype if dtype == torch.float32 else dtype, copy=True).requires_grad_()
        eager(leaf.to(dtype), targets, *options).backward(slopes.to(dtype))
        gradients.append(leaf.grad)
    assert_within_budget(actual, *gradients, "dlogits")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", CLASSES)
def test_hard_labels(c, layout, dtype, device):
    logits, labels = inputs(2, c, 1100 if c <= 4 else 70, dtype, device, layout)
    weights = torch.rand(max(c, 2), device=device)
    grad = torch.randn(2, 3 * c + 3, device=device)
    check_sums(dice.sums(logits, labels, weights, 200, True, True), logits, labels, weights, 200)
    dlogits = gradient(grad, logits, labels, weights, 200, True)
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
    check_sums(dice.sums(logits, targets, weights, None, True, True), logits, targets, weights, None)
    check_gradient(gradient(grad, logits, targets, weights, None, True), grad, logits, targets, weights, None)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("soft", [False, True], ids=["labels", "soft"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [1, 3, 4, 33])
def test_label_smoothing(c, layout, soft, weighted, device):
    logits, labels = inputs(2, c, 70, torch.float32, device, layout)
    ignore = None if soft else 200
    if soft:
        labels = torch.rand(2, c, 70, device=device) if c == 1 else torch.randn(2, c, 70, device=device).softmax(1)
    options = torch.rand(max(c, 2), device=device) if weighted else None, ignore
    grad = torch.randn(2, 3 * c + 3, device=device)
    check_sums(dice.sums(logits, labels, *options, True, True, 0.2), logits, labels, *options, 0.2)
    check_gradient(gradient(grad, logits, labels, *options, True, 0.2), grad, logits, labels, *options, 0.2)


@pytest.mark.parametrize("label_dtype", LABEL_DTYPES, ids=str)
def test_label_dtypes(label_dtype, device):
    logits, labels = inputs(1, 4, 40, torch.float32, device, label_dtype=label_dtype)
    if label_dtype != torch.uint8:
        labels[0, 2] = -7
    if label_dtype == torch.int64:
        labels[0, 3] = 2**32 + 1
    check_sums(dice.sums(logits, labels, None, 200, True, True), logits, labels, None, 200)


@pytest.mark.parametrize("s", [1, 15, 16, 17, 129])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("c", [3, 4])
def test_sizes_around_a_tile(c, layout, s, device):
    config = dice.DiceConfig(block_s=16, keep=4)
    logits, labels = inputs(3, c, s, torch.float16, device, layout)
    grad = torch.randn(3, 3 * c + 3, device=device)
    check_sums(dice.sums(logits, labels, None, 200, True, True, config=config), logits, labels, None, 200)
    check_gradient(gradient(grad, logits, labels, None, 200, True, config=config), grad, logits, labels, None, 200)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_program_walks_several_tiles(layout, device, monkeypatch):
    monkeypatch.setattr(dice, "_PROGRAMS", 4)
    logits, labels = inputs(2, 4, 150, torch.float32, device, layout)
    sums = dice.sums(logits, labels, None, 200, True, True, config=dice.DiceConfig(16, 4))
    check_sums(sums, logits, labels, None, 200)


def test_without_cross_entropy(device):
    logits, labels = inputs(2, 4, 40, torch.float32, device)
    with_it = dice.sums(logits, labels, None, 200, True, True)
    without = dice.sums(logits, labels, None, 200, False, True)
    with_it[:, 12] = 0
    assert torch.equal(without, with_it)
    grad = torch.randn(2, 15, device=device)
    silent = torch.cat([grad[:, :12], torch.zeros_like(grad[:, :3])], 1)
    check_gradient(gradient(grad, logits, labels, None, 200, False), silent, logits, labels, None, 200)


@pytest.mark.parametrize("shape", [(0, 4, 16), (2, 4, 0)], ids=str)
def test_nothing_to_read(shape, device):
    logits, labels = inputs(*shape, torch.float32, device)
    assert torch.equal(dice.sums(logits, labels, None, None, True, True), torch.zeros(shape[0], 15, device=device))
    assert gradient(torch.zeros(shape[0], 15, device=device), logits, labels, None, None, True).shape == shape


def test_impossible_class_is_infinitely_wrong_only_where_true(device):
    logits = torch.tensor([[[0.0, 0.0], [0.0, 0.0], [-torch.inf, -torch.inf]]], device=device)
    finite = dice.sums(logits, torch.tensor([[0, 1]], device=device), None, None, True, True)
    assert torch.allclose(finite[0, 9], torch.tensor(2 * 2.0).log())
    assert dice.sums(logits, torch.tensor([[0, 2]], device=device), None, None, True, True)[0, 9] == torch.inf


def test_one_extreme_logit(device):
    """log(1 + exp(z)) of ±200 must not pass through exp(200)."""
    logits = torch.tensor([[[200.0, -200.0, 200.0, -200.0]]], device=device)
    labels = torch.tensor([[0, 0, 1, 1]], device=device)
    sums = dice.sums(logits, labels, None, None, True, True)
    assert sums.tolist() == [[1, 2, 2, 400, 4, 0]]
    dlogits = gradient(torch.eye(6, device=device)[3:4], logits, labels, None, None, True)
    assert dlogits.tolist() == [[[1, 0, 0, -1]]]


def test_nan_logits_show(device):
    logits, labels = inputs(1, 4, 16, torch.float32, device)
    logits[0, 2, 3] = torch.nan
    assert dice.sums(logits, labels, None, 200, True, True)[0, 4:8].isnan().all()


def test_fp16_sums_beyond_its_range(device):
    """65,504 is the greatest float16: more pixels of one class than that, and the sums are still right."""
    logits = torch.zeros(1, 2, 70_000, dtype=torch.float16, device=device)
    labels = torch.zeros(1, 70_000, dtype=torch.uint8, device=device)
    config = dice.DiceConfig(block_s=8192, keep=1024)
    sums = dice.sums(logits, labels, None, None, True, True, config=config)
    assert sums[0, :6].tolist() == [35_000, 0, 35_000, 35_000, 70_000, 0]


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=str)
def test_the_function_runs_on_the_kernels(memory_format, device):
    """Loss, gradient and counts through autograd and the registered operators, against the PyTorch backend."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 9, 11, generator=generator).to(device).contiguous(memory_format=memory_format)
    labels = torch.randint(0, 3, (2, 9, 11), generator=generator).to(device)
    options = dict(class_weights=torch.tensor([0.5, 1.0, 2.0], device=device), empty="skip", reduction="sample",
                   label_smoothing=0.1)  # fmt: skip
    found = {}
    runs = [("kernel", "triton", torch.float32), ("torch", "torch", torch.float32), ("exact", "torch", torch.float64)]
    for name, backend, dtype in runs:
        leaf = logits.detach().to(dtype).requires_grad_()
        loss = functional.dice_cross_entropy(leaf, labels, backend=backend, **options)
        found[name] = loss.detach(), torch.autograd.grad(loss, leaf)[0]
    for name, *values in zip(["loss", "gradient"], found["kernel"], found["torch"], found["exact"]):
        assert_within_budget(*values, name)
    counts = [confusion_matrix(logits, labels, 3, backend=backend) for backend in ("triton", "torch")]
    assert torch.equal(*counts)
    labels[1, 2, 3] = 7
    with pytest.raises(ValueError, match="1 labels are out of range, 7 among them"):
        functional.dice_cross_entropy(logits, labels, backend="triton")


def test_nothing_but_four_launches(device, monkeypatch):
    """Three forward, one backward; beside them only views, and the gradient 1 that autograd starts from."""
    started, operations = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(function)
            return function(*args, **(kwargs or {}))

    launch = _launch.launch
    monkeypatch.setattr(_launch, "launch", lambda kernel, *a, **k: (started.append(kernel), launch(kernel, *a, **k)))
    logits, labels = inputs(2, 4, 24, torch.float32, device)
    leaf, labels = logits.view(2, 4, 4, 6).requires_grad_(), labels.view(2, 4, 6)
    with Watch():
        functional.dice_cross_entropy(leaf, labels, check_labels=False, ignore_index=200, backend="triton").backward()
    names = [kernel.__name__ for kernel in started]
    assert names == ["dice_forward_kernel", "sum_splits_kernel", "dice_rule_kernel", "dice_backward_kernel"]
    views = {torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default, torch.ops.aten.detach.default}
    assert [str(o) for o in operations if o not in views] == [
        "fastunet.dice_sums.default", "fastunet.dice_rule.default", "aten.ones_like.default",
        "fastunet.dice_sums_grad.default",
    ]  # fmt: skip


@pytest.mark.gpu
def test_cuda_graph(device):
    if device.type == "cpu":
        pytest.skip("CUDA graphs need a CUDA device")
    logits = torch.randn(8, 4, 1024, 1024, device=device, dtype=torch.float16).requires_grad_()
    labels = torch.randint(0, 4, (8, 1024, 1024), device=device, dtype=torch.uint8)
    want = functional.dice_cross_entropy(logits, labels)
    (want_gradient,) = torch.autograd.grad(want, logits)
    exact = functional.dice_cross_entropy(logits.detach().double(), labels, backend="torch")
    torch.testing.assert_close(want.double(), exact, rtol=1e-5, atol=0)
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
    assert torch.equal(*(dice.sums(logits, labels, None, 200, True, True) for _ in range(2)))
    assert torch.equal(*(gradient(grad, logits, labels, None, 200, True) for _ in range(2)))


def test_memory_in_neither_order_is_refused(device):
    logits, labels = inputs(2, 4, 32, torch.float32, device)
    with pytest.raises(ValueError, match=r"strides \(128, 32, 2\)"):
        dice.sums(logits[:, :, ::2], labels[:, ::2], None, None, True, True)


def test_one_row_for_the_batch(device):
    logits, labels = inputs(3, 4, 40, torch.float32, device)
    weights = torch.rand(4, device=device)
    rows = dice.sums(logits, labels, weights, 200, True, True)
    torch.testing.assert_close(dice.sums(logits, labels, weights, 200, True, False), rows.sum(0, keepdim=True))
    slopes = torch.randn(1, 15, device=device)
    shared, single = (gradient(s, logits, labels, weights, 200, True) for s in (slopes, slopes.expand(3, 15)))
    assert torch.equal(shared, single)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_more_samples_than_a_grid_holds(layout, device, monkeypatch):
    logits, labels = inputs(5, 4, 20, torch.float32, device, layout)
    slopes = torch.randn(5, 15, device=device)

    def everything():
        sums = [dice.sums(logits, labels, None, 200, True, per_sample) for per_sample in (True, False)]
        return sums + [gradient(rows, logits, labels, None, 200, True) for rows in (slopes, slopes[:1])]

    whole = everything()
    monkeypatch.setattr(dice, "MOST_SAMPLES", 2)
    for in_pieces, at_once in zip(everything(), whole, strict=True):
        torch.testing.assert_close(in_pieces, at_once, rtol=1e-6, atol=1e-6)


def test_many_rows_of_partial_sums(device, monkeypatch):
    """More rows than one tall tile of the second pass has."""
    logits, labels = inputs(1, 2, 16 * 600, torch.float32, device)
    sums = dice.sums(logits, labels, None, 200, True, True, config=dice.DiceConfig(16, 4))
    check_sums(sums, logits, labels, None, 200)


def test_heuristic_is_pinned():
    assert dice.choose_config(4, "planes", 4) == dice.DiceConfig(block_s=512, keep=512)
    assert dice.choose_config(3, "triplets", 2) == dice.DiceConfig(block_s=1024, keep=512)
    assert dice.choose_config(100, "rows", 2) == dice.DiceConfig(block_s=16, keep=4)
