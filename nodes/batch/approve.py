"""Pause between shards when the budget covers no further item, until a user raises it."""

from __future__ import annotations

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
    },
    "additionalProperties": False,
    "minProperties": 1,
}
"""JSON Schema of the answer, for clients that show a form."""


async def approve(state: RunState, runtime: Runtime[Context]) -> RunState:
    """Ask for a higher budget, unless the rest covers the next item.

    The answer is the new total cap, e.g. ``Command(resume={"usd": 20})``; it may name ``usd``,
    ``tokens``, ``requests`` and ``node_hours``.

    Raises:
        BudgetExhaustedError: The settings require a stop instead of a question.
    """
    context, run, problem = runtime.context, state["run"], None
    while (question := await context.budget_gap(run, state.get("needed") or {})) is not None:
        asked = question if problem is None else {**question, "problem": problem}
        answer = interrupt(asked, response_schema=ANSWER_SCHEMA)
        problem = await context.raise_limits(run, answer)
    return {}
