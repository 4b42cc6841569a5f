"""The regression guard: what counts as moved, and what does not."""

import pytest

from bench.compare import changes, main, merged, report
from bench.measuring.rows import FAILED, OURS, Results, write
from tests.bench_rows import environment, row


def verdict(before, after):
    (change,) = changes([before], [after])
    return change.verdict


def test_a_change_within_the_spread_is_noise():
    wide = dict(p20_ms=0.9, p80_ms=1.1)
    assert verdict(row("fastunet", 1.0, **wide), row("fastunet", 1.15, p20_ms=1.1, p80_ms=1.2)) == "same"
    assert verdict(row("fastunet", 1.0), row("fastunet", 1.15)) == "slower"
    assert verdict(row("fastunet", 1.0), row("fastunet", 0.85)) == "faster"
    assert verdict(row("fastunet", 1.0), row("fastunet", 0.98)) == "same"


def test_slower_and_faster_by_the_same_factor_are_judged_alike():
    quiet = dict(rounds=9)
    assert verdict(row("a", 1.0, **quiet), row("a", 1.041)) == "slower"
    assert verdict(row("a", 1.041, **quiet), row("a", 1.0)) == "faster"
    assert verdict(row("a", 1.0, **quiet), row("a", 1.039)) == "same"
    assert verdict(row("a", 1.039, **quiet), row("a", 1.0)) == "same"


def test_a_variant_that_is_no_longer_right_is_broken():
    broken = row("fastunet", 1.0, OURS, p50_ms=0.0, state=FAILED, note="RuntimeError")
    assert verdict(row("fastunet", 1.0, OURS), broken) == "broken"
    assert verdict(broken, row("fastunet", 1.0, OURS)) == "mended"
    assert verdict(broken, broken) == "same"


def test_only_rows_of_the_same_workload_and_variant_are_compared():
    base = [row("fastunet", 1.0), row("fastunet", 1.0, shape="1×2×8×8")]
    found = changes(base, [row("fastunet", 3.0, shape="1×2×8×8"), row("plain", 9.0)])
    assert [(c.base.shape, c.ratio) for c in found] == [("1×2×8×8", 3.0)]


def test_report_names_what_moved_worst_first():
    base = [row("a", 1.0), row("b", 1.0), row("c", 1.0), row("d", 1.0)]
    head = [row("a", 1.5), row("b", 1.0), row("c", 2.0), row("d", 0.5)]
    lines = report(changes(base, head)).splitlines()
    assert [line.split(" | ")[1:3] for line in lines[2:5]] == [["c", "slower"], ["a", "slower"], ["d", "faster"]]
    assert "+100.0%" in lines[2]
    assert lines[-1] == "1 of 4 measurements moved by no more than their noise."


def test_repeated_runs_are_joined_into_their_whole_spread():
    runs = [Results(environment(), (row("a", ms),)) for ms in (1.0, 1.4)]
    (joined,) = merged(runs)
    assert (joined.p20_ms, joined.p50_ms, joined.p80_ms) == pytest.approx((0.99, 1.2, 1.414))
    assert joined.rounds == 18
    assert verdict(joined, row("a", 1.4)) == "same"


def test_command_line_on_files(tmp_path, capsys):
    paths = [tmp_path / name for name in ("base.json", "head.json", "other.json")]
    write(paths[0], environment(), [row("fastunet", 1.0, OURS)])
    write(paths[1], environment(), [row("fastunet", 2.0, OURS)])
    write(paths[2], environment(device="another GPU"), [row("fastunet", 2.0, OURS)])
    assert main([str(paths[0]), str(paths[1])]) == 1
    assert "slower" in capsys.readouterr().out
    assert main([str(paths[1]), str(paths[0])]) == 0
    assert main([str(paths[0]), str(paths[2])]) == 2
    assert "different devices" in capsys.readouterr().err


def test_bad_input_is_one_sentence(tmp_path, capsys):
    path = tmp_path / "x.json"
    path.write_text('{"rows": []}')
    for sides, words in (([str(path), str(path)], str(path)), ([str(path), "HEAD"], "two files or two commits"),
                         (["no-such-commit", "HEAD"], "no-such-commit")):  # fmt: skip
        assert main(sides) == 2
        error = capsys.readouterr().err
        assert words in error
        assert len(error.splitlines()) == 1
