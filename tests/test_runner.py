"""``python -m tests``: every part runs whatever fails, and the last line has the sums."""

from __future__ import annotations

import pytest

from tests import __main__ as runner


@pytest.fixture
def three_parts(tmp_path, monkeypatch):
    """A part with a failure and a skip, one that cannot even start, and one after it that is good."""
    (tmp_path / "pyproject.toml").write_text("[tool.pytest.ini_options]\n")
    (tmp_path / "test_bad.py").write_text(
        "import pytest\ndef test_a():\n    assert 1 == 2, 'reason of the failure'\ndef test_b():\n    pass\n"
        "def test_c():\n    pytest.skip('no such device')\n"
    )
    (tmp_path / "test_good.py").write_text("import os\ndef test_d():\n    assert os.environ['SAID'] == 'yes'\n")
    parts = [runner.Part("bad", (str(tmp_path / "test_bad.py"),)), runner.Part("absent", ("no/such/folder",)),
             runner.Part("good", (str(tmp_path / "test_good.py"),), (("SAID", "yes"),))]  # fmt: skip
    monkeypatch.setattr(runner, "parts", lambda: parts)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # half of the time that pytest takes to start
    monkeypatch.setenv("PYTEST_PLUGINS", "xdist.plugin")
    return parts


def test_every_part_runs_and_the_status_counts(three_parts, capsys):
    assert runner.main(["-p", "no:cacheprovider"]) == 1
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[-1] == "2 passed, 2 failed, 1 skipped"
    assert any("FAILED" in line and "test_bad::test_a" in line for line in lines)
    assert any(line.startswith("skipped 1:") and "no such device" in line for line in lines)
    assert any("reason of the failure" in line for line in lines), "the output of a part that failed is shown"
    assert any("pytest ended with 4, at its start" in line for line in lines)
    del three_parts[:2]
    assert runner.main([]) == 0


def test_the_summary_names_the_test_in_which_a_process_died(three_parts, tmp_path, capsys):
    (tmp_path / "test_bad.py").write_text("import os\ndef test_a():\n    os.abort()\n")
    del three_parts[1:]
    assert runner.main([]) == 1
    assert "bad: pytest ended with -6, at test_bad.py::test_a" in capsys.readouterr().out


def test_the_rest_is_asked_for(three_parts, monkeypatch, capsys):
    assert {part.marks for part in runner.rest()} == {"slow", "not slow"}
    monkeypatch.setattr(runner, "rest", lambda: three_parts[2:])
    assert runner.main(["--rest", "-k", "test_d"]) == 0
    assert capsys.readouterr().out.strip().endswith("1 passed, 0 failed, 0 skipped")
