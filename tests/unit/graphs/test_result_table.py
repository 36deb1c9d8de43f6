"""Tables of results: conversions, lists taken apart, and what a notebook shows."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError, MissingExtraError
from fanfold.backends.core.types import Json, Row
from fanfold.backends.inputs.column_types import ColumnTypes
from fanfold.backends.storage.results import iter_batches, make_layout
from fanfold.graphs.analysis.results import ResultTable

SCHEMA: dict[str, Json] = {
    "type": "object",
    "properties": {
        "score": {"type": "number"},
        "rank": {"type": "integer"},
        "alerts": {
            "type": "array",
            "items": {"type": "object", "properties": {"name": {"type": "string"}}},
        },
        "deep": {
            "type": "object",
            "properties": {"list": {"type": "array", "items": {"type": "integer"}}},
        },
    },
}


def table_of(
    outputs: Sequence[Json], rows: Sequence[Row] = (), schema: dict[str, Json] | None = None
) -> ResultTable:
    """Return a table; an item without an output failed."""
    rows = rows or [{} for _ in outputs]
    types = ColumnTypes({})
    types.add_rows(rows)
    names = dict.fromkeys(name for row in rows for name in row)
    layout = make_layout(SCHEMA if schema is None else schema, types.to_schema(names))
    records = [
        {
            "id": str(n),
            "status": "failed" if output is None else "done",
            "output": output,
            "error_class": "E" if output is None else None,
            "attempts": 1,
            "simulated": True,
            "row": row,
        }
        for n, (output, row) in enumerate(zip(outputs, rows, strict=True))
    ]
    batches = list(iter_batches(records, layout))
    return ResultTable(pa.Table.from_batches(batches, layout.to_arrow()))


ALERTS: list[Json] = [
    {"score": 0.5, "rank": 1, "alerts": [{"name": "a"}, {"name": "b"}], "deep": {"list": [1, 2]}},
    {"score": 0.1, "alerts": []},
    None,
    {"score": 0.2, "rank": 3, "alerts": [{"name": "c"}], "deep": {"list": [3]}},
]
ROWS: list[Row] = [
    {"tags": ["x", "y"], "n": 1, "ok": True, "status": "new"},
    {"tags": [], "n": 2, "ok": None, "status": "old"},
    {"tags": None, "n": None, "ok": False, "status": "old"},
    {"tags": ["z"], "n": 4, "ok": True, "status": "old"},
]


def test_one_row_per_element() -> None:
    found = table_of(ALERTS, ROWS).explode("alerts").to_arrow()
    assert found.column("id").to_pylist() == ["0", "0", "1", "2", "3"]
    assert [output and output["alerts"] for output in found.column("output").to_pylist()] == [
        {"name": "a"},
        {"name": "b"},
        None,
        None,
        {"name": "c"},
    ]
    assert found.column("tags").to_pylist() == [["x", "y"], ["x", "y"], [], None, ["z"]]
    scores = pc.struct_field(found.column("output"), [0]).to_pylist()
    assert scores == [0.5, 0.5, 0.1, None, 0.2]


def test_lists_anywhere() -> None:
    table = table_of(ALERTS, ROWS)
    assert table.explode("input.tags").to_arrow().column("tags").to_pylist() == [
        *("x", "y"),
        None,
        None,
        "z",
    ]
    deep = table.explode("deep.list").to_arrow().column("output").to_pylist()
    assert [output and output["deep"] for output in deep] == [
        {"list": 1},
        {"list": 2},
        None,
        None,
        {"list": 3},
    ]
    both = table.explode("alerts").explode("tags")
    assert len(both) == 7
    assert len(both.explode("deep.list")) == 11


def test_an_answer_that_is_a_list() -> None:
    schema: dict[str, Json] = {"type": "array", "items": {"type": "string"}}
    found = table_of([["a", "b"], []], schema=schema).explode("output").to_arrow()
    assert found.column("output").to_pylist() == ["a", "b", None]


@pytest.mark.parametrize(
    ("field", "words"),
    [
        ("score", "of type double, not a list; lists: tags, output.alerts"),
        ("alert", "did you mean 'alerts'?"),
        ("input.status", "of type string, not a list"),
        ("input.x", "the input has no column 'x' (it has tags, n, ok, status)"),
        ("alerts.name", "task.schema has no field 'alerts.name'"),
    ],
)
def test_fields_that_are_no_list(field: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        table_of(ALERTS, ROWS).explode(field)
    assert words in error.value.message


lists = st.none() | st.lists(st.integers(0, 9), max_size=3)


@settings(deadline=None)
@given(st.lists(st.tuples(lists, st.booleans()), min_size=1, max_size=6))
def test_no_element_and_no_row_is_lost(drawn: list[tuple[Json, bool]]) -> None:
    outputs = [{"deep": {"list": found}} if done else None for found, done in drawn]
    table = table_of(outputs).explode("deep.list").to_arrow()
    expected = [
        (str(n), value)
        for n, (found, done) in enumerate(drawn)
        for value in ((found if done else None) or [None])
    ]
    values = [
        output and output["deep"] and output["deep"]["list"]
        for output in table.column("output").to_pylist()
    ]
    assert list(zip(table.column("id").to_pylist(), values, strict=True)) == expected


def test_pandas_has_a_column_per_field() -> None:
    pandas = pytest.importorskip("pandas", reason="pandas is not installed")
    frame = table_of(ALERTS, ROWS).to_pandas()
    assert list(frame.columns)[:9] == [
        *("id", "status", "tags", "n", "ok", "input_status"),
        *("output.score", "output.rank", "output.alerts"),
    ]
    assert frame["output.score"].tolist()[0] == 0.5
    assert frame["output.deep.list"].tolist()[3].tolist() == [3]
    kinds = {name: str(frame[name].dtype) for name in ("n", "ok", "output.rank", "attempts")}
    assert kinds == {
        "n": "Int64",
        "ok": "boolean",
        "output.rank": "Int64",
        "attempts": "int64",
    }
    assert frame["n"].isna().tolist() == [False, False, True, False]
    exploded = table_of(ALERTS, ROWS).explode("alerts").to_pandas()
    assert exploded["output.alerts.name"].dropna().tolist() == ["a", "b", "c"]
    assert isinstance(table_of([], []).to_pandas(), pandas.DataFrame)


def test_a_name_with_a_dot_beside_a_nested_one() -> None:
    pytest.importorskip("pandas", reason="pandas is not installed")
    schema: dict[str, Json] = {
        "type": "object",
        "properties": {
            "a": {"type": "object", "properties": {"b": {"type": "integer"}}},
            "a.b": {"type": "string"},
        },
    }
    frame = table_of([{"a": {"b": 1}, "a.b": "x"}], schema=schema).to_pandas()
    assert frame["output.a"].tolist() == [{"b": 1}]
    assert frame["output.a.b"].tolist() == ["x"]


def test_polars_has_structs() -> None:
    pytest.importorskip("polars", reason="polars is not installed")
    frame = table_of(ALERTS, ROWS).to_polars()
    assert frame["output"].struct.field("score").to_list() == [0.5, 0.1, None, 0.2]
    assert frame["n"].to_list() == [1, 2, None, 4]


@pytest.mark.parametrize("name", ["pandas", "polars"])
def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    table = table_of(ALERTS, ROWS)
    with pytest.raises(MissingExtraError, match=rf"pip install 'fanfold\[{name}\]'"):
        table.to_pandas() if name == "pandas" else table.to_polars()


class Page(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags = set[str]()
        self.attributes = list[Any]()
        self.cells = list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes += attrs
        if tag in {"td", "th"}:
            self.cells.append("")

    def handle_data(self, data: str) -> None:
        if self.cells:
            self.cells[-1] += data


HOSTILE = "</td><script>alert(1)</script><img src=x onerror='alert(2)'>\x1b[31m&quot;"


def test_a_notebook_shows_texts_as_texts() -> None:
    schema: dict[str, Json] = {"type": "object", "properties": {HOSTILE: {"type": "string"}}}
    rows: list[Row] = [{HOSTILE: HOSTILE}] * 30
    text = table_of([{HOSTILE: HOSTILE}] * 29 + [None], rows, schema)._repr_html_()
    page = Page(text)
    assert page.tags == {"div", "p", "table", "thead", "tbody", "tr", "th", "td"}
    assert not page.attributes
    assert "\x1b" not in text
    assert page.cells[:4] == [
        "id",
        "status",
        HOSTILE.replace("\x1b", "�"),
        f"output.{HOSTILE}".replace("\x1b", "�"),
    ]
    assert "10 more rows" in text


def test_a_notebook_shows_answers_before_long_inputs() -> None:
    rows: list[Row] = [{f"c{n}": "x" * 200 for n in range(40)}] * 4
    page = Page(table_of(ALERTS, rows)._repr_html_())
    heads = page.cells[: page.cells.index("0")]
    assert heads == [
        *("id", "status", "c0", "c1", "c2", "c3"),
        *("output.score", "output.rank", "output.alerts", "output.deep.list"),
        *("error_class", "error"),
    ]
    assert max(map(len, page.cells)) <= 100
    assert page.cells[len(heads) + 2] == "x" * 79 + "…"
