"""Folds of samples: votes, ties, means, by field and as a whole."""

from __future__ import annotations

from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.samples import SampleFold, list_free_texts
from fanfold.backends.core.types import FieldVote, Item, find_row_id, make_sample_id

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "label": {"enum": ["a", "b"]},
        "count": {"type": "integer"},
        "score": {"type": ["number", "null"]},
        "deep": {"$ref": "#/$defs/deep"},
        "note": {"type": "string"},
    },
    "$defs": {
        "deep": {
            "type": "object",
            "properties": {"ok": {"type": "boolean"}, "x": {"type": "number"}},
        }
    },
}


def fold_of(samples: int = 3, **task: Any) -> SampleFold:
    fold = SampleFold.from_task({"samples": samples} | task)
    assert fold is not None
    return fold


def answer(label: str, count: int, score: float | None, ok: bool, note: str) -> dict[str, Any]:
    deep = {"ok": ok, "x": float(count)}
    return {"label": label, "count": count, "score": score, "deep": deep, "note": note}


def test_numbers_are_averaged_and_all_else_votes() -> None:
    folded = fold_of(schema=SCHEMA).fold(
        [
            answer("a", 1, 0.25, True, "x"),
            answer("b", 2, None, True, "y"),
            answer("a", 2, 0.75, False, " x "),
        ]
    )
    assert folded.output == {
        "label": "a",
        "count": 2,
        "score": 0.5,
        "deep": {"ok": True, "x": pytest.approx(5 / 3)},
        "note": "x",
    }
    two = pytest.approx(2 / 3)
    assert folded.agreement == {"label": two, "count": two, "deep": {"ok": two}, "note": two}
    assert folded.spread == {
        "score": pytest.approx(0.25 * 2**0.5),
        "deep": {"x": pytest.approx(3**-0.5)},
    }
    assert (folded.samples, folded.answers) == (3, 3)
    assert FieldVote("deep.ok", 2, 3, is_tie=False) in folded.votes


def test_ties_are_null_and_told() -> None:
    folded = fold_of(4, schema={"type": "string"}).fold(["a", "b", "b", "a"])
    assert (folded.output, folded.agreement) == (None, 0.5)
    assert folded.votes == (FieldVote("output", 2, 4, is_tie=True),)
    assert fold_of(schema={"enum": [1, None]}).fold([None, None, 1]).output is None
    (vote,) = fold_of(schema={"enum": [1, None]}).fold([None, None, 1]).votes
    assert not vote.is_tie  # null has the majority


@pytest.mark.parametrize(
    ("values", "chosen"),
    [([1, 1.0, 2], 1), ([True, 1, True], True), ([[1, 2], [1.0, 2], []], [1, 2]), (["x"], "x")],
)
def test_equal_values(values: list[Any], chosen: Any) -> None:
    """1.0 is 1, but true is not."""
    folded = fold_of(fold="vote", schema={}).fold(values)
    assert folded.output == chosen
    assert type(folded.output) is type(chosen)


def test_rules_of_the_setting() -> None:
    values = [answer("a", n, n / 4, True, "x") for n in (1, 1, 4)]
    by_field = fold_of(schema=SCHEMA, fold={"count": "mean", "deep": "vote"}).fold(values)
    assert (by_field.output["count"], by_field.output["deep"]) == (2.0, {"ok": True, "x": 1.0})
    assert fold_of(schema=SCHEMA, fold="vote").fold(values).output["score"] == 0.25
    means = fold_of(schema=SCHEMA, fold="mean").fold(values).output
    assert (means["count"], means["label"]) == (2.0, "a")
    assert fold_of(fold="mean", schema={"type": "integer"}).fold([1, 2, 2]).output == 5 / 3


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ({"fold": "mean"}, "mean needs task.schema"),
        ({"fold": "mean", "schema": {"type": "string"}}, "a number in task.schema"),
        ({"fold": {"label": "mean"}, "schema": SCHEMA}, "task.fold.label: mean needs a number"),
        ({"fold": {"scores": "mean"}, "schema": SCHEMA}, "did you mean 'score'"),
        ({"fold": {"deep.y": "vote"}, "schema": SCHEMA}, "'deep.y', which is not a field"),
    ],
)
def test_refused(task: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigurationError, match=said):
        SampleFold.from_task(task)


def test_no_answer_and_other_shapes() -> None:
    """Answers that no schema bounds: of several shapes, with further fields, endless references."""
    fold = fold_of(schema=SCHEMA)
    assert fold.fold([]).output is None
    assert fold.fold(["x", {"label": "a"}]).output is None  # a tie of shapes
    folded = fold.fold([{"label": "a", "more": [1]}, {"more": [1]}])
    assert folded.output == {"label": None, "more": [1]}
    endless = {"properties": {"x": {"type": "number"}, "next": {"$ref": "#"}}}
    assert fold_of(schema=endless).fold([{"x": 1, "next": {"x": 2}}] * 2).output == {
        "x": 1.0,
        "next": {"x": 2},
    }
    assert fold_of().fold(["a", "a ", "b"]).output == "a"
    huge = fold_of(schema={"type": "number"}).fold([1e308, 1e308, -1e308])
    assert huge.output == pytest.approx(1e308 / 3)


def test_the_schema_of_results() -> None:
    """A mean of integers is a number; references stay valid."""
    folded = fold_of(schema=SCHEMA, fold={"count": "mean"}).fold_schema(SCHEMA)
    assert folded is not None
    assert folded["properties"]["count"] == {"type": ["number", "null"]}
    assert folded["properties"]["label"] == SCHEMA["properties"]["label"]
    assert folded["$defs"] == SCHEMA["$defs"]
    assert fold_of(schema=SCHEMA).fold_schema(None) is None
    assert SampleFold.from_task({"samples": 1, "schema": SCHEMA}) is None


def test_free_texts_are_named() -> None:
    assert list_free_texts(None, SCHEMA) == ["note"]
    assert list_free_texts(None, {"type": "string"}) == ["output"]
    assert list_free_texts(None, {"type": "string", "maxLength": 9}) == []
    nullable = {"anyOf": [{"type": "string", "enum": ["a"]}, {"type": "null"}]}
    assert list_free_texts(None, nullable) == []


def test_ids_of_samples() -> None:
    assert [make_sample_id("x", n) for n in range(3)] == ["x", "x~2", "x~3"]
    assert find_row_id("x~2~3", 2) == "x~2"
    assert Item(4, "x~2", {}, None, 1).row_id == "x"
