"""Last node of a run: the aggregate is presented, the results are written."""

from __future__ import annotations

from langgraph.runtime import Runtime

from .context import Context
from .state import RunState


async def reduce(state: RunState, runtime: Runtime[Context]) -> RunState:
    """Present the combined parts and write the results' files."""
    context, tally = runtime.context, state["tally"]
    async with context.opened(state["run_folder"]) as tools:
        aggregate = tools.aggregate.present(state["parts"])
        progress = {
            "items": state["total"],
            "done": tally.get("done", 0),
            "failed": tally.get("failed", 0),
            "requests": tools.progress.requests,
            "tokens": {
                "prompt": tools.progress.prompt_tokens,
                "completion": tools.progress.completion_tokens,
            },
            "simulated": tools.simulated,
        }
    results = await context.finish(state["run_folder"], aggregate, progress)
    return {"aggregate": aggregate, "progress": progress, "results": results}
