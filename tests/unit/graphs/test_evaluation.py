"""Evaluation: what counts as missing, what is noted, and the content of ``evaluation.json``."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from fanfold.configs.evaluation import resolve_evaluation
from fanfold.graphs.run.evaluation import Evaluator

SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "label": {"type": "string", "enum": ["yes", "no", "maybe"]},
        "score": {"type": "number"},
        "word": {"type": "string"},
    },
}


def evaluate(field: str, rows: list[tuple[Any, Any]], **more: Any) -> dict[str, Any]:
    """Return the comparison of gold values with answers; an answer ``...`` is a failed item."""
    evaluator = Evaluator([resolve_evaluation("gold", field, SCHEMA, None)], **more)
    given = [
        {
            "id": str(n),
            "status": "failed" if answer is ... else "done",
            "output": None if answer is ... else {field: answer},
            "row": {"gold": gold},
        }
        for n, (gold, answer) in enumerate(rows)
    ]
    assert list(evaluator.watch(given)) == given
    (found,) = evaluator.to_json()
    assert orjson.loads(orjson.dumps(found)) == found
    return found


def test_what_is_missing_is_counted_by_its_cause() -> None:
    rows = [("yes", "yes"), ("yes", ...), ("no", None), ("no", "yes"), ("", "yes"), (None, "no")]
    found = evaluate("label", rows)
    assert (found["items"], found["answered"], found["missing"]) == (4, 2, 2)
    assert found["missing_by_cause"] == {"failed": 1, "no_value": 1}
    assert found["unlabelled"] == 2
    metrics = found["metrics"]
    assert (metrics["accuracy"]["value"], metrics["accuracy"]["n"]) == (0.5, 2)
    wrong = metrics["accuracy_missing_wrong"]
    assert (wrong["value"], wrong["n"]) == (0.25, 4)
    assert found["classes"]["no"]["missing"] == 1
    assert found["classes"]["no"]["support"] == 1


@pytest.mark.parametrize(
    ("field", "ties", "cause"),
    [
        ("label", ["label"], "tie"),
        ("label", ["output"], "tie"),
        ("label", ["score"], "no_value"),
        ("label", [], "no_value"),
    ],
)
def test_a_tie_of_the_samples_is_named(field: str, ties: list[str], cause: str) -> None:
    """Samples that do not agree are no answer without a value."""
    evaluator = Evaluator([resolve_evaluation("gold", field, SCHEMA, None)])
    row = {"id": "1", "status": "done", "output": {field: None}, "row": {"gold": "yes"}}
    evaluator.add(row | {"ties": ties})
    (found,) = evaluator.to_json()
    assert found["missing_by_cause"] == {cause: 1}


def test_items_that_have_not_ended_are_missing() -> None:
    evaluator = Evaluator([resolve_evaluation("gold", "label", SCHEMA, None)])
    evaluator.add_open("1", {"gold": "yes"})
    evaluator.add_open("2", {"other": "yes"})
    (found,) = evaluator.to_json()
    assert found["missing_by_cause"] == {"unfinished": 1}
    assert found["unlabelled"] == 1
    assert found["metrics"]["accuracy"]["value"] is None
    assert found["classes"]["yes"]["missing"] == 1
    assert found["confusion"] == {"labels": ["yes"], "counts": [[0]]}


def test_the_confusion_matrix_has_gold_in_rows() -> None:
    rows = [("no", "yes"), ("no", "yes"), ("yes", "yes"), ("maybe", "no")]
    found = evaluate("label", rows)
    assert found["confusion"] == {
        "labels": ["yes", "no", "maybe"],
        "counts": [[1, 0, 0], [2, 0, 0], [0, 1, 0]],
    }
    assert found["classes"]["yes"]["precision"] == pytest.approx(1 / 3)
    assert found["classes"]["yes"]["recall"] == 1
    assert found["classes"]["maybe"]["precision"] is None


def test_unknown_gold_labels_are_wrong_and_noted() -> None:
    found = evaluate("label", [("Yes", "yes"), ("Yes", "yes"), ("both", "no"), ("no", "no")])
    (note,) = found["notes"]
    assert "'Yes' (2 items; did you mean 'yes'? Case counts)" in note
    assert "'both' (1 item)" in note
    assert found["metrics"]["accuracy"]["value"] == 0.25
    assert found["confusion"]["labels"] == ["yes", "no", "Yes", "both"]


def test_numbers_in_texts() -> None:
    found = evaluate("score", [("1.5", 2), (1, 1.0), ("n/a", 3), ("7", ...)])
    assert found["kind"] == "numeric"
    assert (found["items"], found["answered"], found["unlabelled"]) == (3, 2, 1)
    assert found["metrics"]["mae"]["value"] == 0.25
    assert found["classes"] == {}
    assert "1 gold values in 'gold' cannot be read as a number" in found["notes"][0]


def test_too_many_labels_have_no_figures() -> None:
    found = evaluate("word", [(f"g{n}", f"w{n}") for n in range(300)])
    assert found["metrics"] == {}
    assert "more than 500 different labels" in found["notes"][0]
    assert found["answered"] == 300


def test_gold_values_by_id() -> None:
    found = evaluate("label", [("no", "yes"), ("no", "no")], gold={"0": "yes", "9": "no"})
    assert (found["items"], found["unlabelled"]) == (1, 1)
    assert found["metrics"]["accuracy"]["value"] == 1


def test_without_gold_values() -> None:
    found = evaluate("label", [(None, "yes")])
    assert found["notes"] == ["no item has a gold value in 'gold'"]
