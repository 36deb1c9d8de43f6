"""First node of a run: the batch is read, checked and written to the run's folder."""

from __future__ import annotations

from typing import Any

from langgraph.runtime import Runtime
from langgraph.types import Overwrite, Send

from ..backends.contract.errors import InputError
from .context import Context
from .state import LoadState, RunState


def enter(state: RunState) -> list[Send]:
    """Hand the input to ``load``.

    LangGraph strips untracked keys from what it keeps of a Send, so no checkpoint holds the
    items; that there were some is kept, lest a run that is resumed before they were written
    goes on with others.
    """
    items = state.get("items")
    given = {
        "path": state.get("path"),
        "preset": state.get("preset"),
        "pasted": items is not None,
    }
    return [Send("load", {"given": given, "items": items})]


async def load(state: LoadState, runtime: Runtime[Context]) -> dict[str, Any]:
    """Read and check the batch; the state keeps a reference, never the items.

    Raises:
        InputError: The batch does not fit, or pasted items were lost with a process that ended
            before it had written them.
    """
    given, items = state["given"], state.get("items")
    if given["pasted"] and items is None:
        msg = "the run ended before its items were written; start it again with the items"
        raise InputError(msg)
    run = await runtime.context.prepare(given["path"], items, given.get("preset"))
    return {
        "run": run.key,
        "total": run.total,
        "shard_items": run.shard_items,
        "window": run.window,
        "sizing": run.sizing,
        "cursor": 0,
        "left": Overwrite([]),
        "needed": Overwrite({}),
        "pace": Overwrite({}),
        "tally": Overwrite({}),  # a thread that is used again starts anew
        "parts": Overwrite({}),
    }
