from __future__ import annotations

import resource
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fanfold.backends.core.errors import JournalError
from fanfold.backends.core.types import Json
from fanfold.backends.storage.results import (
    BATCH_ROWS,
    GROUP_ROWS,
    RESULT_COLUMNS,
    make_layout,
    write_parquet,
)

SCORED: dict[str, Json] = {
    "type": "object",
    "properties": {
        "score": {"type": "number"},
        "rank": {"type": "integer"},
        "label": {"enum": ["yes", "no", None]},
        "sure": {"type": ["boolean", "null"]},
        "why": {"$ref": "#/$defs/text"},
        "steps": {"type": "array", "items": {"$ref": "#/$defs/step"}},
        "either": {"anyOf": [{"type": "string"}, {"type": "integer"}]},
        "free": {"type": "object", "additionalProperties": True},
        "any": {},
    },
    "$defs": {
        "text": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "step": {"type": "object", "properties": {"n": {"type": "integer"}}},
    },
}

FREE = make_layout(None)


def record(index: int, output: Json, **more: Json) -> dict[str, Json]:
    return {
        "v": 1,
        "index": index,
        "id": f"m{index}",
        "status": "done",
        "output": output,
        "error_class": None,
        "error": None,
        "endpoint": "http://127.0.0.1:8000",
        "model": "sim",
        "attempts": 1,
        "repairs": 0,
        "prompt_tokens": 12,
        "completion_tokens": None,
        "latency_s": 0.25,
        "finished_at": "2026-01-02T03:04:05.678+00:00",
        "simulated": True,
        "fingerprint": "ab" * 12,
        **more,
    }


def written(
    path: Path, outputs: Iterable[Json], schema: dict[str, Json] | None
) -> tuple[pa.Table, list[dict[str, Any]]]:
    records = [record(i, output) for i, output in enumerate(outputs)]
    target = path / "results.parquet"
    assert write_parquet(records, target, make_layout(schema)) == len(records)
    table = pq.read_table(target)
    return table, table.to_pylist()


def test_columns_and_types(tmp_path: Path) -> None:
    output = {
        "score": 1,
        "rank": 3.0,
        "label": "yes",
        "sure": None,
        "why": "x",
        "steps": [{"n": 1}, {"n": None}],
        "either": "5",
        "free": {"a": 1},
        "any": [1, "b"],
    }
    table, rows = written(tmp_path, [output], SCORED)
    assert table.column_names == [*RESULT_COLUMNS, "output_unfit"]
    fields: list[tuple[str, pa.DataType]] = [
        ("score", pa.float64()),
        ("rank", pa.int64()),
        ("label", pa.string()),
        ("sure", pa.bool_()),
        ("why", pa.string()),
        ("steps", pa.list_(pa.struct([("n", pa.int64())]))),
        ("either", pa.string()),
        ("free", pa.string()),
        ("any", pa.string()),
    ]
    assert table.schema.field("output").type == pa.struct(fields)
    assert rows[0]["output"] == output | {"either": '"5"', "free": '{"a":1}', "any": '[1,"b"]'}
    assert rows[0]["output_unfit"] is None
    assert rows[0]["finished_at"] == datetime(2026, 1, 2, 3, 4, 5, 678000, UTC)
    same = ["id", "attempts", "prompt_tokens", "completion_tokens", "latency_s", "simulated"]
    assert [rows[0][name] for name in same] == ["m0", 1, 12, None, 0.25, True]


def test_failed_rows_have_no_output(tmp_path: Path) -> None:
    failed = record(0, None, status="failed", error_class="BackendError", error="lost")
    target = tmp_path / "r.parquet"
    write_parquet([failed], target, make_layout(SCORED))
    (row,) = pq.read_table(target).to_pylist()
    assert (row["status"], row["output"], row["output_unfit"]) == ("failed", None, None)
    assert (row["error_class"], row["error"], row["simulated"]) == ("BackendError", "lost", True)


