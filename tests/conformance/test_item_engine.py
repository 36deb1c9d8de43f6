"""The steps of an item end the same way, walked directly or run by LangGraph's engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import (
    EndpointBusyError,
    EndpointLostError,
    ModelNotServedError,
    RunStoppedError,
)
from fanfold.backends.core.templates import ItemPrompt
from fanfold.backends.core.types import Message, Reply, Usage
from fanfold.nodes.context import ItemContext
from fanfold.nodes.item.answer import AnswerCheck
from fanfold.nodes.item.item_graph import build_item_graph
from fanfold.nodes.item.item_state import ItemState
from fanfold.nodes.item.steps import (
    DELEGATED_STEPS,
    ITEM_STEPS,
    ItemStep,
    walk_steps,
)

SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
Event = tuple[str, str | None, str | None] | Exception

ERRORS: list[Event] = [
    EndpointBusyError("busy", "node-1", 503),
    EndpointLostError("lost", "node-2"),
    ModelNotServedError("no such model", "node-3", 404),
    RunStoppedError("no endpoint is left"),
    ValueError("a bug"),
]
EVENTS = st.one_of(
    st.tuples(
        st.sampled_from(['{"n": 1}', '{"n": "x"}', '```json\n{"n": 2}\n```', "no json", "", " "]),
        st.sampled_from(["stop", "length", "content_filter", "abort", "tool_calls", None]),
        st.sampled_from([None, None, None, "I would rather not"]),
    ),
    st.sampled_from(ERRORS),
)


class Script:
    """A model that answers, or fails, by a list."""

    def __init__(self, events: Sequence[Event]) -> None:
        self.events = list(events)
        self.asked: list[list[Message]] = []

    async def ask(self, messages: Sequence[Message]) -> Reply:
        self.asked.append([dict(m) for m in messages])
        event = self.events[len(self.asked) - 1]
        if isinstance(event, Exception):
            raise event
        content, reason, refusal = event
        return Reply(content, reason, refusal, Usage(1, 1), "node-0", "m", simulated=True)


def context(model: Script, repairs: int, schema: Mapping[str, Any] | None) -> ItemContext:
    check = AnswerCheck(schema, max_tokens=16)
    return ItemContext(
        ItemPrompt.parse({"system": "be brief", "prompt": "x is {x}"}), model, check, repairs
    )


async def both_ways(
    steps: Mapping[str, ItemStep], state: ItemState, make: Any
) -> tuple[tuple[Any, Any], tuple[Any, Any]]:
    """Return how the two ways end, each with what the model was asked."""
    ends = []
    for engine in (False, True):
        parts, asked = make()
        start = ItemState(**state)
        try:
            if engine:
                graph = build_item_graph(steps).compile(checkpointer=False)
                end: Any = await graph.ainvoke(start, context=parts)
            else:
                end = await walk_steps(steps, start, parts)
        except Exception as error:  # noqa: BLE001 - what is raised must be the same, too
            end = repr(error)
        ends.append((end, asked))
    return ends[0], ends[1]


@given(
    events=st.lists(EVENTS, min_size=4, max_size=4),
    repairs=st.integers(0, 3),
    problem=st.sampled_from([None, None, None, "not a molecule"]),
    row=st.sampled_from([{"x": 1}, {"x": "a"}, {"y": 2}]),
    schema=st.sampled_from([SCHEMA, None]),
)
async def test_both_ways_end_the_same(
    events: list[Event],
    repairs: int,
    problem: str | None,
    row: dict[str, Any],
    schema: dict[str, Any] | None,
) -> None:
    state = ItemState(id="i", row=row, problem=problem)

    def make() -> tuple[ItemContext, list[Any]]:
        model = Script(events)
        return context(model, repairs, schema), model.asked

    walked, run = await both_ways(ITEM_STEPS, state, make)
    assert walked == run


@pytest.mark.parametrize(
    "result",
    [{"output": {"n": 3}}, {"output": '{"n": 4}'}, {"messages": ["text"]}, "plain", {"other": 1}],
    ids=str,
)
async def test_both_ways_delegate_the_same(result: Any) -> None:
    state = ItemState(id="i", row={"x": 1}, problem=None)

    async def users_graph(given: dict[str, Any]) -> Any:
        assert given["x"] == 1
        assert [m["role"] for m in given["messages"]] == ["system", "user"]
        return result

    def make() -> tuple[ItemContext, list[Any]]:
        parts = context(Script([]), 0, SCHEMA)
        fields = {**{f: getattr(parts, f) for f in parts.__dataclass_fields__}}
        return ItemContext(**fields | {"delegate": users_graph}), []

    walked, run = await both_ways(DELEGATED_STEPS, state, make)
    assert walked == run


async def test_a_repair_sends_the_answer_and_the_error_back() -> None:
    model = Script([('{"n": "x"}', "stop", None), ('{"n": 7}', "stop", None)])
    state = ItemState(id="i", row={"x": 1}, problem=None)
    end = await walk_steps(ITEM_STEPS, state, context(model, 1, SCHEMA))
    assert end["output"] == {"n": 7}
    assert end["repairs"] == 1
    sent = model.asked[1]
    assert [m["role"] for m in sent] == ["system", "user", "assistant", "user"]
    assert sent[2]["content"] == '{"n": "x"}'
    assert "breaks the schema: n:" in sent[3]["content"]


async def test_without_repairs_an_invalid_answer_is_the_end() -> None:
    model = Script([("no json", "stop", None)])
    state = ItemState(id="i", row={"x": 1}, problem=None)
    end = await walk_steps(ITEM_STEPS, state, context(model, 0, SCHEMA))
    assert end["error"]["class"] == "InvalidAnswerError"
    assert len(model.asked) == 1


async def test_an_invalid_item_is_never_asked() -> None:
    model = Script([])
    state = ItemState(id="i", row={"x": 1}, problem="SMILES cannot be parsed")
    end = await walk_steps(ITEM_STEPS, state, context(model, 1, SCHEMA))
    assert end["error"] == {"class": "InvalidItemError", "text": "SMILES cannot be parsed"}
    assert model.asked == []
