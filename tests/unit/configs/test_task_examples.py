"""Examples of a task: their messages, their files, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.templates import ItemPrompt
from fanfold.configs.loader import load_config
from fanfold.graphs.run.fingerprint import compute_fingerprint, diff_settings

SCHEMA = {
    "type": "object",
    "required": ["label"],
    "properties": {"label": {"type": "string", "enum": ["good", "bad"]}},
}
EXAMPLES: list[dict[str, Any]] = [
    {"text": "Great!", "output": {"label": "good"}},
    {"text": "Awful.", "output": {"label": "bad"}},
]


def settings(**task: Any) -> dict[str, Any]:
    given = {"prompt": "Judge {text}", "schema": SCHEMA, "examples": EXAMPLES} | task
    return {"name": "t", "task": given, "endpoints": {"urls": ["http://127.0.0.1:1/v1"]}}


def messages(row: dict[str, Any], role: str = "system", **task: Any) -> list[tuple[str, str]]:
    config = load_config(settings(**task) | {"model": {"system_role": role}}).config
    return [(one["role"], one["content"]) for one in config.parse_prompt().build_messages(row)]


TURNS = [
    ("user", "Judge Great!"),
    ("assistant", '{"label":"good"}'),
    ("user", "Judge Awful."),
    ("assistant", '{"label":"bad"}'),
    ("user", "Judge fine"),
]


def test_examples_stand_between_the_system_text_and_the_prompt() -> None:
    row = {"text": "fine"}
    assert messages(row) == TURNS
    for role in ("system", "developer"):
        assert messages(row, role, system="Be brief.") == [(role, "Be brief."), *TURNS]
    first, *others = TURNS
    joined = ("user", f"Be brief.\n\n{first[1]}")
    assert messages(row, "user", system="Be brief.") == [joined, *others]
    assert messages(row, examples=[]) == messages(row, examples=None) == TURNS[-1:]


@pytest.mark.parametrize(
    ("schema", "output", "shown"),
    [
        (None, "ein Wort", "ein Wort"),
        (None, {"a": 1}, '{"a":1}'),
        ({"type": "string"}, "ein Wort", '"ein Wort"'),
        ({"type": "integer"}, 3, "3"),
    ],
)
def test_an_output_is_shown_as_the_model_should_answer(
    schema: Any, output: Any, shown: str
) -> None:
    found = messages({"text": "x"}, schema=schema, examples=[{"text": "y", "output": output}])
    assert found[1] == ("assistant", shown)


TEXT = st.text(st.characters(exclude_categories=["Cs"]))


@given(
    st.lists(st.fixed_dictionaries({"x": TEXT, "output": TEXT}), max_size=4),
    TEXT,
    st.sampled_from(["system", "developer", "user"]),
    st.lists(TEXT, min_size=2, max_size=2),
)
def test_what_items_share_comes_first(
    examples: list[dict[str, Any]], system: str, role: str, values: list[str]
) -> None:
    task = {"system": system, "prompt": "<{x}>", "examples": examples}
    prompt = ItemPrompt.parse(task, role)
    one, other = (prompt.build_messages({"x": value}) for value in values)
    assert one[: prompt.constants] == other[: prompt.constants]
    assert prompt.constants == len(one) - 1
    assert one[-1]["content"].endswith(f"<{values[0]}>")
    assert [m["role"] for m in one[-2 * len(examples) - 1 :]] == [
        *(["user", "assistant"] * len(examples)),
        "user",
    ]
    assert all(system in one[0]["content"] for _ in range(bool(system)))


def test_messages_of_an_item_may_be_changed() -> None:
    """A graph of the user's gets them."""
    prompt = ItemPrompt.parse(settings()["task"])
    for message in prompt.build_messages({"text": "x"}):
        message["content"] = "changed"
    assert prompt.build_messages({"text": "fine"})[0]["content"] == "Judge Great!"


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ({"examples": [{"output": {"label": "bad"}}]}, ["examples[0]", "no column 'text'"]),
        ({"examples": [*EXAMPLES, {"text": "x"}]}, ["examples[2]", "no 'output'", "answer"]),
        (
            {"examples": [{"text": "x", "output": {"label": "ok"}}]},
            ["examples[0].output.label", "does not fit task.schema", '"ok"'],
        ),
        ({"examples": [{"text": "x", "output": "bad"}]}, ["examples[0].output does not fit"]),
        ({"schema": None, "examples": [{"text": "x", "output": ""}]}, ["output is empty"]),
        (
            {"prompt": "Judge {output.text}", "examples": [{"output": {"label": "bad"}}]},
            ["examples[0]", "'output.text'", "rename that column"],
        ),
        ({"examples": [EXAMPLES[0]] * 1001}, ["task.examples", "1000"]),
        ({"examples": ["good"]}, ["task.examples"]),
        ({"examples": 3}, ["task.examples"]),
    ],
)
def test_examples_that_do_not_fit_are_refused(task: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(settings(**task))
    for part in parts:
        assert part in caught.value.message


def load_file(folder: Path, name: str, content: str | bytes, **task: Any) -> Any:
    data = content.encode() if isinstance(content, str) else content
    (folder / name).write_bytes(data)
    (folder / "c.yaml").write_text(json.dumps(settings(examples=name, **task)))
    return load_config(folder / "c.yaml")


def test_files_stand_for_their_content(tmp_path: Path) -> None:
    lines = "\n".join(json.dumps(one) for one in EXAMPLES)
    loaded = load_file(tmp_path, "e.jsonl", f"\ufeff{lines}\n\n")
    assert loaded.config.task.examples == EXAMPLES
    assert loaded.plain["task"]["examples"] == EXAMPLES
    table = 'text,output,note\nGreat!,"{""label"": ""good""}",\nAwful.,"{""label"":""bad""}",x\n'
    assert load_file(tmp_path, "e.csv", f"\ufeff{table}").config.task.examples == [
        EXAMPLES[0] | {"note": ""},
        EXAMPLES[1] | {"note": "x"},
    ]
    plain = load_file(tmp_path, "e.csv", "text,output\nx,good\n", schema={"type": "string"})
    assert plain.config.task.examples == [{"text": "x", "output": "good"}]


def test_variables_in_a_file_are_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SESAME", "open")
    given = [{"text": "${SESAME} ${UNSET} $${SESAME} $", "output": {"label": "bad"}}]
    loaded = load_file(tmp_path, "e.jsonl", json.dumps(given[0]))
    assert loaded.config.task.examples == given
    assert load_config(loaded.plain).config.task.examples == given
    inline = load_config(settings(examples=[{"text": "${SESAME}", "output": {"label": "bad"}}]))
    assert (inline.config.task.examples or [])[0]["text"] == "open"


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("e.jsonl", '{"text": 1}\n{', ["line 2", "not valid JSON"]),
        ("e.jsonl", "[1]\n", ["line 1", "not a JSON object"]),
        ("e.jsonl", b"\xff\xfe", ["UTF-8"]),
        ("e.csv", "text,output\na\n", ["line 2", "cells"]),
        ("e.csv", "text,output\na,b,c\n", ["line 2", "cells"]),
        ("e.csv", 'text,output\n"a"b,c\n', ["after line 1", "expected"]),
        ("e.json", "[]", [".jsonl or .csv"]),
        ("e.jsonl", b" " * 10_000_001, ["10,000,000 bytes"]),
    ],
)
def test_files_that_cannot_be_read_are_named(
    tmp_path: Path, name: str, content: str | bytes, parts: list[str]
) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_file(tmp_path, name, content)
    for part in ["c.yaml: task.examples", name, *parts]:
        assert part in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(json.dumps(settings(examples="gone.jsonl")))
    with pytest.raises(ConfigurationError, match=r"gone\.jsonl cannot be read: No such file"):
        load_config(tmp_path / "c.yaml")


def test_runs_that_began_without_the_setting_are_the_same_runs() -> None:
    loaded = load_config(settings(examples=None))
    before = {name: value for name, value in loaded.plain.items() if name != "task"}
    before["task"] = {k: v for k, v in loaded.plain["task"].items() if k != "examples"}
    assert diff_settings(before, loaded.plain, "m") == []
    other = load_config(settings())
    (line,) = diff_settings(before, other.plain, "m")
    assert line.startswith("task.examples: null → [")
    prints = {compute_fingerprint(one.config, "m", False) for one in (loaded, other)}
    assert len(prints) == 2
