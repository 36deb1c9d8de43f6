"""Second step of an item: the model call."""

from __future__ import annotations

from langgraph.runtime import Runtime

from ...backends.core.errors import EndpointError
from ...backends.core.protocols import CURRENT_CALLS
from ..context import ItemContext
from ..state import ItemState
from .prepare import make_item_error


async def infer(state: ItemState, runtime: Runtime[ItemContext]) -> ItemState:
    """Ask the model; an endpoint's failure ends the item, what ends the run is raised."""
    try:
        reply = await runtime.context.model.ask(state["messages"])
        if (calls := CURRENT_CALLS.get()) is not None:
            # what was answered before is sent back
            calls.useful, calls.useful_endpoint = reply.usage, reply.endpoint
    except EndpointError as error:
        return {"error": make_item_error(error)}
    return {
        "reply": {
            "content": reply.content,
            "finish_reason": reply.finish_reason,
            "refusal": reply.refusal,
        }
    }
