"""The search and the winners' files, with made-up kernels and a made-up clock: no GPU is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

from fastunet.inspection import repeats, tuning
from fastunet.kernels import _launch, _tuned


@dataclasses.dataclass(frozen=True)
class Tile:
    block: int
    num_warps: int = 4
    num_stages: int = 3
    bulk: bool = True
    variant: str | None = None


def row(**changes):
    values = dict(kernel="k", key=[64, "bfloat16", True], config=dict(block=128, num_warps=8), versions={}, commit="c")
    return values | changes


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder of winners and a fresh memory of them."""
    monkeypatch.setattr(_tuned, "FOLDER", tmp_path)
    monkeypatch.setattr(_tuned, "_state", _tuned._State())
    _tuned._table.cache_clear()
    yield tmp_path
    _tuned._table.cache_clear()


def write(folder, *rows, slug="some-gpu"):
    (folder / f"{slug}.json").write_text(json.dumps(dict(device="Some GPU", architecture=90, rows=list(rows))))


def choose(key=(64, torch.bfloat16, True), **options):
    return _tuned.choose("k", key, Tile, lambda: Tile(32), **options)


def test_winner_of_the_named_gpu_is_used(folder):
    write(folder, row())
    with _tuned.using("some-gpu"):
        assert choose() == Tile(128, num_warps=8)
        assert choose(key=(32, torch.bfloat16, True)) == Tile(32)
    with _tuned.using("another-gpu"):
        assert choose() == Tile(32)


def test_no_winner_without_a_gpu(folder):
    write(folder, row())
    with _launch.recording(90):
        assert choose() == Tile(32)


def test_an_unusable_winner_gives_way_to_the_heuristic(folder):
    write(folder, row())
    with _tuned.using("some-gpu"):
        assert choose(usable=lambda config: config.block < 100) == Tile(32)


def test_a_forced_configuration_must_be_usable(folder):
    with _launch.recording(90), _tuned.forcing(("k", (64, "bfloat16", True)), Tile(512)):
        assert choose() == Tile(512)
        with pytest.raises(ValueError, match="cannot use Tile"):
            choose(usable=lambda config: False)


def test_a_search_sees_the_starts_of_every_key(folder):
    with _launch.recording(90), _tuned.asking() as asked:
        choose()
        choose(key=(1,), others=lambda: [Tile(8)])
    assert asked == {("k", (64, "bfloat16", True)): [Tile(32)], ("k", (1,)): [Tile(32), Tile(8)]}


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(block=128, size=3), "some-gpu.json, k .*size.* do not make a Tile"),
        (dict(num_warps=8), "do not make a Tile"),
        (dict(block="128"), "block is '128'"),
        (dict(block=128, bulk=1), "bulk is 1"),
        (dict(block=128, variant=5), "variant is 5"),
    ],
)
def test_a_row_that_is_no_configuration_is_named(folder, config, message):
    write(folder, row(config=config))
    with _tuned.using("some-gpu"), pytest.raises(ValueError, match=message):
        choose()


@pytest.mark.parametrize("text, message", [("{", "not JSON"), ("[]", "must be an object"), ('{"rows": []}', "device")])
def test_a_broken_file_is_named(folder, text, message):
    (folder / "some-gpu.json").write_text(text)
    with _tuned.using("some-gpu"), pytest.raises(ValueError, match=rf"some-gpu\.json.*{message}"):
        choose()


def test_a_broken_row_is_counted(folder):
    write(folder, row(), row(commit=None))
    with pytest.raises(ValueError, match="row 1"):
        _tuned.read(folder / "some-gpu.json")


def test_committed_files_are_in_the_format():
    for path in _tuned.files():
        content = _tuned.read(path)
        assert path.stem == _tuned.slug_of(content["device"])


def test_neighbours_change_one_number_within_bounds():
    around = list(tuning.neighbours(Tile(64, num_warps=8, num_stages=1)))
    assert around == [Tile(32, 8, 1), Tile(128, 8, 1), Tile(64, 4, 1), Tile(64, 8, 2)]


def test_search_goes_downhill_to_the_best():
    def measure(config):
        return 10.0 + abs(config.block - 256) / 8 + abs(config.num_warps - 8) + abs(config.num_stages - 3)

    found = tuning.search([Tile(32)], measure)
    assert found.config == Tile(256, 8, 3)
    assert found.microseconds == 10.0
    assert found.heuristic_microseconds == 42.0


def test_search_starts_from_the_best_kind():
    times = {Tile(32): 9.0, Tile(32, bulk=False): 7.0, Tile(64, bulk=False): 5.0}
    found = tuning.search([Tile(32), Tile(32, bulk=False)], times.get)
    assert found.config == Tile(64, bulk=False)
    assert found.heuristic_microseconds == 9.0


def test_search_keeps_the_heuristic_against_noise():
    assert tuning.search([Tile(32)], lambda config: 100.0 if config == Tile(32) else 99.0).config == Tile(32)


