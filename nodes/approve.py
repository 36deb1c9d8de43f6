"""A pause between shards: the budget carries no further item, and somebody may allow more."""

from __future__ import annotations

from langgraph.runtime import Runtime
from langgraph.types import interrupt

from .context import Context
from .state import RunState


async def approve(state: RunState, runtime: Runtime[Context]) -> RunState:
    """Ask for a higher budget, unless what is left carries the next item.

    The answer is the new total cap, e.g. ``Command(resume={"usd": 20})``; it may name ``usd``,
    ``tokens``, ``requests`` and ``node_hours``.

    Raises:
        BudgetExhaustedError: The settings say to stop rather than to ask.
    """
    context, folder, problem = runtime.context, state["run_folder"], None
    while (question := await context.shortfall(folder, state.get("needed") or {})) is not None:
        answer = interrupt(question if problem is None else {**question, "problem": problem})
        problem = await context.allow(folder, answer)
    return {}