@pytest.mark.parametrize(
    "output",
    [
        {"rank": 2**63},
        {"rank": 1e30},
        {"rank": 0.5},
        {"rank": True},
        {"score": "high"},
        {"score": False},
        {"undeclared": 1},
        {"sure": 1},
        {"steps": [{"n": 1}, "x"]},
        {"steps": {"n": 1}},
        {"label": 3},
        "text",
        [1],
    ],
)
def test_what_does_not_fit_is_kept_as_text(tmp_path: Path, output: Json) -> None:
    _, rows = written(tmp_path, [{"score": 1.5}, output], SCORED)
    assert rows[0]["output_unfit"] is None
    assert rows[0]["output"]["score"] == 1.5
    assert orjson.loads(rows[1]["output_unfit"]) == output


def test_what_fits_stays_beside_what_does_not(tmp_path: Path) -> None:
    _, rows = written(tmp_path, [{"score": 1.5, "rank": 2**63}], SCORED)
    assert (rows[0]["output"]["score"], rows[0]["output"]["rank"]) == (1.5, None)
    assert orjson.loads(rows[0]["output_unfit"]) == {"score": 1.5, "rank": 2**63}


def test_free_text(tmp_path: Path) -> None:
    table, rows = written(tmp_path, ["as it is", {"a": 1}, None, 3], None)
    assert table.column_names == list(RESULT_COLUMNS)
    assert [row["output"] for row in rows] == ["as it is", '{"a":1}', None, "3"]


def test_no_rows(tmp_path: Path) -> None:
    table, rows = written(tmp_path, [], SCORED)
    assert rows == []
    assert table.schema.field("output").type.num_fields == 9


def test_missing_keys_are_null(tmp_path: Path) -> None:
    write_parquet([{"id": "a"}], tmp_path / "r.parquet", FREE)
    (row,) = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert row == dict.fromkeys(RESULT_COLUMNS) | {"id": "a"}


def test_batches_are_bounded_in_rows_and_bytes(tmp_path: Path) -> None:
    target = tmp_path / "r.parquet"
    assert (
        write_parquet((record(i, "x") for i in range(GROUP_ROWS + 1)), target, FREE)
        == GROUP_ROWS + 1
    )
    assert pq.ParquetFile(target).metadata.num_row_groups == 2
    assert pq.read_table(target, columns=["id"])["id"].to_pylist()[-1] == f"m{GROUP_ROWS}"
    long = "x" * (5 << 20)
    write_parquet((record(i, long) for i in range(5)), target, FREE)
    assert pq.ParquetFile(target).metadata.num_row_groups == 2


def test_rows_are_taken_one_batch_at_a_time(tmp_path: Path) -> None:
    alive = 0
    most = 0

    class Counted(dict[str, Json]):
        def __init__(self, index: int) -> None:
            nonlocal alive, most
            super().__init__(record(index, "x"))
            alive += 1
            most = max(most, alive)

        def __del__(self) -> None:
            nonlocal alive
            alive -= 1

    write_parquet((Counted(i) for i in range(3 * BATCH_ROWS)), tmp_path / "r.parquet", FREE)
    assert most <= 2 * BATCH_ROWS + 1


def interrupted() -> Iterator[dict[str, Json]]:
    yield from (record(i, "x") for i in range(BATCH_ROWS + 5))
    raise JournalError("journal/0001.jsonl, line 7: damaged")


