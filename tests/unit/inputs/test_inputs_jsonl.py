from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fanfold.backends.core.errors import InputError
from fanfold.backends.core.types import Item
from fanfold.configs.models import InputConfig

Load = Callable[..., list[Item]]
Put = Callable[[str, str | bytes], Path]


@pytest.mark.parametrize("name", ["a.jsonl", "a.ndjson"])
def test_rows_may_differ(put: Put, load: Load, name: str) -> None:
    path = put(name, '\ufeff{"k": 7, "x": [1, {"y": null}]}\n\n  \n{"k": " b ", "z": 1.5}\r\n')
    assert load(InputConfig(path=str(path), id="k")) == [
        Item(0, "7", {"k": 7, "x": [1, {"y": None}]}),
        Item(1, "b", {"k": " b ", "z": 1.5}),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"x": 1', r"a\.jsonl, line 3: the row is not JSON: .* at character 8, near"),
        ('{"x": NaN}', r"line 3: the row is not JSON: .* NaN is not JSON, write null"),
        ('{"x": "\\ud800"}', r"line 3: the row is not JSON"),
        ("[1, 2]", r"line 3: the row is not a JSON object but an array; .*array of objects \.json"),
        ("[", r"line 3: the row is not JSON: .*; name a file with one array of objects \.json"),
        ('"x"', r"line 3: the row is not a JSON object but a string; each line must be one object"),
        ("1", r"line 3: the row is not a JSON object but a number"),
        ("true", r"line 3: the row is not a JSON object but a boolean"),
        ("null", r"line 3: the row is not a JSON object but null"),
        (b'{"x": "na\xefve"}', r"not encoded as UTF-8: byte 10 of line 3 is 0xEF"),
        (b'{"x": "\0"}', r"a\.jsonl is a binary file"),
        ('{"y": 1}', r"a\.jsonl, line 3 has no column 'x', which the task needs; its columns: y"),
    ],
)
def test_faulty_rows(put: Put, load: Load, line: str | bytes, message: str) -> None:
    raw = line.encode() if isinstance(line, str) else line
    with pytest.raises(InputError, match=message):
        load(InputConfig(path=str(put("a.jsonl", b'{"x": 1}\n\n' + raw + b"\n"))), "x")


def test_nothing_but_blank_lines(put: Put, load: Load) -> None:
    with pytest.raises(InputError, match=r"a\.jsonl has no rows"):
        load(InputConfig(path=str(put("a.jsonl", "\n \n"))))


def test_an_id_that_is_neither_text_nor_number(put: Put, load: Load) -> None:
    path = put("a.jsonl", '{"k": [1]}\n')
    with pytest.raises(InputError, match="line 1: the id in column 'k' is neither text nor a num"):
        load(InputConfig(path=str(path), id="k"))
