"""Fan-out: which shards go next."""

from __future__ import annotations

from langgraph.runtime import Runtime
from langgraph.types import Send

from .context import Context
from .state import RunState


async def dispatch(state: RunState, runtime: Runtime[Context]) -> RunState:  # noqa: ARG001 - a node
    """Move the cursor over the next window of shards."""
    ahead = state["cursor"] + state["window"] * state["shard_items"]
    return {"cursor": min(state["total"], ahead)}


def fan_out(state: RunState) -> list[Send]:
    """Send each shard of the window that the cursor has just passed."""
    size, hi = state["shard_items"], state["cursor"]
    span = state["window"] * size
    first = (hi - 1) // span * span
    return [
        Send("shard", {"run_folder": state["run_folder"], "lo": lo, "hi": min(lo + size, hi)})
        for lo in range(first, hi, size)
    ]


async def gather(state: RunState, runtime: Runtime[Context]) -> RunState:  # noqa: ARG001 - a node
    """Fan-in: the superstep's shards are home, their parts combined by the state's reducers."""
    return {}


def more(state: RunState) -> str:
    """Name the node after ``gather``: another window, or the end."""
    return "dispatch" if state["cursor"] < state["total"] else "reduce"
