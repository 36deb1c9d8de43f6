"""Names of fields: in the answer, in the input, or wherever only one of them has it."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.fields import FieldPath, resolve_field

ANSWER: dict[str, Any] = {
    "properties": {
        "score": {"type": "number"},
        "both": {"type": "number"},
        "input": {"properties": {"x": {"type": "string"}}},
        "output": {"type": "boolean"},
        "deep": {"properties": {"er": {"type": "integer"}}},
        "list": {"items": {"properties": {"n": {"items": {"type": "integer"}}}}},
    }
}
INPUT: dict[str, Any] = {
    "properties": {
        "smiles": {"type": "string"},
        "both": {"type": "string"},
        "mol.weight": {"type": "number"},
        "meta": {"properties": {"year": {"type": "integer"}}},
        "tags": {"type": "array", "items": {"type": "string"}},
        "odd[]": {"type": "string"},
    }
}
OUTPUT = {
    "score": 1,
    "both": 2,
    "input": {"x": "a"},
    "output": True,
    "deep": {"er": 3},
    "list": [{"n": [1, 2]}, {}, {"n": [3]}],
}
ROW = {
    "smiles": "C",
    "both": "in",
    "mol.weight": 16.0,
    "meta": {"year": 2020},
    "tags": ["a", "b"],
    "odd[]": "c",
}


@pytest.mark.parametrize(
    ("name", "short", "value"),
    [
        ("score", "score", 1),
        ("output.score", "score", 1),
        ("output.both", "both", 2),
        ("input.both", "input.both", "in"),
        ("smiles", "input.smiles", "C"),
        ("deep.er", "deep.er", 3),
        ("meta.year", "input.meta.year", 2020),
        ("input.meta.year", "input.meta.year", 2020),
        ("mol.weight", "input.mol.weight", 16.0),
        ("output.input.x", "output.input.x", "a"),
        ("output.output", "output.output", True),
        ("output", "output", OUTPUT),
        ("list[].n[]", "list[].n[]", [1, 2, 3]),
        ("output.list[].n", "list[].n", [[1, 2], None, [3]]),
        ("tags[]", "input.tags[]", ["a", "b"]),
        ("odd[]", "input.odd[]", ["c"]),
    ],
)
def test_names(name: str, short: str, value: Any) -> None:
    path, _ = resolve_field(name, ANSWER, INPUT, elements=True)
    assert str(path) == short
    assert FieldPath.parse(short).pick(OUTPUT, ROW) == path.pick(OUTPUT, ROW) == value
    if name != "both":  # before the input is known
        assert str(resolve_field(name, ANSWER, elements=True)[0]) == short


def test_elements_where_one_value_is_needed() -> None:
    with pytest.raises(ConfigurationError, match=r"'tags\[\]' has a value for each element"):
        resolve_field("tags[]", ANSWER, INPUT)


def test_split_by_the_elements_with_a_value() -> None:
    parts = FieldPath.parse("list[].n[]").split(OUTPUT, ROW, str)
    assert parts["3"] == ({**OUTPUT, "list": [{"n": [3]}]}, ROW)
    assert list(parts) == ["1", "2", "3"]
    parts = FieldPath.parse("input.tags[]").split(OUTPUT, ROW, str)
    assert parts["b"] == (OUTPUT, {**ROW, "tags": ["b"]})
    listed = {"x": [{"k": 1, "v": "a"}, {"k": 2}, {"k": 1, "v": "b"}, {"v": "c"}, 7]}
    parts = FieldPath.parse("x[].k").split(listed, {}, str)
    assert {
        name: [e["v"] for e in out["x"] if isinstance(e, dict) and "v" in e]
        for name, (out, _) in parts.items()
    } == {"1": ["a", "b"], "2": [], "None": ["c"]}
    assert FieldPath.parse("x[].k").split({"x": None}, {}, str) == {}
    assert FieldPath.parse("input.no[]").split(None, {}, str) == {}


def test_the_schema_of_a_field() -> None:
    assert resolve_field("deep.er", ANSWER)[1] == {"type": "integer"}
    assert resolve_field("meta.year", ANSWER, INPUT)[1] == {"type": "integer"}
    assert resolve_field("meta.year", ANSWER)[1] == {}
    assert resolve_field("output", None)[1] == {"type": "string"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("both", "both a field of the answer and a column of the input"),
        ("scoer", "did you mean 'score'?"),
        ("smile", "did you mean 'smiles'?"),
        ("deep.err", "task.schema has no field 'deep.err' (it has er); did you mean 'er'?"),
        ("meta.yaer", "the input has no column 'meta.yaer' (it has year); did you mean 'year'?"),
        ("output.smiles", "task.schema has no field 'smiles'"),
        ("input.score", "the input has no column 'score' (it has smiles, both,"),
        ("input", "'input' names no column; write input.NAME (it has smiles, both,"),
        ("", "neither task.schema nor the input has a field ''"),
    ],
)
def test_names_of_nothing(name: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as error:
        resolve_field(name, ANSWER, INPUT)
    assert words in error.value.message


def test_a_free_text_has_no_fields() -> None:
    assert str(resolve_field("smiles", None, INPUT)[0]) == "input.smiles"
    with pytest.raises(ConfigurationError, match=r"'x' needs task\.schema.*\(it has smiles"):
        resolve_field("x", None, INPUT)
    with pytest.raises(ConfigurationError, match=r"'x' needs task\.schema"):
        resolve_field("output.x", None, INPUT)


def test_missing_values_are_null() -> None:
    for name in ("x", "score.x", "deep.x.y", "input.x", "input.smiles.x", "input"):
        assert FieldPath.parse(name).pick(OUTPUT, ROW) is None
    assert FieldPath.parse("score").pick(None, {}) is None


keys = st.lists(st.sampled_from(["output", "input", "a", "", "[]"]), max_size=4)


@given(st.sampled_from(["output", "input"]), keys)
def test_a_name_means_one_field(source: Any, path: list[str]) -> None:
    field = FieldPath(source, tuple(path))
    assert FieldPath.parse(str(field)) == field
