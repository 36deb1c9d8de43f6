"""A simulated model that calls tools: tools on offer, calls, and forbidden calls."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from fanfold.backends.simulated.requests import Question, QuestionReader
from fanfold.backends.simulated.responders import ToolCall, answer_question, make_responder
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.simulated.values import ApiError

SPEC = SimulationSpec(responder="agent")


def tool(name: str, **properties: str) -> dict[str, Any]:
    parameters = {
        "type": "object",
        "required": list(properties),
        "properties": {key: {"type": kind} for key, kind in properties.items()},
    }
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


TOOLS = [tool("weigh", smiles="string"), tool("count", smiles="string", deep="boolean")]


def read(*messages: dict[str, Any], **body: Any) -> Question:
    asked = [{"role": "user", "content": "SMILES: CCO"}, *messages]
    data = {"model": SPEC.model, "messages": asked, **body}
    return QuestionReader(SPEC.model, 0).read(orjson.dumps(data), chat=True, max_model_len=8000)


def called(name: str) -> dict[str, Any]:
    call = {"id": "1", "type": "function", "function": {"name": name, "arguments": "{}"}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        (None, ["weigh", "count"]),
        ("auto", ["weigh", "count"]),
        ("required", ["weigh", "count"]),
        ("none", []),
        ({"type": "function", "function": {"name": "count"}}, ["count"]),
    ],
)
def test_what_is_on_offer(choice: Any, names: list[str]) -> None:
    question = read(tools=TOOLS, tool_choice=choice)
    assert [offered["name"] for offered in question.tools] == names


def test_it_calls_each_tool_once_and_then_answers() -> None:
    responder = make_responder(SPEC)
    first = responder(read(tools=TOOLS))
    assert first == ToolCall("weigh", {"smiles": "CCO"})
    second = responder(read(called("weigh"), tools=TOOLS))
    assert isinstance(second, ToolCall)
    assert (second.name, second.arguments["smiles"]) == ("count", "CCO")
    assert isinstance(second.arguments["deep"], bool)
    assert isinstance(responder(read(called("weigh"), called("count"), tools=TOOLS)), str)
    again = {"role": "user", "content": "Once more. SMILES: C"}
    assert isinstance(
        responder(read(called("weigh"), called("count"), again, tools=TOOLS)), ToolCall
    )


def test_one_that_must_call_ends_with_the_last_tool() -> None:
    question = read(called("weigh"), called("count"), tools=TOOLS, tool_choice="required")
    answer = answer_question(question, make_responder(SPEC))
    assert (answer.tool, answer.finish_reason) == ("count", "tool_calls")


def test_a_tool_that_is_not_on_offer_is_refused() -> None:
    with pytest.raises(ApiError, match="'other', which is not a function of tools"):
        answer_question(read(tools=TOOLS), lambda _: ToolCall("other", {}))
