"""``merge``: the answers about the parts of documents, with the places of the parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import ConfigurationError, InputError
from fanfold.backends.core.types import Item, Json
from fanfold.nodes.operators import FailedItem, OperatorEnd, StageTools
from fanfold.nodes.operators.merge import Merge

ANSWER = {
    "type": "object",
    "$defs": {"kind": {"enum": ["a", "b"]}},
    "properties": {
        "claims": {"type": "array", "items": {"type": "string"}},
        "kind": {"$ref": "#/$defs/kind"},
        "note": {"type": "string", "maxLength": 9},
        "score": {"type": "number"},
        "deep": {"type": "object", "properties": {"list": {"type": "array"}}},
    },
}
ROWS = {"type": "object", "properties": {"text": {"type": "string"}, "part": {}, "read": ANSWER}}


def make_item(index: int, document: str, number: int, of: int, answer: Json) -> Item:
    part = {"document": document, "number": number, "of": of, "start": number * 10, "end": 20}
    row = {"title": document, "text": "…", "part": part, "read": answer}
    return Item(index, f"{document}/p{number}", row)


class Rows:
    def __init__(self, items: Sequence[Item]) -> None:
        self.items = list(items)

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


async def merge(
    items: Sequence[Item],
    schema: Mapping[str, Any] = ROWS,
    failed: Sequence[FailedItem] = (),
    **settings: Any,
) -> OperatorEnd:
    unused: Any = None
    tools = StageTools(
        Rows(items), (), unused, unused, None, 256, row_schema=schema, read_failed=lambda: failed
    )
    return await Merge(field="read", text="text", **settings).run(tools)


def answer(*claims: str, kind: str = "a", note: str = "n", score: float = 1) -> Json:
    return {"claims": [*claims], "kind": kind, "note": note, "score": score, "deep": {"list": [1]}}


PARTS = (
    make_item(0, "d", 1, 4, answer("x", "y")),
    make_item(1, "d", 2, 4, answer("y", kind="b", score=4)),
    make_item(2, "d", 4, 4, answer("z", kind="b", note="m")),
    make_item(3, "e", 1, 1, answer("w", score=0.5)),
)


async def test_lists_and_texts_follow_each_other() -> None:
    end = await merge(PARTS)
    first, second = end.results
    assert first.id == "d"
    assert first.output == {
        "claims": ["x", "y", "y", "z"],
        "kind": "b",
        "note": "n\n\nm",
        "score": 2,
        "deep": {"list": [1, 1, 1]},
    }
    assert second.output == answer("w", score=0.5)
    assert first.row["title"] == "d"
    assert set(first.row) == {"title", "parts"}
    assert first.row["parts"]["missing"] == [3]
    assert first.row["parts"]["sources"][2] == {"id": "d/p4", "start": 40, "end": 20}
    assert (end.report["documents"], end.report["parts"], end.report["missing"]) == (2, 4, 1)
    assert list(end.results) == [first, second]


async def test_votes_are_those_of_samples() -> None:
    first, _ = (await merge(PARTS, how="vote")).results
    assert (first.output["kind"], first.output["note"], first.output["score"]) == ("b", "n", 2)
    assert first.output["claims"] is None  # no two lists are equal


async def test_free_texts_are_joined() -> None:
    schema = {"type": "object", "properties": {"part": {}, "read": {"type": "string"}}}
    items = [make_item(n, "d", n + 1, 2, text) for n, text in enumerate(["one", "two"])]
    (found,) = (await merge(items, schema)).results
    assert found.output == "one\n\ntwo"


def test_the_schema_is_that_of_folded_answers() -> None:
    found = Merge(field="read").describe_results(ROWS)
    assert found["properties"]["claims"]["type"] == "array"
    columns = Merge(field="read", text="text").describe_columns(ROWS)["properties"]
    assert list(columns) == ["parts"]


def test_items_that_are_no_parts_are_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"input\.split"):
        Merge(field="read").describe_results({"type": "object", "properties": {"read": ANSWER}})


@pytest.mark.parametrize("part", [None, {}, {"document": 1}, "d/p1"])
async def test_a_damaged_part_is_refused(part: Json) -> None:
    item = PARTS[0]
    with pytest.raises(InputError, match="'d/p1'"):
        await merge([Item(0, item.id, {**item.row, "part": part})])


async def test_a_document_without_a_part_that_is_left_has_failed() -> None:
    def fail(number: int, document: str, of: int, error_class: str) -> FailedItem:
        item = make_item(9, document, number, of, None)
        del item.row["read"]
        return FailedItem(item, error_class, f"error {number}")

    failed = [
        fail(3, "d", 4, "EndpointLostError"),  # other parts of d are there
        fail(1, "f", 3, "EndpointLostError"),
        fail(2, "f", 3, "TruncatedAnswerError"),
        fail(3, "f", 3, "TruncatedAnswerError"),
        fail(1, "g", 2, "EndpointLostError"),
        fail(1, "h", 1, "InvalidItemError"),
        FailedItem(Item(9, "own", {"part": "a column of the user"}), "InvalidItemError", ""),
    ]
    end = await merge(PARTS, failed=failed)
    found = {one.id: one for one in end.results}
    assert list(found) == ["d", "e", "f", "g", "h"]
    assert [one.error_class for one in found.values()][:2] == [None, None]
    assert found["f"].output is None
    assert found["f"].error_class == "TruncatedAnswerError"
    assert found["f"].error == "all 3 parts failed; f/p2: error 2"
    parts = {"of": 3, "missing": [1, 2, 3], "sources": []}
    assert found["f"].row == {"title": "f", "parts": parts}
    assert found["g"].error == "1 of 2 parts failed, and no other is left; g/p1: error 1"
    assert found["h"].error == "its only part failed; h/p1: error 1"
    assert (end.report["documents"], end.report["lost_documents"]) == (2, 3)
    line = "3 documents have no part left, because parts failed: f, g, h"
    assert line in end.report["lines"]
