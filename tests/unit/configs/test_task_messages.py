"""Several messages in place of a system text and a prompt."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError, InvalidItemError
from fanfold.backends.core.templates import ItemPrompt
from fanfold.configs.loader import load_config
from fanfold.configs.task_check import find_task_warnings

TALK = [
    {"role": "system", "content": "Be {tone}."},
    {"role": "user", "content": "Here is {text}."},
    {"role": "assistant", "content": "Yes?"},
    {"role": "user", "content": "Judge {text} by {meta.rule}."},
]
ROW: dict[str, Any] = {"tone": "kind", "text": "it", "meta": {"rule": "law"}}


def load(messages: Any = TALK, role: str = "system", **task: Any) -> Any:
    return load_config(
        {
            "name": "t",
            "task": {"messages": messages} | task,
            "endpoints": {"urls": ["http://127.0.0.1:1/v1"]},
            "model": {"system_role": role},
        }
    ).config


def build(role: str = "system", row: dict[str, Any] = ROW, **task: Any) -> list[tuple[str, str]]:
    config = load(role=role, **task)
    return [(one["role"], one["content"]) for one in config.parse_prompt().build_messages(row)]


def test_each_message_is_a_template() -> None:
    rest = [("assistant", "Yes?"), ("user", "Judge it by law.")]
    assert build() == [("system", "Be kind."), ("user", "Here is it."), *rest]
    assert build("developer")[0] == ("developer", "Be kind.")
    assert build("user") == [("user", "Be kind.\n\nHere is it."), *rest]
    assert load().parse_prompt().columns == ("tone", "text", "meta.rule")


@pytest.mark.parametrize(
    ("roles", "sent"),
    [
        ("s s u", ["user: 0\n\n1\n\n2"]),
        ("u s u", ["user: 0", "user: 1\n\n2"]),
        ("s a u", ["user: 0", "assistant: 1", "user: 2"]),
        ("a s a s u", ["assistant: 0", "user: 1", "assistant: 2", "user: 3\n\n4"]),
    ],
)
def test_system_texts_of_a_model_without_that_role(roles: str, sent: list[str]) -> None:
    names = {"s": "system", "u": "user", "a": "assistant"}
    messages = [{"role": names[r], "content": str(n)} for n, r in enumerate(roles.split())]
    found = build("user", messages=messages)
    assert [f"{role}: {text}" for role, text in found] == sent


@given(st.lists(st.sampled_from(["system", "user", "assistant"]), max_size=6), st.text())
def test_no_text_is_lost_and_constants_are_constant(roles: list[str], value: str) -> None:
    talk = [{"role": role, "content": f"{n}{'{x}' * (n % 2)}"} for n, role in enumerate(roles)]
    talk.append({"role": "user", "content": "last {x}"})
    for system_role in ("system", "user"):
        prompt = ItemPrompt.parse({"messages": talk}, system_role)
        sent = prompt.build_messages({"x": value})
        texts = [f"{n}{value * (n % 2)}" for n in range(len(roles))]
        assert "\n\n".join(one["content"] for one in sent) == "\n\n".join([*texts, f"last {value}"])
        other = prompt.build_messages({"x": f"{value}!"})
        assert sent[: prompt.constants] == other[: prompt.constants]
        assert prompt.constants < len(sent)
        assert system_role == "system" or all(one["role"] != "system" for one in sent)


def test_examples_follow_the_system_messages() -> None:
    example = ROW | {"text": "that", "output": "fine"}
    talk = [TALK[0] | {"content": "Be brief."}, *TALK[1:]]
    assert build(messages=talk, examples=[example]) == [
        ("system", "Be brief."),
        ("user", "Here is that."),
        ("assistant", "Yes?"),
        ("user", "Judge that by law."),
        ("assistant", "fine"),
        ("user", "Here is it."),
        ("assistant", "Yes?"),
        ("user", "Judge it by law."),
    ]
    assert load(messages=talk, examples=[example]).parse_prompt().constants == 5


def test_a_message_is_named_where_a_column_is_missing() -> None:
    with pytest.raises(InvalidItemError, match=r"'tone', which task\.messages\[0\]\.content uses"):
        build(row={"text": "x", "meta": {"rule": "y"}})
    with pytest.raises(InvalidItemError, match=r"task\.messages\[3\]\.content uses \{meta\.rule\}"):
        build("user", row={"tone": "x", "text": "x", "meta": {}})


@pytest.mark.parametrize(
    ("task", "parts"),
    [
        ({"prompt": "x {a}"}, ["either prompt or messages", "messages: null"]),
        ({"system": "x"}, ["messages replace system", "first message"]),
        ({"messages": []}, ["task.messages"]),
        ({"messages": None}, ["prompt is missing"]),
        ({"messages": TALK[:3]}, ["last of messages", "user"]),
        ({"messages": [{"role": "tool", "content": "x"}]}, ["task.messages", "role"]),
        ({"messages": [{"role": "user", "content": ""}]}, ["task.messages", "content"]),
        ({"messages": [{"role": "user", "content": "{"}]}, ["task.messages[0].content: line 1"]),
        ({"messages": [{"role": "user"}]}, ["task.messages", "content"]),
        ({"messages": "hello"}, ["task.messages"]),
    ],
)
def test_messages_that_do_not_fit_are_refused(task: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load(**task)
    for part in ["task", *parts]:
        assert part in caught.value.message


def test_messages_without_columns_are_pointed_out() -> None:
    (line,) = find_task_warnings(load([{"role": "user", "content": "Hello {{x}}"}]).task)
    assert line.startswith("task.messages name no column")
    assert "write {NAME}" in line
    assert find_task_warnings(load().task) == []