def test_search_passes_over_what_cannot_be_measured():
    def measure(config):
        return None if config.block == 64 else 100.0 / config.num_stages

    found = tuning.search([Tile(32)], measure)
    assert found.config == Tile(32, num_stages=6)
    assert tuning.search([Tile(64)], measure) is None


def test_search_ends_at_its_deadline():
    tried = []

    def measure(config):
        tried.append(config)
        return 1.0 / len(tried)

    tuning.search([Tile(32)], measure, deadline=5, clock=lambda: len(tried))
    assert len(tried) == 5


def test_a_wrong_candidate_is_never_timed():
    timed = []

    def run(x):
        config = choose()
        return torch.full((3,), x if config.block != 64 else 1.5)

    def timer(function, operand_sets):
        function(*operand_sets[0])
        timed.append(True)
        return 1.0

    with _launch.recording(90):
        accept = lambda found: bool((found[0] == 1).all())  # noqa: E731
        measure = tuning.measured(("k", (64, "bfloat16", True)), run, [[1.0]], accept, timer, lambda: None)
        assert measure(Tile(128)) == 1.0
        assert measure(Tile(64)) is None
    assert len(timed) == 1


@pytest.mark.parametrize("error", [RuntimeError, ValueError, AssertionError, KeyError])
def test_an_error_that_the_device_does_not_recover_from_ends_the_search(error):
    def run(x):
        raise error("illegal memory access")

    def lost():
        raise RuntimeError("CUDA error")

    with _launch.recording(90):
        for synchronize in (lambda: None, lost):
            measure = tuning.measured(("k", (1,)), run, [[1.0]], lambda found: True, synchronize=synchronize)
            if synchronize is lost:
                with pytest.raises(tuning.DeviceLost, match=r"k \[1\], Tile.*CUDA error"):
                    measure(Tile(128))
            else:
                assert measure(Tile(128)) is None


def test_calls_are_timed_as_replays_of_a_graph_over_rotating_operands(monkeypatch):
    """Nothing but replays stands between the events, and the operands move twice the cache before one comes again."""
    happened = []

    class Event:
        def __init__(self, **_):
            pass

        def record(self):
            happened.append("event")

        def synchronize(self):
            happened.append("synchronize")

        def elapsed_time(self, other):
            return 0.24

    class Graph:
        def replay(self):
            happened.append("replay")

    class Stream:
        def wait_stream(self, other):
            pass

    @contextlib.contextmanager
    def during(*_):
        happened.append("enter")
        yield
        happened.append("leave")

    for name, value in dict(Event=Event, CUDAGraph=Graph, Stream=Stream, current_stream=Stream, graph=during,
                            stream=during).items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    seen = []
    sets = repeats.rotated([torch.zeros(1000), None], cache_bytes=6000)
    assert len(sets) == 3
    assert len({operands[0].data_ptr() for operands in sets}) == 3
    microseconds = repeats.device_microseconds(lambda x, _: seen.append(x.data_ptr()) or (x,), sets, repeats=4)
    assert microseconds == pytest.approx(240 / 3)
    assert seen[-3:] == [operands[0].data_ptr() for operands in sets]
    calls = len(seen)
    last = happened.index("leave", happened.index("leave") + 1)
    assert happened[last + 1 :] == ["replay", "event", *["replay", "event"] * 4, "synchronize"]
    assert len(seen) == calls == 6, "three calls to warm up, and one of each set while the graph is captured"


def test_the_error_budget_is_that_of_the_tests():
    exact = torch.tensor([1.0, -2.0], dtype=torch.float64)
    torch_result = torch.tensor([1.0, -2.001], dtype=torch.float32)
    assert tuning.error_within_budget(torch.tensor([1.001, -2.0]), torch_result, exact)
    assert not tuning.error_within_budget(torch.tensor([1.003, -2.0]), torch_result, exact)
    assert not tuning.error_within_budget(torch.tensor([float("nan"), -2.0]), torch_result, exact)
    labels = torch.tensor([1, 2], dtype=torch.uint8)
    assert tuning.error_within_budget(labels, labels.clone(), labels)
    assert not tuning.error_within_budget(labels, labels + 1, labels)


def test_nothing_is_tuned_unless_asked(monkeypatch):
    monkeypatch.delenv("FASTUNET_TUNE", raising=False)
    assert tuning.tunable(choose) is choose


def test_first_call_of_a_key_is_tuned_if_asked(folder, monkeypatch):
    monkeypatch.setenv("FASTUNET_TUNE", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    calls = []

    def launcher(x):
        calls.append(choose())
        return x * 2

    def timer(function, operand_sets):
        function(*operand_sets[0])
        return 1.0 + abs(calls[-1].block - 128)

    monkeypatch.setattr(tuning.measured, "__defaults__", (timer, lambda: None))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=0))
    with _tuned.using("some-gpu"):
        searching = tuning.tunable(launcher)
        assert torch.equal(searching(torch.ones(2)), torch.full((2,), 2.0))
        assert choose().block == 128
        first = len(calls)
        searching(torch.ones(2))
    assert len(calls) == first + 1
