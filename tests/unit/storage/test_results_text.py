from __future__ import annotations

import csv
import errno
import io
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.backends.core.errors import JournalError
from fanfold.backends.core.types import Json
from fanfold.backends.storage.results import RESULT_COLUMNS, make_layout, write_csv, write_jsonl

SCHEMA: dict[str, Json] = {
    "type": "object",
    "properties": {"score": {"type": "number"}, "why": {"type": "string"}, "tags": {}},
}

FREE = make_layout(None)


def record(output: Json, **more: Json) -> dict[str, Json]:
    base = dict.fromkeys(RESULT_COLUMNS) | {"v": 1, "index": 0, "id": "a", "status": "done"}
    return base | {"simulated": True, "attempts": 1, "output": output} | more


def rows_of(
    records: list[dict[str, Json]], schema: dict[str, Json] | None, safe: bool = False
) -> list[dict[str, str]]:
    stream = io.BytesIO()
    assert write_csv(records, stream, make_layout(schema), safe=safe) == len(records)
    return list(csv.DictReader(io.StringIO(stream.getvalue().decode(), newline="")))


def test_jsonl() -> None:
    stream = io.BytesIO()
    failed = record(None, status="failed", error="é")
    assert write_jsonl([record({"b": [1], "a": 2}), failed], stream, FREE) == 2
    lines = stream.getvalue().splitlines()
    first, second = map(orjson.loads, lines)
    assert tuple(first) == RESULT_COLUMNS
    assert list(first["output"].items()) == [("b", [1]), ("a", 2)]
    assert first["simulated"] is True
    assert (second["output"], second["error"]) == (None, "é")


def test_csv_has_a_column_per_property() -> None:
    (row,) = rows_of([record({"score": -1.5, "why": 'a,"b"\n', "tags": ["x", 1]})], SCHEMA)
    head = ["id", "status", "output.score", "output.why", "output.tags", "error_class"]
    assert list(row)[:6] == head
    assert list(row)[-1] == "output_unfit"
    assert row["output.score"] == "-1.5"
    assert row["output.why"] == 'a,"b"\n'
    assert row["output.tags"] == '["x",1]'
    assert (row["output_unfit"], row["error"], row["simulated"]) == ("", "", "true")


def test_csv_without_a_schema_has_one_output() -> None:
    rows = rows_of([record("text"), record({"a": 1}), record(None)], None)
    assert list(rows[0]) == list(RESULT_COLUMNS)
    assert [row["output"] for row in rows] == ["text", '{"a":1}', ""]


def test_csv_of_failed_and_odd_outputs() -> None:
    rows = rows_of([record(None), record("text"), record({"why": "x", "more": 1})], SCHEMA)
    assert [row["output.why"] for row in rows] == ["", "", "x"]
    assert [row["output_unfit"] for row in rows] == ["", '"text"', '{"why":"x","more":1}']


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r"])
def test_csv_disarms_formulas_of_the_model_only(start: str) -> None:
    text = f"{start}1+1"
    (row,) = rows_of([record({"why": text}, id=text, error=text, model=text)], SCHEMA)
    assert row["output.why"] == row["error"] == row["model"] == f"'{text}"
    assert row["id"] == text
    (row,) = rows_of([record(text)], None)
    assert row["output"] == f"'{text}"


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\n"])
def test_a_safe_csv_disarms_every_cell(start: str) -> None:
    text = f"{start}cmd|' /C calc'!A1"
    schema: dict[str, Json] = {
        "type": "object",
        "properties": {text: {"type": "string"}, "n": {"type": "number"}},
    }
    output = {text: text, "n": -1.5}
    rows = rows_of([record(output, id=text, error=text)], schema, safe=True)
    assert all(
        cell is None
        or not cell.startswith(("=", "+", "@", "-", "\t", "\r", "\n"))
        or cell == "-1.5"
        for row in rows
        for cell in (*row, *row.values())
    )
    assert rows[0]["id"] == f"'{text}"


@pytest.mark.parametrize("number", ["-1.5", "+2", "-3e-7", "-.5", "+1.E5"])
@pytest.mark.parametrize("safe", [False, True])
def test_numbers_stay_numbers(number: str, safe: bool) -> None:
    (row,) = rows_of([record(number, id=number)], None, safe=safe)
    assert (row["output"], row["id"]) == (number, number)
    for text in (f"{number}+1", f"{number}\n", number + "-cmd", "-", "--1", "-1,5", "-\u0661"):
        (row,) = rows_of([record(text)], None, safe=safe)
        assert row["output"] == f"'{text}"


@settings(deadline=None)
@given(st.lists(st.text(), min_size=1), st.text(min_size=1))
def test_csv_survives_any_text(texts: list[str], name: str) -> None:
    schema: dict[str, Json] = {"type": "object", "properties": {name: {"type": "string"}}}
    rows = rows_of([record({name: text}) for text in texts], schema)
    assert [row[f"output.{name}"].removeprefix("'") for row in rows] == [
        text.removeprefix("'") for text in texts
    ]


class Full(io.RawIOBase):
    name = "/data/out.csv"

    def __init__(self, room: int) -> None:
        self.room = room

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        if self.room <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.room -= 1
        return len(data)


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_full_disk_is_told(room: int) -> None:
    told = r"/data/out\.csv: the results cannot be written: No space left"
    with pytest.raises(JournalError, match=told):
        write_csv([record("x")] * 3, Full(room), FREE)  # type: ignore[arg-type]
    with pytest.raises(JournalError, match=told):
        write_jsonl([record("x")] * 3, Full(room), FREE)  # type: ignore[arg-type]


def test_a_refused_flush_is_told() -> None:
    stream = io.BufferedWriter(Full(0), 1 << 16)
    with pytest.raises(JournalError, match="No space left"):
        write_jsonl([record("x")], stream, FREE)
    with pytest.raises(OSError, match="No space left"):
        stream.close()


def test_a_stream_without_a_name() -> None:
    class Nameless(io.BytesIO):
        def write(self, _: object) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    with pytest.raises(JournalError, match=r"the output stream: .*Broken pipe") as caught:
        write_jsonl([record("x")], Nameless(), FREE)
    assert isinstance(caught.value.__cause__, BrokenPipeError)
