"""The input's columns in the results."""

from __future__ import annotations

import io
from datetime import date, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fanfold.backends.core.types import Json, Row
from fanfold.backends.inputs.item_store import ItemStore, load_input
from fanfold.backends.storage.results import (
    BATCH_ROWS,
    RESULT_COLUMNS,
    ResultLayout,
    iter_batches,
    make_layout,
    write_csv,
    write_jsonl,
    write_parquet,
)
from fanfold.backends.storage.results_schema import (
    INPUT_ROW,
    OPTIONAL_COLUMNS,
    ROW_BYTES,
    UNFIT_COLUMN,
    name_input_columns,
)
from fanfold.configs.models import InputConfig


@pytest.mark.parametrize("name", [*RESULT_COLUMNS, *OPTIONAL_COLUMNS, UNFIT_COLUMN, "output.x"])
def test_a_colliding_column_is_renamed(name: str) -> None:
    assert name_input_columns(["smiles", name]) == {"smiles": "smiles", name: f"input_{name}"}


def test_a_name_that_is_taken_too() -> None:
    columns = ["status", "input_status", "input_input_status", "input_model"]
    assert name_input_columns(columns) == {
        "status": "input_input_input_status",
        "input_status": "input_status",
        "input_input_status": "input_input_status",
        "input_model": "input_model",
    }


def test_the_ids_are_not_repeated() -> None:
    assert name_input_columns(["id", "x"], "id") == {"x": "x"}
    assert name_input_columns(["id", "x"], "x") == {"id": "input_id", "x": "x"}
    assert name_input_columns(["id", "x"]) == {"id": "input_id", "x": "x"}


@given(st.lists(st.sampled_from(["id", "a", "model", "output.a"]), unique=True), st.integers(0, 3))
def test_names_are_unique(columns: list[str], prefixes: int) -> None:
    columns += [f"{'input_' * n}{name}" for n in range(1, prefixes) for name in columns]
    names = name_input_columns(columns)
    assert list(names) == columns
    assert len({*names.values(), *RESULT_COLUMNS}) == len(names) + len(RESULT_COLUMNS)


def test_the_place_of_the_columns() -> None:
    fields: list[tuple[str, pa.DataType]] = [("b", pa.int8()), ("a", pa.string())]
    inputs = pa.schema(fields)
    layout = make_layout(None, inputs, None, ["raw"])
    head = ["id", "status", "b", "a", "output", "error_class"]
    assert layout.to_arrow().names[:6] == head
    assert layout.to_arrow().names[-2:] == ["fingerprint", "raw"]


def loaded(tmp_path: Path, table: Any) -> tuple[ResultLayout, list[dict[str, Json]]]:
    """Load an input, and return records beside its rows as they come from its store."""
    config, items = InputConfig(), table
    if isinstance(table, pa.Table):
        pq.write_table(table, tmp_path / "in.parquet")
        config, items = InputConfig(path=str(tmp_path / "in.parquet")), None
    load_input(config, tmp_path / "items.arrow", [], items)
    with ItemStore(tmp_path / "items.arrow") as store:
        layout = make_layout(None, store.types, store.id_column)
        found = [
            {"id": str(n), "status": "done", INPUT_ROW: row, ROW_BYTES: size}
            for n, (row, size) in enumerate(store.iter_rows(range(len(store))))
        ]
    return layout, found


def test_types_and_values_of_parquet_are_kept(tmp_path: Path) -> None:
    table = pa.table(
        {
            "small": pa.array([1, None], pa.int8()),
            "large": pa.array([2**64 - 1, 0], pa.uint64()),
            "single": pa.array([0.1, None], pa.float32()),
            "truth": [True, None],
            "list": pa.array([[1, None], []], pa.list_(pa.int16())),
            "struct": [{"x": "y", "deep": [{"n": 1}]}, None],
            "moment": pa.array([1_577_934_245_000_000_678, None], pa.timestamp("ns")),
            "local": pa.array([0, 1], pa.timestamp("ms", "Europe/Berlin")),
            "day": [date(2020, 1, 2), None],
            "clock": pa.array([time(1, 2, 3, 4), None]),
            "price": [Decimal("1.50"), None],
            "status": ["new", "old"],
        }
    )
    layout, records = loaded(tmp_path, table)
    write_parquet(records, tmp_path / "r.parquet", layout)
    found = pq.read_table(tmp_path / "r.parquet")
    for name in table.column_names:
        column = found.column("input_status" if name == "status" else name)
        assert column.combine_chunks().equals(table.column(name).combine_chunks()), name
    assert found.column("status").to_pylist() == ["done", "done"]


