"""``extract``: an item for each element of a list, whatever the lists look like."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.types import Item, Json, Row
from fanfold.configs.operators import ExtractConfig
from fanfold.nodes.operators import OperatorEnd, StageResult, StageTools
from fanfold.nodes.operators.extract import Extract


class Rows:
    def __init__(self, rows: dict[str, Row]) -> None:
        self.items = [Item(n, name, row) for n, (name, row) in enumerate(rows.items())]

    def __len__(self) -> int:
        return len(self.items)

    def read(self, lo: int, hi: int) -> list[Item]:
        return self.items[lo:hi]

    def read_at(self, indices: Sequence[int]) -> list[Item]:
        return [self.items[index] for index in indices]

    def read_ids(self, lo: int, hi: int) -> list[str]:
        return [one.id for one in self.items[lo:hi]]

    def find_longest_row(self) -> int:
        return max(len(orjson.dumps(one.row)) for one in self.items)


no_questions: Any = None  # the model is not asked


async def extract(rows: dict[str, Row], path: str, **settings: Any) -> OperatorEnd:
    tools = StageTools(Rows(rows), ("read",), no_questions, no_questions, None, 256)
    return await Extract(path=path, **settings).run(tools)


def listed(end: OperatorEnd) -> dict[str, Json]:
    return {one.id: one.output for one in end.results}


def answer(*claims: Json) -> Row:
    return {"title": "t", "read": {"score": 1, "findings": list(claims)}}


async def test_elements_follow_each_other_and_keep_columns_without_the_list() -> None:
    rows = {"a": answer({"claim": "x"}, {"claim": "y"}), "b": answer("z")}
    end = await extract(rows, "read.findings[]")
    beside = {"title": "t", "read": {"score": 1}}
    assert list(end.results) == [
        StageResult("a#1", {"claim": "x"}, beside),
        StageResult("a#2", {"claim": "y"}, beside),
        StageResult("b#1", "z", beside),
    ]
    assert list(end.results) == list(end.results)  # they are iterated twice
    assert end.report["elements"] == 3
    assert end.report["most_of_an_item"] == 2


async def test_ids_of_other_items_are_left_free() -> None:
    rows = {"a": answer("x", "y", "z"), "a#2": answer("w")}
    found = listed(await extract(rows, "read.findings[]"))
    assert found == {"a#1": "x", "a#3": "y", "a#4": "z", "a#2#1": "w"}


@pytest.mark.parametrize(
    ("row", "counted"),
    [
        ({"title": "t"}, "items_without"),
        ({"read": None}, "items_without"),
        ({"read": {}}, "items_without"),
        ({"read": {"findings": None}}, "items_without"),
        ({"read": {"findings": []}}, "items_without"),
        ({"read": {"findings": {"0": "x"}}}, "items_no_list"),
        ({"read": {"findings": "x"}}, "items_no_list"),
        ({"read": [["x"]]}, "items_no_list"),
        ({"read": 7}, "items_no_list"),
    ],
)
async def test_items_without_a_list_are_counted(row: Row, counted: str) -> None:
    end = await extract({"a": row, "b": answer("x")}, "read.findings[]")
    assert listed(end) == {"b#1": "x"}
    assert end.report[counted] == 1
    others = {"items_without", "items_no_list"} - {counted}
    assert [end.report[name] for name in others] == [0]


async def test_null_elements_and_those_above_the_limit_are_counted() -> None:
    end = await extract({"a": answer(None, 1, None, 2, 3)}, "read.findings[]", limit=2)
    assert listed(end) == {"a#1": 1, "a#2": 2}
    assert (end.report["empty_elements"], end.report["elements_above_limit"]) == (2, 1)
    assert "2 elements left out as null" in end.report["lines"]


async def test_a_path_leads_through_lists_of_lists_to_a_field() -> None:
    papers = [{"cites": [{"doi": "1"}, {"doi": "2"}, {"title": "no doi"}]}, {"cites": None}, "odd"]
    row = {"papers": papers, "year": 2024}
    end = await extract({"a": row}, "papers[].cites[].doi")
    assert listed(end) == {"a#1": "1", "a#2": "2"}
    assert end.report["empty_elements"] == 1
    assert next(iter(end.results)).row == {"year": 2024}


async def test_a_huge_list_is_no_copy_for_each_of_its_elements() -> None:
    row = {"read": {"findings": [{"n": n} for n in range(50_000)], "score": 1}}
    end = await extract({"a": row}, "read.findings[]", limit=100_000)
    assert all(one.row == {"read": {"score": 1}} for one in end.results)
    assert end.report["elements"] == 50_000


FINDING = {"type": "object", "properties": {"claim": {"type": "string"}}}
ROWS = {
    "type": "object",
    "properties": {
        "title": {"type": "string"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "read": {
            "type": "object",
            "$defs": {"finding": FINDING},
            "properties": {
                "score": {"type": "number"},
                "findings": {"type": "array", "items": {"$ref": "#/$defs/finding"}},
            },
        },
    },
}


def test_the_schema_of_elements_is_found_behind_references() -> None:
    found = Extract(path="read.findings[]").describe_results(ROWS)
    assert found["properties"] == FINDING["properties"]
    assert Extract(path="read.findings[].claim").describe_results(ROWS)["type"] == "string"
    assert "tags" not in Extract(path="tags[]").describe_columns(ROWS)["properties"]
    assert "read" in Extract(path="read.findings[]").describe_columns(ROWS)["properties"]


@pytest.mark.parametrize("path", ["read.score[]", "read.claims[]", "title[]", "nothing[]"])
def test_a_path_to_no_list_is_refused(path: str) -> None:
    with pytest.raises(ConfigurationError):
        Extract(path=path).describe_results(ROWS)


@pytest.mark.parametrize("path", ["read.findings", "[]", "a[0]", ""])
def test_a_path_needs_elements(path: str) -> None:
    with pytest.raises(ValueError, match="path"):
        ExtractConfig(op="extract", path=path)
