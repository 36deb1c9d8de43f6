"""Items keep the types of the input's columns, declared by a file or shown by its values."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, date, datetime, time
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.backends.core.types import Json
from fanfold.backends.inputs.column_types import ColumnTypes
from fanfold.backends.inputs.item_store import ItemStore, load_input
from fanfold.configs.models import InputConfig

Put = Callable[[str, str | bytes], Path]

LIST, STRUCT = pa.list_(pa.int64()), pa.struct([("a", pa.int64()), ("b", pa.string())])


def type_of(*values: Json) -> pa.DataType:
    types = ColumnTypes({})
    for value in values:
        types.add_rows([{"x": value}])
    found: pa.DataType = types.to_schema(["x"]).field("x").type
    return found


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["a", None], pa.string()),
        ([True, None, False], pa.bool_()),
        ([1, None, -1], pa.int64()),
        ([1, 2.5, None], pa.float64()),
        ([2**63, 1], pa.uint64()),
        ([2**63, -1], pa.string()),
        ([2**53 + 1, 0.5], pa.string()),
        ([2**53, 0.5, -(2**53)], pa.float64()),
        ([1, True], pa.string()),
        ([1, "n/a"], pa.string()),
        ([None, None], pa.string()),
        ([[1], [], None], LIST),
        ([[1], ["a"]], pa.list_(pa.string())),
        ([[], None], pa.list_(pa.string())),
        ([[1], 1], pa.string()),
        ([{"a": 1}, {"b": "x"}], STRUCT),
        ([{}, None], pa.string()),
        ([[{"a": 1, "b": None}, {"b": "y"}]], pa.list_(STRUCT)),
        ([{str(n): n} for n in range(1001)], pa.string()),
    ],
    ids=str,
)
def test_values_show_the_type(values: list[Json], expected: pa.DataType) -> None:
    assert type_of(*values) == expected
    assert type_of(*reversed(values)).equals(expected) or expected == STRUCT
    together = ColumnTypes({})
    together.add_rows([{"x": value} for value in values])
    assert together.to_schema(["x"]).field("x").type == expected


def test_deep_values_are_text() -> None:
    deep: Json = 1
    for _ in range(40):
        deep = [deep]
    found, levels = type_of(deep), 0
    while pa.types.is_list(found):
        found, levels = found.value_type, levels + 1
    assert (found, levels) == (pa.string(), 16)


TABLE = pa.table(
    {
        "small": pa.array([1, None], pa.int8()),
        "large": pa.array([2**64 - 1, 0], pa.uint64()),
        "single": pa.array([0.1, None], pa.float32()),
        "half": pa.array([0.5, None], pa.float16()),
        "class": pa.array(["a", None]).dictionary_encode(),
        "nothing": pa.array([None, None], pa.null()),
        "list": pa.array([[1, 2], None], pa.list_(pa.int16())),
        "struct": pa.array([{"x": "y", "n": [1]}, None]),
        "moment": pa.array([1, None], pa.timestamp("ns")),
        "zoned": pa.array([datetime(2020, 7, 2, 3, tzinfo=UTC)] * 2, pa.timestamp("us", "UTC")),
        "local": pa.array([0, 1], pa.timestamp("ms", "Europe/Berlin")),
        "day": pa.array([date(2020, 1, 2), None]),
        "clock": pa.array([time(1, 2, 3, 4), None]),
        "milli": pa.array([time(1, 2, 3), None], pa.time32("ms")),
        "price": pa.array([Decimal("1.50"), None]),
        "map": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64())),
    }
)
CHANGED = {
    "half": pa.float32(),
    "class": pa.string(),
    "nothing": pa.string(),
    "map": pa.list_(pa.list_(pa.string())),
}


def stored_types(tmp_path: Path, config: InputConfig, items: Any = None) -> pa.Schema:
    load_input(config, tmp_path / "items.arrow", [], items)
    with ItemStore(tmp_path / "items.arrow") as store:
        return store.types


def test_parquet_declares_types(tmp_path: Path) -> None:
    pq.write_table(TABLE, tmp_path / "a.parquet")
    types = stored_types(tmp_path, InputConfig(path=str(tmp_path / "a.parquet")))
    assert types.names == TABLE.column_names
    for field in TABLE.schema:
        expected = CHANGED.get(field.name, field.type)
        assert types.field(field.name).type.equals(expected), field.name


def test_dates_that_no_text_holds_are_text(tmp_path: Path) -> None:
    table = pa.table({"day": pa.array([-800_000, 0], pa.int32()).cast(pa.date32())})
    pq.write_table(table, tmp_path / "a.parquet")
    types = stored_types(tmp_path, InputConfig(path=str(tmp_path / "a.parquet")))
    assert types.field("day").type == pa.string()


def test_files_that_disagree_have_the_type_of_their_values(tmp_path: Path) -> None:
    same = pa.array([1], pa.int8())
    pq.write_table(pa.table({"x": same, "y": [1], "z": [date(2020, 1, 2)]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": same, "y": [0.5], "w": [True]}), tmp_path / "b.parquet")
    types = stored_types(tmp_path, InputConfig(path=str(tmp_path / "*.parquet")))
    expected: dict[str, pa.DataType] = {"x": pa.int8(), "y": pa.float64()}
    assert types == pa.schema({**expected, "z": pa.date32(), "w": pa.bool_()})


def test_text_formats_have_texts(tmp_path: Path, put: Put) -> None:
    types = stored_types(tmp_path, InputConfig(path=str(put("a.csv", "a,b\n1,2.5\n007,x\n"))))
    assert types == pa.schema({"a": pa.string(), "b": pa.string()})


def test_items_in_memory(tmp_path: Path) -> None:
    items = [{"id": 1, "t": (1, 2), "day": date(2020, 1, 2), "nan": float("nan")}]
    assert stored_types(tmp_path, InputConfig(), items) == pa.schema(
        {"id": pa.int64(), "t": LIST, "day": pa.string(), "nan": pa.float64()}
    )


@pytest.mark.parametrize(
    ("rows", "column"),
    [
        ([{"id": "a"}, {"id": "b"}], "id"),
        ([{"id": "a"}, {"id": " b"}], None),
        ([{"id": 1}, {"id": 2}], None),
        ([{"x": "a"}, {"x": "b"}], None),
    ],
)
def test_the_column_that_holds_the_ids(
    tmp_path: Path, rows: list[dict[str, Json]], column: str | None
) -> None:
    load_input(InputConfig(), tmp_path / "items.arrow", [], rows)
    with ItemStore(tmp_path / "items.arrow") as store:
        assert store.id_column == column


def test_rows_by_index(tmp_path: Path) -> None:
    load_input(InputConfig(), tmp_path / "items.arrow", [], [{"n": n} for n in range(1000)])
    with ItemStore(tmp_path / "items.arrow") as store:
        wanted = [0, 255, 256, 999, 3]
        assert list(store.iter_rows(wanted)) == [({"n": n}, len(f'{{"n":{n}}}')) for n in wanted]


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=3),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(deadline=None)
@given(st.lists(values, min_size=1, max_size=6), st.randoms())
def test_the_type_does_not_depend_on_the_order(found: list[Json], chance: Any) -> None:
    shuffled = list(found)
    chance.shuffle(shuffled)
    assert sort_fields(type_of(*found)) == sort_fields(type_of(*shuffled))


def sort_fields(kind: pa.DataType) -> Any:
    if pa.types.is_struct(kind):
        return sorted((field.name, str(sort_fields(field.type))) for field in kind)
    return [sort_fields(kind.field(0).type)] if pa.types.is_list(kind) else kind