ROWS: list[Row] = [
    {"id": "a", "n": 1, "mixed": 1, "tags": ["x"], "who": {"name": "A"}, "model": "m"},
    {"id": "b", "n": None, "mixed": "n/a", "tags": [], "who": {"name": "B", "age": 3}},
    {"id": "c", "w": 0.5, "mixed": {"k": [1]}, "tags": None},
]


def test_rows_that_differ(tmp_path: Path) -> None:
    layout, records = loaded(tmp_path, ROWS)
    write_parquet(records, tmp_path / "r.parquet", layout)
    rows = pq.read_table(tmp_path / "r.parquet").to_pylist()
    assert [row["n"] for row in rows] == [1, None, None]
    assert [row["w"] for row in rows] == [None, None, 0.5]
    assert [row["mixed"] for row in rows] == ["1", "n/a", '{"k":[1]}']
    assert [row["tags"] for row in rows] == [["x"], [], None]
    assert rows[0]["who"] == {"name": "A", "age": None}
    assert [row["input_model"] for row in rows] == ["m", None, None]
    assert "input_id" not in rows[0]


def test_json_lines_have_what_the_item_has(tmp_path: Path) -> None:
    layout, records = loaded(tmp_path, ROWS)
    stream = io.BytesIO()
    write_jsonl(records, stream, layout)
    first, second, _ = map(orjson.loads, stream.getvalue().splitlines())
    assert list(first)[:7] == ["id", "status", "n", "mixed", "tags", "who", "input_model"]
    assert (first["who"], first["input_model"], first["model"]) == ({"name": "A"}, "m", None)
    assert second["n"] is None
    assert "w" not in second


def test_csv_has_texts_and_json(tmp_path: Path) -> None:
    layout, records = loaded(tmp_path, [{"s": "=1+1", "l": [1], "n": None, "x": 0.5}])
    stream = io.BytesIO()
    write_csv(records, stream, layout)
    head, row = stream.getvalue().decode().splitlines()
    assert head.startswith("id,status,s,l,n,x,output,")
    assert row.startswith("0,done,=1+1,[1],,0.5,")
    stream = io.BytesIO()
    write_csv(records, stream, layout, safe=True)
    assert ",'=1+1,[1]," in stream.getvalue().decode()


def test_large_rows_make_small_batches(tmp_path: Path) -> None:
    layout, records = loaded(tmp_path, [{"text": "x" * 1_000_000}] * 40)
    sizes = [batch.num_rows for batch in iter_batches(records, layout)]
    assert sum(sizes) == 40
    assert max(sizes) < 20


def test_thousands_of_columns(tmp_path: Path) -> None:
    row = {f"c{n}": n for n in range(5_000)}
    layout, records = loaded(tmp_path, [row] * 3)
    write_parquet(records, tmp_path / "r.parquet", layout)
    found = pq.read_table(tmp_path / "r.parquet")
    assert found.num_columns == 5_000 + len(RESULT_COLUMNS)
    assert found.column("c4999").to_pylist() == [4999] * 3


texts = st.text(st.characters(codec="utf-8"), max_size=3)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=6,
)
tables = st.lists(
    st.dictionaries(texts.map("c{}".format), values, max_size=4), min_size=1, max_size=6
)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tables)
def test_every_input_can_be_written(tmp_path: Path, rows: list[Row]) -> None:
    items = [{**row, "key": n} for n, row in enumerate(rows)]
    layout, records = loaded(tmp_path, items)
    write_parquet(records, tmp_path / "r.parquet", layout)
    found = pq.read_table(tmp_path / "r.parquet").to_pylist()
    for cells, record in zip(found, records, strict=True):
        for column in layout.inputs:
            assert holds(cells[column.name], record[INPUT_ROW].get(column.source))


def holds(cell: Json, value: Json) -> bool:
    """Whether a cell tells all of a value: itself, or as JSON text, absent and null alike."""
    if isinstance(cell, dict) and isinstance(value, dict):
        return value.keys() <= cell.keys() and all(holds(cell[k], value.get(k)) for k in cell)
    if isinstance(cell, list) and isinstance(value, list):
        return len(cell) == len(value) and all(map(holds, cell, value))
    if cell == value and isinstance(cell, bool) == isinstance(value, bool):
        return True
    return isinstance(cell, str) and bool(orjson.loads(cell) == value)


def test_batches_of_usual_rows(tmp_path: Path) -> None:
    layout, records = loaded(tmp_path, [{"n": n} for n in range(BATCH_ROWS + 1)])
    batches = list(iter_batches(records, layout))
    assert [batch.num_rows for batch in batches] == [BATCH_ROWS, 1]
    assert batches[1].column("n").to_pylist() == [BATCH_ROWS]
