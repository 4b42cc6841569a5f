"""The measuring itself: what is wrong is never timed, turns are taken, bytes are counted."""

import dataclasses
import itertools
import math
import time
import types

import pytest
import torch

from bench.measuring import measure as measure_module
from bench.measuring.floors import Floor, of_inference
from bench.measuring.gate import error_shares
from bench.measuring.machine import slug
from bench.measuring.measure import measure
from bench.measuring.memory import peak_bytes, saved_bytes
from bench.measuring.rows import FAILED, OK, OURS, WRONG
from bench.measuring.timing import Budget, Timing, interleave
from bench.workloads import operators, selection
from bench.workloads.losses import loss_workload
from bench.workloads.networks import LABELS, LOGITS, TRAINING, network_workload
from bench.workloads.operators import SUBJECTS, operator_workloads
from bench.workloads.variants import CHANNELS_LAST, FASTUNET, PLAIN, Variant
from fastunet.architecture import Architecture
from fastunet.inspection import repeats
from fastunet.inspection.layers import CASES
from tests.bench_rows import environment

CPU = torch.device("cpu")
QUICK = Budget(seconds=0.0, least_rounds=2, most_rounds=2, least_sample=0.0, pause=0.0)
MACHINE = environment(matmul_tflops={"fp32": 0.1}, copy_gbs=10.0)
TINY = dict(width=4, depth=1)
EAGER = (PLAIN, CHANNELS_LAST, FASTUNET)


@pytest.fixture(autouse=True)
def small_measurements(monkeypatch):
    """So small operands would be drawn sixteen times, to leave the cache, and their garbage searched for each time."""
    monkeypatch.setattr(repeats, "_MOST_SETS", 2)
    monkeypatch.setattr(measure_module, "gc", types.SimpleNamespace(collect=lambda: None))


def eager(workload):
    return dataclasses.replace(workload, variants=EAGER)


def spoiled(workload, spoil):
    """``workload`` with a variant more, whose results ``spoil`` changes before they are returned."""
    bad = Variant("spoiled", "spoiled", OURS)

    def build(variant, device):
        if variant is not bad:
            return workload.build(variant, device)
        function = workload.build(FASTUNET, device)
        return lambda *operands: spoil(function(*operands))

    return dataclasses.replace(workload, variants=(PLAIN, bad), build=build)


def one_element_off(results):
    changed = results[-1].clone(memory_format=torch.contiguous_format)
    changed.view(-1)[-1] += 0.01 * changed.abs().max() + 1e-3
    return (*results[:-1], changed)


def with_nan(results):
    changed = results[0].clone(memory_format=torch.contiguous_format)
    changed.view(-1)[0] = math.nan
    return (changed, *results[1:])


@pytest.mark.parametrize("spoil, state, step", [
    (one_element_off, WRONG, TRAINING), (with_nan, WRONG, LOGITS), (lambda r: r[:-1], FAILED, TRAINING),
])  # fmt: skip
def test_a_wrong_variant_is_reported_and_never_timed(monkeypatch, spoil, state, step):
    timed = []
    monkeypatch.setattr(measure_module, "interleave", lambda runs, *rest: timed.append(runs) or interleave(runs, *rest))
    workload = spoiled(network_workload("brats", step, 1, 8, "fp32", **TINY), spoil)
    right, wrong = (m.row for m in measure(workload, CPU, MACHINE, QUICK))
    assert (right.variant, right.state, right.rounds) == ("plain", OK, 2)
    assert wrong.state == state
    assert wrong.p50_ms == 0
    assert wrong.note
    assert [len(runs) for runs in timed] == [1]


def test_nothing_is_built_after_the_deadline():
    workload = eager(network_workload("brats", LOGITS, 1, 8, "fp32", **TINY))
    found = measure(workload, CPU, MACHINE, QUICK, deadline=time.monotonic() - 1)
    assert [(m.row.state, m.timing) for m in found] == [(FAILED, None)] * 3


def test_wrong_labels_are_reported():
    workload = network_workload("brats", LABELS, 1, 8, "fp32", **TINY)
    flipped = spoiled(workload, lambda results: (3 - results[0],))
    assert [m.row.state for m in measure(flipped, CPU, MACHINE, QUICK)] == [OK, WRONG]


def test_the_budget_is_that_of_the_tests():
    exact, plain = torch.tensor([1.0, 2.0]).double(), torch.tensor([1.0, 2.0 + 1e-5])
    at = [(exact + shift).float() for shift in (1e-5, 3e-5)]
    shares = [error_shares([result], [[plain]], [exact], "fp32", depth=1)[0] for result in at]
    error = (plain.double() - exact).abs().max().item()
    budget = 2 * error + 2 * 2.0**-23 * 2
    assert shares == pytest.approx([(r.double() - exact).abs().max().item() / budget for r in at])
    assert shares[0] < 1 < shares[1]


def test_labels_may_differ_only_where_logits_tie():
    logits = torch.tensor([[1.0, 5.0], [1.0 + 1e-9, 2.0]]).double().view(1, 2, 1, 2)
    plain = [[torch.tensor([[[1, 0]]], dtype=torch.uint8)]]
    tied, wrong = (torch.tensor([[labels]], dtype=torch.uint8) for labels in ([0, 0], [1, 1]))
    assert error_shares([tied], plain, [logits], "fp32", 1)[0] < 1
    assert error_shares([wrong], plain, [logits], "fp32", 1)[0] > 1


