"""Parts of documents in pieces: where they are cut, and how their answers become one."""

from __future__ import annotations

from typing import Any

import pytest

from fanfold.backends.core.types import Json, Row
from fanfold.nodes.item.part import PartSplit

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "claims": {"type": "array", "items": {"type": "string"}},
        "kind": {"enum": ["a", "b", "c"]},
        "new": {"type": "boolean"},
        "score": {"type": "number"},
        "note": {"type": "string"},
        "day": {"type": "string", "format": "date"},
    },
}
TEXT = "One sentence of some words. " * 40


def make_part(text: Json, **about: Any) -> Row:
    part = {"document": "d", "number": 2, "of": 3, "start": 500, "end": 500 + len(TEXT)} | about
    return {"title": "T", "text": text, "part": part}


def test_pieces_have_their_places_in_the_document() -> None:
    row = make_part(TEXT)
    first, second = PartSplit("text", 10, None).cut(row)
    for piece in (first, second):
        about = piece["part"]
        assert piece["text"] == TEXT[about["start"] - 500 : about["end"] - 500]
        assert (about["document"], about["number"], about["of"]) == ("d", 2, 3)
        assert piece["title"] == "T"
    assert first["part"]["start"] == 500
    assert first["part"]["end"] > second["part"]["start"] > 500
    assert second["part"]["end"] == 500 + len(TEXT)
    assert row == make_part(TEXT)


@pytest.mark.parametrize(
    "row",
    [
        make_part("too short to be cut"),
        make_part(None),
        make_part([TEXT]),
        make_part(TEXT, start="0"),
        {"text": TEXT},
        {"text": TEXT, "part": "the user's own"},
        {"part": make_part(TEXT)["part"]},
    ],
)
def test_what_is_no_long_part_has_no_pieces(row: Row) -> None:
    assert PartSplit("text", 10, None).cut(row) == []


def answer(*claims: str, kind: str = "a", new: bool = True, score: float = 1) -> dict[str, Json]:
    found = {"claims": [*claims], "kind": kind, "new": new, "score": score}
    return {**found, "note": kind, "day": "2020-01-01" if new else "1999-12-31"}


def test_the_longest_piece_decides_where_votes_are_equal() -> None:
    answers = [answer("x", kind="b", new=False), answer("y", "x", kind="c", score=4)]
    places = [{"start": 0, "end": 90}, {"start": 80, "end": 200}]
    found = PartSplit("text", 0, SCHEMA).join(answers, places)
    assert found == {
        "claims": ["x", "y", "x"],
        "kind": "c",
        "new": True,
        "score": 2.5,
        "note": "b\n\nc",
        "day": "2020-01-01",
    }
    assert PartSplit("text", 0, SCHEMA).join(answers, places[::-1])["kind"] == "b"


def test_free_texts_follow_each_other() -> None:
    places = [{"start": 0, "end": 90}, {"start": 80, "end": 200}]
    assert PartSplit("text", 0, None).join(["one", "two"], places) == "one\n\ntwo"
    assert PartSplit("text", 0, None).join(["same", "same"], places) == "same"


KIND: Json = {"type": "string", "enum": ["a", "b"]}


@pytest.mark.parametrize(
    ("schema", "first", "second", "joined"),
    [
        ({"anyOf": [KIND, {"type": "null"}]}, "a", "b", "b"),
        ({"allOf": [{"$ref": "#/$defs/kind"}]}, "a", "b", "b"),
        ({"enum": [1, 2]}, 1, None, 1),
        ({"type": "array", "minItems": 2, "maxItems": 2}, [1, 2], [3, 4], [3, 4]),
        ({"type": "array", "prefixItems": [KIND, KIND]}, ["a", "b"], ["b", "b"], ["b", "b"]),
        ({"type": "array", "maxItems": 2}, [1, 2], [3], [1, 2, 3]),
        ({"type": "object", "properties": {"x": KIND}}, {"x": "a"}, None, {"x": "a"}),
        ({"type": "object"}, {"x": 1}, {"y": 2}, {"x": 1, "y": 2}),
    ],
)
def test_values_stay_whole_and_known_ones_count(
    schema: dict[str, Any], first: Json, second: Json, joined: Json
) -> None:
    """Text and lists of the second, longer piece are appended, values are not."""
    whole = {"type": "object", "properties": {"field": schema}, "$defs": {"kind": KIND}}
    places = [{"start": 0, "end": 90}, {"start": 80, "end": 200}]
    answers: list[Json] = [{"field": one} for one in (first, second)]
    if second is None:
        answers[1] = {}
    assert PartSplit("text", 0, whole).join(answers, places) == {"field": joined}
