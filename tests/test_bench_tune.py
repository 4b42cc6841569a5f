"""The offline search's bookkeeping with a made-up clock and made-up times: resuming, deadlines, and its file."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

pytest.importorskip("triton")

from bench import tune
from fastunet.inspection.tuning import DeviceLost, Found
from fastunet.kernels import _launch, _tuned

HEAD = dict(device="Some GPU", architecture=90)
STAMP = dict(versions=dict(torch="1"), commit="abc")


@dataclasses.dataclass(frozen=True)
class Tile:
    block: int = 64


class Clock:
    """Each search takes ten seconds."""

    def __init__(self):
        self.now, self.searched = 0.0, []

    def __call__(self):
        return self.now

    def search(self, task, deadline):
        self.searched.append(task.entry[1][0])
        self.now += 10.0
        return None if task.entry[1][0] == 13 else Found(Tile(128), 5.0, 6.0, 3)


def task(number):
    return tune.Task(("k", (number, "bfloat16")), [Tile()], None, torch.bfloat16)


def run(clock, numbers, path, seconds=1000.0):
    return tune.tune_all([task(n) for n in numbers], path, HEAD, STAMP, clock.search, seconds, clock)


def test_rows_are_in_the_committed_format(tmp_path):
    path = tmp_path / "out" / "some-gpu.json"
    assert run(Clock(), [1, 2], path) == (2, 2)
    rows = _tuned.read(path)["rows"]
    assert rows[0] == dict(kernel="k", key=[1, "bfloat16"], config=dict(block=128), microseconds=5.0,
                           heuristic_microseconds=6.0, **STAMP)  # fmt: skip
    assert not list(path.parent.glob("*.tmp"))


def test_it_stops_in_time_and_goes_on_where_it_stopped(tmp_path):
    path, clock = tmp_path / "some-gpu.json", Clock()
    assert run(clock, [1, 2, 3, 4], path, seconds=15.0) == (2, 4)
    assert clock.searched == [1, 2]
    again = Clock()
    assert run(again, [1, 2, 3, 4], path) == (4, 4)
    assert again.searched == [3, 4]


def test_an_interruption_keeps_the_finished_keys(tmp_path):
    path, clock = tmp_path / "some-gpu.json", Clock()

    def interrupted(item, deadline):
        if item.entry[1][0] == 3:
            raise KeyboardInterrupt
        return clock.search(item, deadline)

    with pytest.raises(KeyboardInterrupt):
        tune.tune_all([task(n) for n in (1, 2, 3)], path, HEAD, STAMP, interrupted, 1000.0, clock)
    assert [row["key"][0] for row in json.loads(path.read_text())["rows"]] == [1, 2]


def test_a_key_whose_heuristic_fails_is_reported_and_not_written(tmp_path, capsys):
    path = tmp_path / "some-gpu.json"
    assert run(Clock(), [13, 14], path) == (1, 2)
    assert "k [13, 'bfloat16']: the heuristic's configuration fails" in capsys.readouterr().out


def test_a_file_of_another_device_is_refused(tmp_path):
    path = tmp_path / "some-gpu.json"
    path.write_text(json.dumps(dict(device="Other GPU", architecture=90, rows=[])))
    with pytest.raises(ValueError, match="holds winners of Other GPU, not of Some GPU"):
        run(Clock(), [1], path)


def test_a_key_gets_its_share_of_the_time(tmp_path):
    deadlines = []

    def search(item, deadline):
        deadlines.append(deadline)
        return Found(Tile(), 1.0, 1.0, 1)

    tune.tune_all([task(1)], tmp_path / "a.json", HEAD, STAMP, search, 10.0, lambda: 0.0)
    tune.tune_all([task(1)], tmp_path / "b.json", HEAD, STAMP, search, 1000.0, lambda: 0.0)
    assert deadlines == [10.0, tune.SECONDS_FOR_ONE_KEY]


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main(["--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_candidate_that_ended_the_process_or_the_device_is_passed_over(tmp_path):
    path, tried = tmp_path / "some-gpu.lost.json", []

    def measure(config):
        tried.append(config)
        if config == "bad":
            raise DeviceLost("an illegal access")
        return 1.0

    entry = ("k", (1, "bfloat16"))
    guarded = tune.Lost(path).guarded(entry, measure)
    assert guarded("good") == 1.0
    with pytest.raises(DeviceLost):
        guarded("bad")
    again = tune.Lost(path).guarded(entry, measure)
    assert again("bad") is None
    assert again("good") == 1.0
    assert tune.Lost(path).guarded(entry, measure)("bad") is None
    assert tried == ["good", "bad", "good"]


@pytest.mark.skipif(_launch.INTERPRETED, reason="the interpreter compiles nothing")
def test_every_key_has_a_start_that_its_kernel_takes():
    todo = tune.tasks(90)
    assert len({item.entry for item in todo}) == len(todo) > 10
    for item in todo[:: len(todo) // 10]:
        with _tuned.forcing(item.entry, item.starts[-1]), _launch.recording(90) as launches:
            item.call.launcher()(*item.call.allocate(item.dtype))
        assert launches


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_search_on_a_device_finds_a_configuration(tmp_path):
    item = tune.tasks(_launch.architecture())[0]
    found = tune.search_on_device(item, deadline=0.0, lost=tune.Lost(tmp_path / "lost.json"))
    assert found.microseconds > 0
