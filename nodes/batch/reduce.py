"""Last node of a run: present the aggregate and write the results."""

from __future__ import annotations

import asyncio
from typing import Any

from langgraph.runtime import Runtime
from langgraph.types import Overwrite

from ..context import Context, RunTools
from ..shard.local import ShardPart, fold_range
from ..state import RunState
from .dispatch import check_step_limit


async def reduce(state: RunState, runtime: Runtime[Context]) -> dict[str, Any]:
    """Present the aggregate and write the result files.

    Raises:
        RunStoppedError: LangGraph's recursion limit would stop the run right after this node.
    """
    check_step_limit(state, 1)
    context, tally, parts = runtime.context, state["tally"], state["parts"]
    async with context.open_run(state["run"]) as tools:
        if tools.coordinator is not None:
            await tools.coordinator.finish_reading()
        if tools.item_journal.duplicates:
            tally, parts = await asyncio.to_thread(_fold_journal, tools)
        tools.progress_stream.emit(tools.progress_json, runtime.stream_writer, last=True)
        aggregate = tools.aggregators.present(parts)
        counts = tools.progress_json()
        progress = counts | {
            "done": tally.get("done", 0),
            "failed": tally.get("failed", 0),
        }
        aggregate, results = await context.finish_run(state["run"], aggregate, progress)
    # The aggregate was presented from the parts, and a checkpoint need not contain both.
    done: dict[str, Any] = {"aggregate": aggregate, "progress": progress, "results": results}
    return done | {"parts": Overwrite({})}


def _fold_journal(tools: RunTools) -> tuple[dict[str, int], dict[str, Any]]:
    """Fold the journal from the first item on; blocks.

    Two copies of a shard ended some items twice. A part may come from one copy while the
    journal, and so the results, keep the other.
    """
    part = ShardPart(tools)
    fold_range(part, tools, 0, len(tools.store))
    tools.progress.done, tools.progress.failed = part.tally["done"], part.tally["failed"]
    return part.tally, part.state()
