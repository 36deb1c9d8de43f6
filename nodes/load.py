"""First node of a run: the batch is read, checked and written to the run's folder."""

from __future__ import annotations

from typing import Any

from langgraph.runtime import Runtime
from langgraph.types import Overwrite

from .context import Context
from .state import RunState


async def load(state: RunState, runtime: Runtime[Context]) -> dict[str, Any]:
    """Read and check the batch; the state keeps a reference, never the items."""
    run = await runtime.context.prepare(state.get("folder"), state.get("path"), state.get("items"))
    return {
        "folder": run.folder,
        "total": run.total,
        "shard_items": run.shard_items,
        "window": run.window,
        "cursor": 0,
        "tally": Overwrite({}),  # a thread that is used again starts anew
        "parts": Overwrite({}),
    }
