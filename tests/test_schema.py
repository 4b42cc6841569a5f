"""Whatever JSON holds, it becomes the type asked for or one sentence that names the file."""

from __future__ import annotations

import dataclasses

import pytest

from fastunet.errors import UserError
from fastunet.schema import parse_json, read_json, to_type


@dataclasses.dataclass
class Options:
    count: int
    names: list[str] | None = None
    rate: float = 1.0
    extra: dict = dataclasses.field(default_factory=dict)
    pair: tuple[int, ...] = ()


def test_fields_of_a_dataclass():
    text = '{"count": 2, "names": ["a", "é"], "rate": 1, "extra": {"x": [1]}, "pair": [3, 4]}'
    assert parse_json(text, Options, "f") == Options(2, ["a", "é"], 1.0, {"x": [1]}, (3, 4))


def test_a_byte_order_mark_is_skipped(tmp_path):
    (tmp_path / "a.json").write_bytes('{"ä": 1}'.encode("utf-8-sig"))
    assert read_json(tmp_path / "a.json", dict[str, int]) == {"ä": 1}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", ["not valid JSON", "ends too early"]),
        (b'{"count": 1', ["ends too early"]),
        (b'{"count": 1, "names": ["\\ud800"]}', ["ud800"]),
        (b'{"count": 1, "names": ["\xff"]}', ["UTF-8"]),
        ('{"count": 1}'.encode("utf-16")[:-1], ["UTF-8"]),
        ('{"count": 1}'.encode("utf-16-le"), ["not valid JSON"]),
        (b'{"count": NaN}', ["line 1", "no NaN"]),
        (b'{"count": 1, "rate": Infinity}', ["no Infinity"]),
        (b'{"count": ' + b"9" * 5000 + b"}", ["out of range"]),
        (b'{"count": 1, "rate": 1e400}', ["out of range"]),
        (b"[" * 100_000 + b"]" * 100_000, ["too deeply"]),
        (b'{"count": 1, "extra": {"x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}}", ["too deeply"]),
        (b'{\n "names": ["a",\n ],\n "count": 1}', ["line 2", '"names": ["a",', "remove the comma"]),
        (b'{"count": 1,\n "names": [],\n}', ["line 2", "remove the comma"]),
        (b'{"count": 1, // how many\n "names": []}', ["line 1", "no comments"]),
        (b'{"count": 1 /* how many */}', ["line 1", "no comments"]),
        (b'# options\n{"count": 1}', ["line 1", "no comments"]),
        (b'{"names": ["http://a"]\n "count": 1}', ["line 2", "missing before it"]),
        (b"{'count': 1}", ["double quotes"]),
        (b'{"count": 1} x', ["trailing characters"]),
        (b'{"count": 1, "count": 2}', ["two entries called 'count'"]),
        (b"[1]", ["expected object, got array"]),
        (b"{}", ["missing required field count"]),
        (b'{"count": true}', ["expected int, got bool, at count"]),
        (b'{"count": 1.5}', ["expected int, got float, at count"]),
        (b'{"count": 1, "names": [5]}', ["expected str, got int, at names[0]"]),
        (b'{"count": 1, "number": 2}', ["does not know: 'number'"]),
    ],
)
def test_what_does_not_fit_is_one_sentence(text, words):
    with pytest.raises(UserError) as caught:
        parse_json(text, Options, "some/file.json")
    message = str(caught.value)
    assert message.startswith("some/file.json ")
    assert len(message) < 250
    for word in words:
        assert word in message


def test_a_checked_value_without_text():
    assert to_type({"a": [1]}, dict[str, list[int]], "f") == {"a": [1]}
    with pytest.raises(UserError, match="f cannot be used: expected int, got str"):
        to_type({"a": ["x"]}, dict[str, list[int]], "f")


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"cannot read .*nothing\.json: no such file"):
        read_json(tmp_path / "nothing.json", dict)