@pytest.mark.parametrize("preset, side, step, precision", [
    ("brats", 8, LOGITS, "fp32"), ("brats", 8, LABELS, "bf16"), ("brats", 8, TRAINING, "fp32"),
    ("isbi", 24, LOGITS, "bf16"), ("isbi", 24, LABELS, "fp32"), ("isbi", 24, TRAINING, "bf16"),
])  # fmt: skip
def test_every_form_of_a_network_is_right(preset, side, step, precision):
    workload = network_workload(preset, step, 2, side, precision, **TINY)
    found = measure(eager(workload), CPU, MACHINE, QUICK)
    assert [(m.row.variant, m.row.state, m.row.note) for m in found] == [(v.name, OK, "") for v in EAGER]
    assert all(m.row.saved_bytes > 0 for m in found) == (step == TRAINING)


@pytest.mark.parametrize("preset, side", [("brats", 8), ("isbi", 20)])
def test_every_operator_at_every_layer_is_right(preset, side):
    workloads = operator_workloads(Architecture.from_preset(preset, width=4, depth=1), 1, side, "fp32")
    rows = [m.row for w in workloads for m in measure(eager(w), CPU, MACHINE, QUICK)]
    assert {row.state for row in rows} == {OK}
    missing = "conv_transpose2d" if preset == "brats" else "upsample_conv_relu"
    assert {row.subject for row in rows} == set(SUBJECTS) - {missing}


def test_no_gradient_arrives_where_rounding_decides():
    linear = torch.tensor([[1.0, -1.0, 1e-9, 3.0], [-2.0, -3.0, 3.0 + 1e-6, 0.5]]).view(1, 1, 2, 4)
    cotangents = [torch.ones(1, 1, 2, 4), torch.ones(1, 1, 1, 2)]
    operators._forget_undecided(cotangents, linear, 1e-5)
    assert cotangents[0].flatten().tolist() == [1, 1, 0, 1, 1, 1, 1, 1]
    # the left window has one positive value, the right one two that are nearly equal
    assert cotangents[1].flatten().tolist() == [1, 0]


def test_every_form_of_the_loss_is_right():
    for backward, cross_entropy in itertools.product((False, True), (False, True)):
        workload = loss_workload(2, 4, 16, "fp32", backward=backward, cross_entropy=cross_entropy)
        variants = tuple(v for v in workload.variants if not v.compile_mode and workload.why_not(v, CPU) is None)
        found = measure(dataclasses.replace(workload, variants=variants), CPU, MACHINE, QUICK)
        assert {m.row.state for m in found} == {OK}
        assert len(found) >= 5


def test_rounds_take_turns_and_start_elsewhere_each_time():
    order = []
    passes = [lambda i=i: order.append(i) for i in range(3)]
    timings = interleave(passes, [1, 1, 1], CPU, Budget(0.0, 3, 3, 0.0, 0.0))
    # one pass to warm up, one to estimate, then the rounds
    assert order[6:] == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert [len(t.samples) for t in timings] == [3, 3, 3]


def test_percentiles_interpolate():
    timing = Timing((3.0, 1.0, 2.0, 5.0, 4.0, 6.0))
    assert [timing.percentile(p) for p in (0.0, 0.2, 0.5, 1.0)] == pytest.approx([1.0, 2.0, 3.5, 6.0])


def test_memory_of_a_call():
    weight, x = torch.ones(1000, requires_grad=True), torch.ones(1000)

    def call():
        a = x * 2
        b = (a * weight).exp()
        return b.sum()

    assert saved_bytes(call, [weight, x]) == 2 * 4000
    # a, a * weight and its exponential; the product is gone when the sum comes
    assert peak_bytes(call, CPU) == 3 * 4000


def test_floors_agree_with_figures_counted_by_hand():
    """Arithmetic at 800 TFLOP/s and batch 16, 16 and 1, counted independently from the layer tables."""
    expected = {"brats 128": (16, 127e-6), "brats 240": (16, 448e-6), "isbi 572": (1, 376e-6)}
    for name, (batch, seconds) in expected.items():
        architecture, (height, width) = CASES[name]
        floor = of_inference(architecture, batch, height, width, "labels", torch.bfloat16)
        assert floor.flop / 800e12 == pytest.approx(seconds, rel=0.005)
    assert Floor(((100, 10), (10, 100))).seconds(1e-9, 1e-12) == 200


def test_selection_names_are_distinct_and_cover_what_is_promised(monkeypatch):
    monkeypatch.setattr(selection, "PRECISIONS", ("tf32", "bf16"))
    networks = selection.networks(CPU, True)
    names = [w.name for w in (*networks, *selection.operators(["max_pool2d"], CPU, True))]
    assert len(set(names)) == len(names)
    chosen = {(w.subject, w.step, w.batch, w.precision) for w in networks}
    for preset in ("brats", "isbi"):
        for batch in (1, 16, 64):
            assert (preset, TRAINING, batch, "tf32") in chosen


def test_folder_names_of_devices():
    assert slug("NVIDIA H100 80GB HBM3", torch.device("cuda")) == "nvidia-h100-80gb-hbm3"
    assert slug("Some CPU @ 2.0GHz, 2 cores", CPU) == "cpu-some-cpu-2-0ghz-2-cores"
