"""Second step of an item: call the model."""

from __future__ import annotations

from typing import Any

from ...backends.core.errors import EndpointError, PromptTooLongError
from ...backends.core.protocols import CURRENT_CALLS
from ..context import ItemRuntime
from .item_state import ItemState
from .prepare import make_item_error


async def infer(state: ItemState, runtime: ItemRuntime) -> ItemState:
    """Call the model; a failed endpoint ends the item, an error that ends the run is raised."""
    try:
        reply = await runtime.context.model.ask(state["messages"])
        calls = CURRENT_CALLS.get()
        if calls is not None:
            # an earlier answer of this item was sent back and does not count
            calls.useful, calls.useful_endpoint = reply.usage, reply.endpoint
    except PromptTooLongError as error:
        return {"too_long": make_item_error(error)}
    except EndpointError as error:
        return {"error": make_item_error(error)}
    said: dict[str, Any] = {
        "content": reply.content,
        "finish_reason": reply.finish_reason,
        "refusal": reply.refusal,
    }
    if runtime.context.certainty is not None:
        said["logprobs"] = reply.logprobs
    if reply.reasoning:
        said["reasoning"] = reply.reasoning
    if reply.finish_reason != "stop":  # why it was cut
        said["completion_tokens"] = reply.usage.completion
        said["max_tokens"] = calls.max_tokens if calls is not None else None
    return {"reply": said}
