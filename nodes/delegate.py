"""The model call of an item, left to a user's own graph."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import orjson
from langchain_core.messages import BaseMessage
from langgraph.runtime import Runtime

from ..backends.contract.errors import ENDS_RUN, ConfigurationError, InvalidAnswerError
from ..backends.contract.types import Json
from .context import ItemContext
from .prepare import failure
from .state import ItemState


async def delegate(state: ItemState, runtime: Runtime[ItemContext]) -> ItemState:
    """Call the user's graph with the columns and the messages; judge what it puts out.

    Whatever the graph raises ends the item here, so that no engine around it sees an exception
    of LangGraph's own and acts on it.
    """
    context = runtime.context
    if context.delegate is None:
        msg = "the item graph was built for task.graph, but none is set"
        raise ConfigurationError(msg)
    try:
        result = await context.delegate({**state["row"], "messages": state["messages"]})
        return {"output": context.answer.check(_json_safe(_output(result)))}
    except ENDS_RUN:
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return {"error": failure(error)}  # this task is not cancelled: the graph raised it
    except Exception as error:  # noqa: BLE001 - the boundary of the user's graph
        return {"error": failure(error)}


def _output(result: Any) -> Json:
    """Return what a user's graph puts out.

    That is the key ``output``, else LangChain's ``structured_response``, else the last message's
    text, else the result itself.
    """
    if isinstance(result, Mapping):
        for key in ("output", "structured_response"):
            if key in result:
                return _plain(result[key])
        messages = result.get("messages")
        if messages:
            return _plain(messages[-1])
        keys = ", ".join(map(str, result)) or "nothing"
        msg = f"task.graph must return the key 'output' or 'messages'; it returned {keys}"
        raise ConfigurationError(msg)
    return _plain(result)


def _json_safe(value: Json) -> Json:
    try:
        orjson.dumps(value)
    except TypeError as error:
        msg = f"what task.graph put out cannot be written as JSON: {error}"
        raise InvalidAnswerError(msg) from None
    return value


def _plain(value: Any) -> Json:
    if isinstance(value, BaseMessage):
        return str(value.text)  # a plain str: orjson takes no subclass
    if hasattr(value, "model_dump"):
        return value.model_dump(mode="json")
    return value
