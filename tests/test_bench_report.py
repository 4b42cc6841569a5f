"""README and pages hold exactly what the committed result files generate; and what tables say of rows."""

import pytest

from bench import report
from bench.measuring.rows import RESULTS, devices, newest, read, scaling_results, write
from bench.pages import scaling_page
from bench.pages.tables import device_report, milliseconds
from tests.bench_rows import environment, results, row


def test_readme_and_page_are_those_of_the_committed_rows():
    if not any(newest(slug) for slug in devices()):
        pytest.skip("no benchmark rows are committed yet (bench/results is empty)")
    assert report.between(report.README.read_text()) == report.front(), "run python -m bench.report"
    assert report.between(report.PAGE.read_text()) == report.section(), "run python -m bench.report"


def test_scaling_page_is_that_of_the_committed_rows():
    text = scaling_page.PAGE.read_text()
    generated = report.between(text, scaling_page.BEGIN, scaling_page.END)
    assert generated == scaling_page.section(), "run python -m bench.pages.scaling_page"


def test_every_committed_file_can_be_read():
    for path in RESULTS.rglob("*.json"):
        found = read(path)
        assert path.parent.name == found.environment.slug


def test_the_headline_is_against_the_best_rival_that_is_right():
    text = device_report(results())
    line = next(line for line in text.splitlines() if line.startswith("| brats inference, logits"))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[3:7] == ["fastunet, graph", "plain, channels_last: 2 ms", "**1.60×**", "3.20×"]
    assert cells[7] == "40%"
    assert cells[8] == "peak 50 MB / 100 MB (0.50)"
    assert "compiled: wrong (error 7 times its budget; not timed)" in text.replace("bf16, compiled", "bf16\ncompiled")


def test_a_loss_is_reported_as_a_loss():
    assert "| plain: 3 ms | **0.75×** |" in device_report(results())


def test_memory_and_first_results():
    """A loss keeps what it likes, so long as its peak is low."""
    text = device_report(results())
    assert text.count("kept 10 MB / 100 MB (0.10)") == 1
    assert text.count("peak 20 MB / 100 MB (0.20)") == 1
    assert "| fastunet | 2.5 s |" in text
    assert "| compiled | 31.0 s |" in text


def test_milliseconds_choose_their_unit():
    found = [milliseconds(v) for v in (0.0123, 0.9996, 1.0, 99.95, 1234.4, 12345.0)]
    assert found == ["12.3 µs", "1e+03 µs", "1 ms", "100 ms", "1234 ms", "12.3 s"]


def test_rows_survive_their_file(tmp_path):
    path = tmp_path / "test-gpu" / "x.json"
    kept = results()
    write(path, kept.environment, list(kept.rows))
    found = read(path)
    assert found.environment == kept.environment
    assert [(r.workload, r.variant, r.state, r.note) for r in found.rows] == [
        (r.workload, r.variant, r.state, r.note) for r in kept.rows
    ]
    assert [r.p50_ms for r in found.rows] == pytest.approx([r.p50_ms for r in kept.rows], rel=1e-4)
    assert [p.name for p in path.parent.iterdir()] == ["x.json"]


def test_the_newest_file_of_each_device_counts(tmp_path):
    for day, ms in ((1, 5.0), (3, 7.0), (2, 6.0)):
        machine = environment(date=f"2026-01-0{day}T00:00:00+00:00")
        write(tmp_path / "test-gpu" / f"{day}.json", machine, [row("fastunet", ms)])
        at = row("fastunet", ms, axis="batch", value=day)
        write(tmp_path / "test-gpu" / f"{day}-scaling.json", machine, [at, row("fastunet", ms, axis="side", value=1)])
    assert devices(tmp_path) == ["test-gpu"]
    assert newest("test-gpu", tmp_path).rows[0].p50_ms == 7.0
    points = {(r.axis, r.value): r.p50_ms for r in scaling_results("test-gpu", tmp_path).rows}
    assert points == {("batch", 1): 5.0, ("batch", 2): 6.0, ("batch", 3): 7.0, ("side", 1): 7.0}


def test_text_between_markers_is_replaced_and_nothing_else():
    text = f"a\n{report.BEGIN}\nold\n{report.END}\nb\n"
    once = report.replaced(text, "new\n\ntable")
    assert once == f"a\n{report.BEGIN}\nnew\n\ntable\n{report.END}\nb\n"
    assert report.replaced(once, "new\n\ntable") == once
    assert report.between(once) == "new\n\ntable"
    assert report.replaced(once, "") == f"a\n{report.BEGIN}\n{report.END}\nb\n"
    for broken in ("no markers", text + report.BEGIN, f"{report.END}\n{report.BEGIN}\n"):
        with pytest.raises(ValueError, match="once each"):
            report.replaced(broken, "x")


def test_pictures_hold_their_numbers(tmp_path):
    pictures = pytest.importorskip("bench.pages.pictures", reason="needs matplotlib")
    drawn = {path.stem.removeprefix("test-gpu-"): path for path in pictures.draw_all(results(), tmp_path)}
    assert set(drawn) == {"rivals", "waterfall", "roofline"}
    bars = pictures.rivals(results()).axes[0].patches
    assert [bar.get_width() for bar in bars] == [4.0, 2.0, 1.6, 1.25]
    heights = [bar.get_height() for bar in pictures.waterfall(results()).axes[0].patches]
    assert heights == [4.0, 2.0, 1.8, 1.7, 1.25]
    before = drawn["rivals"].read_bytes()
    pictures.draw_all(results(), tmp_path)
    assert len(before) > 5000
