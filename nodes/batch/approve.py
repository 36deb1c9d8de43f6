"""Pause between shards when the budget covers no further item, until a user raises it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from langgraph.runtime import Runtime
from langgraph.types import interrupt

from ..context import Context
from ..state import RunState

_NUMBER: Final = {"type": "number", "exclusiveMinimum": 0}
ANSWER_SCHEMA: Final[dict[str, Any]] = {
    "title": "Higher budget",
    "description": "New totals for the whole run; those left out are unchanged.",
    "type": "object",
    "properties": {
        "usd": _NUMBER | {"description": "US dollars."},
        "tokens": _NUMBER | {"type": "integer", "description": "Prompt and completion tokens."},
        "requests": _NUMBER | {"type": "integer", "description": "Requests sent."},
        "node_hours": _NUMBER | {"description": "Hours times nodes."},
        "number": {"type": "integer", "description": "Number of the question; another is refused."},
    },
    "additionalProperties": False,
    "minProperties": 1,
}
"""JSON Schema of the answer, for clients that show a form."""


async def approve(state: RunState, runtime: Runtime[Context]) -> RunState:
    """Ask for a higher budget, unless the rest covers the next item.

    The answer is the new total cap, e.g. ``Command(resume={"usd": 20})``; it may name ``usd``,
    ``tokens``, ``requests`` and ``node_hours``, and the ``number`` of the question.

    A task asks once: LangGraph accepts the id of a task's first question for all of its questions,
    so a late answer would count for a later one.

    Raises:
        BudgetExhaustedError: The settings require a stop instead of a question.
    """
    context, run, needed = runtime.context, state["run"], state.get("needed") or {}
    question = await context.budget_gap(run, needed)
    if question is None:
        return {"refusal": None}
    number, refusal = state.get("asked", 0) + 1, state.get("refusal")
    asked = question | {"number": number} | ({"problem": refusal} if refusal else {})
    answer = interrupt(asked, response_schema=ANSWER_SCHEMA)
    if isinstance(answer, Mapping) and answer.get("number", number) != number:
        refusal = f"the answer names question {answer['number']!r}, but question {number} is open"
        return {"asked": number, "refusal": f"{refusal}; no limit was changed"}
    if isinstance(answer, Mapping):
        answer = {key: value for key, value in answer.items() if key != "number"}
    refusal = await context.raise_limits(run, answer)
    if refusal is None and await context.budget_gap(run, needed) is not None:
        refusal = "the new total was stored, but it does not cover the next item"
    return {"asked": number, "refusal": refusal}


def route_after_approve(state: RunState) -> str:
    """Return the node after ``approve``: the next question, or the shards that are left."""
    return "approve" if state.get("refusal") else "dispatch"
