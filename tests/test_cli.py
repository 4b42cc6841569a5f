"""The command itself: exit codes, help, versions, and what it imports."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
import torch

from fastunet import __version__, cli, functional
from fastunet.architecture import PRESETS
from fastunet.cli import main
from fastunet.training.display import Display
from tests.cli_helpers import assert_user_error, run, write_checkpoint
from tests.processes import ended, start


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        main([name, "--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    example, _, rest = out.partition("\n\n")
    assert rest.startswith(f"usage: fastunet {name}")
    # the example is accepted as it stands
    assert example.startswith(f"example: fastunet {name}")
    assert cli._parser().parse_args(example.split()[2:]).command == name


def test_completion(tmp_path):
    pytest.importorskip("argcomplete", reason="argcomplete is not installed (pip install 'fastunet[completion]')")
    line = "fastunet seg"
    process = start(main, [], COMP_LINE=line, COMP_POINT=str(len(line)), _ARGCOMPLETE="1",
                    _ARGCOMPLETE_STDOUT_FILENAME=str(tmp_path / "out"))  # fmt: skip
    assert ended(process) == 0
    assert (tmp_path / "out").read_text().strip() == "segment"


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.split() == ["fastunet", __version__]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_keeps_freed_memory_in_a_process_of_its_own(monkeypatch, capsys):
    kept = []
    monkeypatch.setattr(cli.allocator, "keep_freed_memory", lambda: kept.append(1))
    assert cli.main(["info"]) == 0
    assert not kept
    monkeypatch.setattr(sys, "argv", ["fastunet", "info"])
    assert cli.main() == 0
    assert kept


def test_the_script_and_its_exit_code():
    """A full standard output is one sentence."""
    script = os.path.join(os.path.dirname(sys.executable), "fastunet")
    if not os.path.exists(script):
        pytest.skip("the package is not installed")
    with open("/dev/full", "w") as full:
        line = [script, "summary", "--width", "2", "--depth", "1"]
        done = subprocess.run(line, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "fastunet: the standard output: no space left on device\n"


@pytest.mark.parametrize("line, words", [
    ("train DATA --out !", "the argument after --out is empty"), ("check !", "the argument after check is empty"),
    ("evaluate RUN DATA --csv=", "--csv is empty"), ("summary --width ٣", "'٣' is not a whole number"),
    ("train DATA --out RUN --ema 0.9_9", "'0.9_9' is not a number"), ("info --device meta", "expected auto, cpu, cuda"),
    ("summary RUN --preset isbi", "--preset, --width, --depth, --norm and --activation describe an untrained network"),
])  # fmt: skip
def test_arguments_that_nobody_meant(line, words, capsys):
    assert_user_error(capsys, run(*line.replace("!", "").split(" ")), words)


@pytest.mark.parametrize("line", [["check", "~/data"], ["evaluate", "RUN", "DATA", "--csv=~/data"]])
def test_the_home_folder_that_no_shell_put_in(line, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    parsed = vars(cli._parsed(cli._parser(), line))
    assert str(parsed["data" if line[0] == "check" else "csv"]) == "/somewhere/data"


def test_a_size_that_does_not_fit(capsys):
    code = run("summary", "--preset", "isbi", "--size", "500")
    out = capsys.readouterr()
    assert (code, out.out, len(out.err.splitlines())) == (2, "", 1)
    assert out.err.startswith("fastunet: an input of 500×500 does not fit")


def test_interruption(monkeypatch, capsys):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.info, "run", interrupted)
    assert run("info") == 130
    assert capsys.readouterr().err == "fastunet: stopped by SIGINT; every file written so far is whole\n"


def test_defects_are_not_hidden(monkeypatch):
    def broken(args):
        raise ZeroDivisionError

    monkeypatch.setattr(cli.info, "run", broken)
    with pytest.raises(ZeroDivisionError):
        run("info")


def test_reader_that_goes_away():
    """`fastunet summary | head -1`, of a summary that says a line: no traceback, no complaint at exit."""
    script = "import sys; from fastunet import cli; cli.summary.run = print; sys.exit(cli.main())"
    line = [sys.executable, "-c", script, "summary"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait() in (0, 120)


def test_info_names_every_operator_and_the_reason(capsys, monkeypatch):
    monkeypatch.delenv("FASTUNET_BACKEND", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert run("info", "--device", "cpu") == 0
    lines = capsys.readouterr().out.splitlines()
    for operator in functional.__all__:
        row = next(line for line in lines if line.startswith(operator + " "))
        assert row.split()[1:] == ["torch"] * 3
    assert any(line.startswith("not Triton for float32, float16, bfloat16: ") for line in lines)
    assert any(line.startswith("torch 2.") for line in lines)


def test_info_follows_the_environment(capsys, monkeypatch):
    monkeypatch.setenv("FASTUNET_BACKEND", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert run("info", "--device", "cpu") == 0
    out = capsys.readouterr().out
    expected = "triton" if "triton not installed" not in out else "error"
    row = next(line for line in out.splitlines() if line.startswith("max_pool2d"))
    assert row.split()[1:] == [expected] * 3
    monkeypatch.setenv("FASTUNET_BACKEND", "abacus")
    assert_user_error(capsys, run("info", "--device", "cpu"), "abacus")


def test_info_of_kernels(capsys, monkeypatch):
    table = pytest.importorskip("fastunet.inspection.kernel_table", reason="needs Triton")
    monkeypatch.setattr(table, "kernel_table", lambda preset: f"kernels of {preset}")
    for chosen, preset in ((), None), (("--preset", "nnunet2d"), "nnunet2d"):
        assert run("info", "--device", "cpu", "--kernels", *chosen) == 0
        assert capsys.readouterr().out.endswith(f"\n\nkernels of {preset}\n")
    monkeypatch.setattr("fastunet.dispatch.triton_installed", lambda: False)
    assert_user_error(capsys, run("info", "--device", "cpu", "--kernels"), "Triton", "not installed")


def test_display_writes_plain_lines_to_a_file(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr("fastunet.training.display._SECONDS_BETWEEN_LINES", 0.0)
    display = Display(stream=stream)
    display.start("epoch 1/1", 4, 1)
    display.step(8, 0.0, 0.5)
    display.step(8, 0.0, 0.25)
    display.stop()
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].startswith("epoch 1/1: batch 2/4, loss 0.5000, ")
    assert "slices/s" in lines[1]
    assert lines[1].endswith("s left")
    assert "\r" not in stream.getvalue()


def test_display_draws_a_bar_on_a_terminal():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    stream = Terminal()
    display = Display(stream=stream)
    display.start("epoch 1/1", 2)
    display.step(8, 0.0, 0.5)
    display.message("a line")
    display.step(8, 0.0, 0.25)
    display.stop()
    assert "a line\n" in stream.getvalue()
    assert "\r" in stream.getvalue()
    assert "epoch 1/1" in stream.getvalue()


def test_quiet_display_says_nothing():
    stream = io.StringIO()
    display = Display(stream=stream, quiet=True)
    display.start("epoch", 1)
    display.step(8, 0.0)
    display.message("text")
    assert stream.getvalue() == ""


def test_summary_tells_what_inference_holds_at_once(capsys):
    assert main(["summary", "--width", "8", "--depth", "2", "--size", "64"]) == 0
    *_, total, last = capsys.readouterr().out.splitlines()
    ours, plain = (float(word.strip(".")) for word in last.split() if word[0].isdigit())
    assert 0 < ours < plain < float(total.split()[-1])


def test_info_lists_the_blocks_of_a_network(capsys, monkeypatch):
    monkeypatch.setitem(PRESETS, "isbi", PRESETS["isbi"] | dict(width=2))
    assert main(["info", "--preset", "isbi"]) == 0
    out = capsys.readouterr().out
    for part in ("encoders.0", "encoders.3", "bottleneck", "dropout", "decoders.3", "head"):
        assert f"{part:12}fused" in out


def test_info_of_a_run_and_a_preset(tmp_path, capsys):
    write_checkpoint(tmp_path / "best.safetensors")
    assert_user_error(capsys, run("info", tmp_path, "--preset", "isbi"), "--preset isbi beside", str(tmp_path))


def test_info_checks_every_operator(capsys, monkeypatch):
    from fastunet.inspection import selfcheck

    assert set(selfcheck._SHAPES) == set(functional.__all__)
    assert run("info", "--device", "cpu", "--check") == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("passes" in line for line in lines) == 3 * len(functional.__all__)

    def wrong(x, weight, bias=None, *, backend="auto"):
        y = torch.nn.functional.conv2d(x, weight, bias, padding=1).relu()
        return y + 0.01 * (torch.arange(y.shape[-1]) == 3)

    def broken(*args, **options):
        raise RuntimeError("no kernel image\nfor this device")

    monkeypatch.setattr(functional, "conv_relu", wrong)
    monkeypatch.setattr(functional, "max_pool2d", broken)
    code = run("info", "--device", "cpu", "--check")
    out = capsys.readouterr()
    assert sum("FAILS" in line for line in out.out.splitlines()) >= 4
    assert "RuntimeError: no kernel image" in out.out
    assert (code, "conv_relu, max_pool2d cannot be trusted on cpu" in out.err) == (2, True)
