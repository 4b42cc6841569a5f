"""The stages of the GPU run with stand-in commands: deadlines, rows, exit codes and the summary; no GPU is needed."""

from __future__ import annotations

import json
import sys
import time

import pytest
import torch

from bench.gpu import __main__ as gpu
from bench.gpu.run import Stage

PYTHON = [sys.executable, "-c"]


def rows(folder, name="correctness"):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_steps_are_written_as_they_end(tmp_path):
    stage = Stage("correctness", tmp_path, 60)
    stage.command("good", [*PYTHON, "print('fine')"])
    assert [(r["name"], r["status"]) for r in rows(tmp_path)] == [("good", "ok")]
    stage.command("bad", [*PYTHON, "print('why'); raise SystemExit(1)"])
    stage.command("missing", ["no-such-program"])
    assert [r["status"] for r in rows(tmp_path)] == ["ok", "failed", "absent"]
    assert rows(tmp_path)[1]["tail"] == "why\n"
    assert stage.failed


def test_a_missing_tool_is_no_failure(tmp_path):
    stage = Stage("profile", tmp_path, 60)
    assert stage.command("counters", ["no-such-program"]).status == "absent"
    assert not stage.failed


def test_a_step_is_ended_at_the_deadline_with_all_it_started(tmp_path):
    stage = Stage("correctness", tmp_path, 3)
    alive = tmp_path / "alive"
    child = f"import time\nwhile True: open({str(alive)!r}, 'w').write(str(time.time())); time.sleep(0.1)"
    script = f"import subprocess, sys, time; subprocess.Popen([sys.executable, '-c', {child!r}]); time.sleep(60)"
    started = time.monotonic()
    assert stage.command("slow", [*PYTHON, script]).status == "timeout"
    assert time.monotonic() - started < 8
    time.sleep(0.3)
    before = alive.read_text()
    time.sleep(0.5)
    assert alive.read_text() == before
    assert stage.command("next", [*PYTHON, ""]).status == "skipped"


def test_a_step_gets_its_share_of_the_time_left(tmp_path):
    now = [0.0]
    stage = Stage("correctness", tmp_path, 100, clock=lambda: now[0])
    assert stage.left == 100
    now[0] = 97.0
    assert stage.command("small share", [*PYTHON, ""], share=0.3).status == "skipped"
    assert stage.command("the rest", [*PYTHON, ""]).status == "ok"


def test_no_tests_is_ok_only_where_allowed(tmp_path):
    stage = Stage("correctness", tmp_path, 60)
    assert stage.command("a", [*PYTHON, "raise SystemExit(5)"], none_is_ok=True).status == "ok"
    assert stage.command("b", [*PYTHON, "raise SystemExit(5)"]).status == "failed"


def test_summary_ends_with_the_reasons(tmp_path):
    stage = Stage("correctness", tmp_path, 60)
    stage.command("good", [*PYTHON, ""])
    stage.command("bad", [*PYTHON, "print('reason'); raise SystemExit(3)"])
    lines = stage.summary().splitlines()
    assert lines[0].startswith("ok")
    assert lines[1].startswith("failed")
    assert lines[-1] == "reason"


@pytest.mark.parametrize("name", gpu.STAGES)
def test_every_stage_runs_commands_that_exist(name, tmp_path, monkeypatch):
    started = []
    stage = Stage(name, tmp_path, 600)
    (tmp_path / "expensive-brats.txt").write_text("conv_kernel\npool_kernel\n")
    monkeypatch.setattr(stage, "command", lambda step, arguments, **options: started.append((step, arguments)))
    gpu.STAGES[name](stage)
    assert len(started) == len({step for step, _ in started}) > 0
    for _, arguments in started:
        if "-m" in arguments:
            module = arguments[arguments.index("-m") + 1]
            assert module == "pytest" or (gpu.ROOT / (module.replace(".", "/") + ".py")).exists(), module
    if name == "profile":
        assert "regex:^(conv_kernel|pool_kernel)$" in started[1][1]


def test_numbers_come_first_and_the_sanitizer_last(tmp_path, monkeypatch):
    started = []
    stage = Stage("correctness", tmp_path, 600)
    monkeypatch.setattr(stage, "command", lambda step, arguments, **options: started.append(step))
    gpu.correctness(stage)
    assert started[:2] == ["first", "compile"]
    assert started[-2:] == ["memcheck", "racecheck"]


def test_the_first_numbers_are_those_of_the_kernels_they_name():
    pytest.importorskip("triton")
    from bench.gpu import first
    from fastunet.kernels import _launch

    for config, channels in first.CASES.items():
        with _launch.recording(90) as launches:
            x, weight, bias = (t.to("meta") for t in first.operands(channels, "cpu"))
            first.forward.forward(x, None, weight, bias, 1, True, config=config)
        assert launches[-1].kernel.__name__ == f"conv_relu_{config.variant}_kernel"


def test_without_a_gpu_it_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path), "--stage", "correctness"]) == 2
    assert capsys.readouterr().err == "bench.gpu: no CUDA device here\n"


def test_exit_status_says_whether_a_step_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    for code, expected in ((0, 0), (1, 1)):
        monkeypatch.setitem(gpu.STAGES, "tune", lambda s, c=code: s.command("t", [*PYTHON, f"raise SystemExit({c})"]))
        assert gpu.main(["--out", str(tmp_path), "--stage", "tune"]) == expected


def test_the_profiled_workload_trains_and_predicts(monkeypatch):
    import fastunet
    from bench.gpu.profile import workload

    done, step, predict = [], torch.optim.Adam.step, fastunet.UNet.predict
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: (done.append("step"), step(self)))
    monkeypatch.setattr(fastunet.UNet, "predict", lambda self, x: done.append(predict(self, x).shape))
    workload("brats", device="cpu", images=1, size=16, width=4, depth=2)()
    assert done == ["step", (1, 16, 16)]


def test_small_launches_cover_every_operator():
    pytest.importorskip("triton")
    from bench.gpu.small import small_calls
    from fastunet.dispatch import OPERATORS

    assert {call.operator for call in small_calls()} == set(OPERATORS)


def test_predictions_stand_beside_what_is_measured(tmp_path, monkeypatch, capsys):
    pytest.importorskip("triton", reason="Triton, which compiles the kernels, is not installed")
    from bench.gpu import predict
    from fastunet.kernels import _launch

    monkeypatch.setattr(_launch, "architecture", lambda: 90)
    every = list(predict.calls())
    assert {"brats 240 x16", "isbi 572 x1"} <= {case for case, _ in every}
    chosen = [next(pair for pair in every if pair[1].operator == name) for name in ("conv_relu", "max_pool2d_backward")]
    monkeypatch.setattr(predict, "calls", lambda: chosen)
    predict.main(["--out", str(tmp_path)], measure=lambda call, dtype: 1e3)
    rows = json.loads((tmp_path / "predicted.json").read_text())["rows"]
    assert [row["operator"] for row in rows] == ["conv_relu", "max_pool2d_backward"]
    assert all(0 < row["floor_us"] < row["predicted_us"] < row["measured_us"] == 1e3 for row in rows)
    assert "measured   1000.0" in capsys.readouterr().out
