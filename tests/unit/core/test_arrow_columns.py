"""Columns of Arrow that are made without pandas: as ``pa.array`` makes them."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.arrow_columns import (
    make_column,
    make_scalar,
    read_numbers,
    write_numbers,
)

_MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
_SCALARS: dict[pa.DataType, st.SearchStrategy[Any]] = {
    pa.string(): st.text(),
    pa.binary(): st.binary(),
    pa.int32(): st.integers(-(2**31), 2**31 - 1),
    pa.int64(): st.integers(-(2**63), 2**63 - 1),
    pa.float64(): st.floats(allow_nan=False) | st.integers(-(2**53), 2**53),
    pa.bool_(): st.booleans(),
    pa.null(): st.none(),
    pa.int8(): st.integers(-128, 127),
    pa.large_string(): st.text(),
}


@given(kind=st.sampled_from(list(_SCALARS)), data=st.data())
def test_a_column_is_that_of_arrow(kind: pa.DataType, data: st.DataObject) -> None:
    cell, text = st.none() | _SCALARS[kind], st.none() | st.text(max_size=3)
    parts = {"a": cell, "b": st.none() | st.lists(text, max_size=3)}
    columns: list[tuple[pa.DataType, Any]] = [
        (kind, cell),
        (pa.list_(pa.field("element", kind)), st.none() | st.lists(cell, max_size=5)),
        (
            pa.struct([("a", kind), ("b", pa.list_(pa.string()))]),
            st.none() | st.fixed_dictionaries({}, optional=parts),
        ),
    ]
    whole, values = data.draw(st.sampled_from(columns))
    cells = data.draw(st.lists(values, max_size=20))
    made, expected = make_column(cells, whole), pa.array(cells, whole)
    made.validate(full=True)
    assert made.type == expected.type
    assert made.equals(expected)
    assert made.null_count == expected.null_count


def test_the_messages_of_a_prompt() -> None:
    cells = [[{"role": "user", "content": "\u00fc"}], None, [], [{"role": "user"}, None]]
    assert make_column(cells, _MESSAGES).equals(pa.array(cells, _MESSAGES))


@pytest.mark.parametrize(
    ("cells", "kind", "error"),
    [
        ([2**63], pa.int64(), OverflowError),
        (["1"], pa.int64(), TypeError),
        ([1.5], pa.int64(), TypeError),
        (["1"], pa.float64(), TypeError),
        ([1], pa.string(), TypeError),
        (["a"], pa.binary(), TypeError),
        ([1], pa.list_(pa.int64()), TypeError),
    ],
)
def test_values_of_another_type_are_refused(
    cells: list[Any], kind: pa.DataType, error: type[Exception]
) -> None:
    with pytest.raises(error):
        make_column(cells, kind)


def test_scalars() -> None:
    assert make_scalar(3, pa.int64()) == pa.scalar(3, pa.int64())
    assert make_scalar(None, pa.string()).as_py() is None


@pytest.mark.parametrize("kind", [pa.int64(), pa.float64()])
def test_numbers_of_numpy(kind: pa.DataType) -> None:
    column = pa.array([1, 2, 3, 4], kind)
    assert read_numbers(column.slice(1, 2)).tolist() == [2, 3]
    assert write_numbers(read_numbers(column)[::2], kind).equals(pa.array([1, 3], kind))
    assert write_numbers(np.array([], np.int64), kind).equals(pa.array([], kind))
