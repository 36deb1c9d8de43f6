"""From a question to the answer's text, cut where limits say so."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from .dice import digest
from .errors import ApiError
from .requests import Question
from .responders import Responder, ToolUse, compact
from .tokens import cut, text_tokens


@dataclass(frozen=True, slots=True)
class Answer:
    """What a node says.

    Attributes:
        text: The content, or a tool call's arguments.
        finish_reason: ``stop``, ``length``, ``tool_calls``, ``content_filter`` or ``abort``.
        tokens: Output tokens, those of a tool call included.
        tool: Name of the function called, or None.
        refusal: The model's refusal, or None.
    """

    text: str
    finish_reason: str
    tokens: int
    tool: str | None = None
    refusal: str | None = None


def answer_to(question: Question, responder: Responder) -> Answer:
    """Answer a question.

    Args:
        question: What is asked.
        responder: Who writes the text.

    Returns:
        The answer, cut at stop texts and at the most tokens.

    Raises:
        ApiError: The question cannot be answered.
    """
    said = responder(question)
    if not isinstance(said, ToolUse):
        return limited(question, said)
    if said.name not in {tool.get("name") for tool in question.tools}:
        raise ApiError(f"the responder calls {said.name!r}, which is no function of tools")
    return limited(question, compact(said.arguments), said.name)


def limited(question: Question, text: str, tool: str | None = None) -> Answer:
    """Cut a text as a server does.

    Args:
        question: Holds the limits.
        text: The whole text.
        tool: The function that it calls, unless the question itself names one.

    Returns:
        The answer; a tool call that is cut becomes plain text, as in vLLM.
    """
    ends = [place for stop in question.stop if stop and (place := text.find(stop)) >= 0]
    whole = text[: min(ends)] if ends else text
    tokens = text_tokens(whole)
    tool = tool or question.form.tool
    if tokens <= question.max_tokens:
        return Answer(whole, "tool_calls" if tool else "stop", tokens, tool)
    if tool:
        whole = f'<tool_call>\n{{"name": "{tool}", "arguments": {whole}'
    return Answer(cut(whole, question.max_tokens), "length", question.max_tokens)


def spoiled(answer: Answer, kind: str, question: Question) -> Answer:
    """Spoil an answer in the way of a fault.

    Args:
        answer: The good answer.
        kind: ``empty_content``, ``content_filter``, ``refusal``, ``bad_schema``, or another
            fault, which leaves the answer as it is.
        question: What was asked.

    Returns:
        The spoiled answer.
    """
    match kind:
        case "empty_content":
            return replace(answer, text="", tokens=0, tool=None, finish_reason="stop")
        case "content_filter":
            return replace(answer, finish_reason="content_filter")
        case "refusal":
            refusal = "I'm sorry, but I can't help with that."
            tokens = text_tokens(refusal)
            return replace(answer, text="", refusal=refusal, tokens=tokens, finish_reason="stop")
        case "bad_schema":
            return limited(question, _broken(question))
        case _:
            return answer


def partial(answer: Answer) -> Answer:
    """Return the answer of a node that is told to stop: half of it, marked ``abort``.

    Args:
        answer: The answer under way.

    Returns:
        Its first half.
    """
    tokens = answer.tokens // 2
    return Answer(cut(answer.text, tokens), "abort", tokens)


def _broken(question: Question) -> str:
    schema = question.form.schema
    if schema is None:
        return '{"answer": '
    value: Any = schema.broken(digest(question.key, "broken"))
    return compact(value)
