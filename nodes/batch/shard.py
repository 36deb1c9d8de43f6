"""The map node: run one shard, in this process or on a worker."""

from __future__ import annotations

from typing import Any

from langgraph.errors import GraphDrained
from langgraph.runtime import Runtime

from ...backends.core.errors import BudgetExhaustedError
from ...backends.core.types import Shard
from ..context import Context, RunTools
from ..shard.local import has_ended, run_local_shard
from ..shard.remote import run_remote_shard
from ..state import ShardState


async def shard(state: ShardState, runtime: Runtime[Context]) -> dict[str, Any]:
    """Run each item of the shard through the item graph; return the shard's part of the aggregate.

    A shard that the budget does not cover is left for later, and so is one whose items have all
    ended, as long as others may have open ones.

    Raises:
        GraphDrained: The run is being stopped; the shard is unfinished and will run again.
        RunStoppedError: The run cannot go on.
        JournalError: An item could not be recorded.
    """

    def drain() -> str | None:
        return (runtime.drain_reason or "drain") if runtime.drain_requested else None

    async with runtime.context.open_run(state["run"]) as tools:
        range_ = Shard(state["lo"], state["hi"])
        if state.get("may_wait") and has_ended(range_, tools):
            return {"ended": [[range_.lo, range_.hi]]}
        write = runtime.stream_writer
        async with tools.progress_stream.stream_counts(tools.progress_json, write):
            if tools.coordinator is None:
                part = await run_local_shard(range_, tools, drain)
            else:
                part = await run_remote_shard(range_, tools, tools.coordinator, drain)
        if part is not None:
            return part.to_update()
        # A failing Send cancels the others: wait until all of their items are recorded.
        await tools.gate.wait_drained()
        if isinstance(tools.gate.error, BudgetExhaustedError):
            return make_left_update(range_, tools)
        raise tools.gate.error or GraphDrained(tools.gate.reason or "drain")


def make_left_update(range_: Shard, tools: RunTools) -> dict[str, Any]:
    """Return the state update for a shard that the budget did not cover."""
    needed = tools.budget.needed if tools.budget is not None else None
    return {
        "left": [[range_.lo, range_.hi]],
        "needed": {} if needed is None else needed.to_json(),
    }