def test_a_failure_leaves_the_old_file_and_no_other(tmp_path: Path) -> None:
    target = tmp_path / "r.parquet"
    target.write_bytes(b"old")
    with pytest.raises(JournalError, match="line 7: damaged"):
        write_parquet(interrupted(), target, FREE)
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("r.parquet", b"old")]


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    target = tmp_path / "r.parquet"
    target.write_bytes(b"old")
    noise = [record(i, str(hash((i, "x"))) * 20) for i in range(4 * BATCH_ROWS)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(JournalError, match=r"r\.parquet: the results cannot be written: File"):
            write_parquet(noise, target, FREE)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [(p.name, p.read_bytes()) for p in tmp_path.iterdir()] == [("r.parquet", b"old")]


def test_a_place_that_is_no_folder_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(JournalError, match=r"file/r\.parquet: .*: Not a directory"):
        write_parquet([], tmp_path / "file" / "r.parquet", FREE)
    with pytest.raises(JournalError, match="No such file"):
        write_parquet([], tmp_path / "absent" / "r.parquet", FREE)


def test_a_damaged_time_names_the_item(tmp_path: Path) -> None:
    with pytest.raises(JournalError, match="item 'm0' is damaged: finished_at is 'noon'"):
        write_parquet([record(0, None, finished_at="noon")], tmp_path / "r.parquet", FREE)
    assert list(tmp_path.iterdir()) == []


# -- any schema, any value ---------------------------------------------------------------

names = st.text(max_size=3)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**63), 2**64 - 1),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=3),
)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(names, inner, max_size=3),
    max_leaves=6,
)
types = st.sampled_from(
    ["string", "integer", "number", "boolean", "null", "array", "object", "odd", 7]
)
bounds = st.integers(-(2**65), 2**65)


def schemas_over(inner: st.SearchStrategy[Json]) -> st.SearchStrategy[Json]:
    return st.fixed_dictionaries(
        {},
        optional={
            "type": st.one_of(types, st.lists(types, max_size=3)),
            "properties": st.dictionaries(names, inner, max_size=3),
            "items": inner,
            "anyOf": st.lists(inner, max_size=3),
            "oneOf": st.one_of(st.lists(inner, max_size=2), st.just(3)),
            "allOf": st.lists(inner, max_size=2),
            "enum": st.lists(scalars, max_size=3),
            "const": scalars,
            "$ref": st.sampled_from(["#", "#/properties/a", "#/items", "elsewhere", 3]),
            "additionalProperties": st.one_of(st.booleans(), inner),
            "patternProperties": st.just({}),
            "minimum": bounds,
            "exclusiveMaximum": bounds,
        },
    )


schemas: st.SearchStrategy[Json] = st.recursive(
    st.one_of(st.booleans(), st.just({})), schemas_over, max_leaves=8
)


@st.composite
def fitting(draw: st.DrawFn, schema: Json, depth: int = 0) -> Json:
    """Draw a value that the schema may well allow."""
    if not isinstance(schema, dict) or depth > 3 or draw(st.integers(0, 9)) == 0:
        return draw(values)
    for union in ("anyOf", "oneOf", "allOf"):
        if isinstance(schema.get(union), list) and schema[union]:
            return draw(fitting(draw(st.sampled_from(schema[union])), depth + 1))
    if isinstance(schema.get("properties"), dict):
        parts = schema["properties"].items()
        return {name: draw(fitting(part, depth + 1)) for name, part in parts}
    if "items" in schema:
        return [draw(fitting(schema["items"], depth + 1)) for _ in range(draw(st.integers(0, 2)))]
    return draw(scalars)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(schemas.filter(lambda schema: isinstance(schema, dict)), st.data())
def test_every_output_can_be_written(
    tmp_path: Path, schema: dict[str, Json], data: st.DataObject
) -> None:
    outputs = [data.draw(fitting(schema)) for _ in range(3)] + [data.draw(values)]
    outputs = [orjson.loads(orjson.dumps(output)) for output in outputs]
    _, rows = written(tmp_path, outputs, schema)
    for row, output in zip(rows, outputs, strict=True):
        if row.get("output_unfit") is not None:
            assert orjson.loads(row["output_unfit"]) == output
        else:
            assert holds(row["output"], output)


def holds(cell: Json, value: Json) -> bool:
    """Whether a cell tells all of a value: itself, or as JSON text, absent and null alike."""
    if isinstance(cell, dict) and isinstance(value, dict):
        return value.keys() <= cell.keys() and all(holds(cell[k], value.get(k)) for k in cell)
    if isinstance(cell, list) and isinstance(value, list):
        return len(cell) == len(value) and all(map(holds, cell, value))
    if isinstance(cell, float) and isinstance(value, int):
        return cell == float(value)
    if cell == value and isinstance(cell, bool) == isinstance(value, bool):
        return True
    return isinstance(cell, str) and bool(orjson.loads(cell) == value)
