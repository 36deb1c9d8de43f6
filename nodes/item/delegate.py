"""Step of an item that calls a user's graph (``task.graph``) in place of the model."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from ...backends.core.errors import RUN_ENDING_ERRORS, ConfigurationError, InvalidAnswerError
from ...backends.core.types import Json
from ...backends.core.values import replace_surrogates, to_json_text, to_plain_json
from ..context import ItemRuntime
from .answer import answer_text
from .item_state import ItemState
from .prepare import make_item_error


async def delegate(state: ItemState, runtime: ItemRuntime) -> ItemState:
    """Call the user's graph with the columns and the messages, and check its output.

    Every exception of the graph ends the item here, so that an engine around it sees no exception
    of LangGraph and does not act on it.
    """
    context = runtime.context
    if context.delegate is None:
        msg = "the item graph was built for task.graph, but none is set"
        raise ConfigurationError(msg)
    try:
        result = await context.delegate({**state["row"], "messages": state["messages"]})
        output = _plain(_output(result))
        return {"output": context.answer_check.check_value(output), "raw": answer_text(output)}
    except RUN_ENDING_ERRORS:
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        return {"error": make_item_error(error)}  # this task was not cancelled: the graph raised it
    except InvalidAnswerError as error:
        return {"error": make_item_error(error), "raw": error.raw}
    except Exception as error:  # noqa: BLE001 - the boundary of the user's graph
        return {"error": make_item_error(error)}


def _output(result: Any) -> Json:
    """Return the output of a user's graph.

    It is the key ``output``, else LangChain's ``structured_response``, else the text of the last
    message, else the whole result.
    """
    if isinstance(result, Mapping):
        for key in ("output", "structured_response"):
            if key in result:
                return result[key]
        messages = result.get("messages")
        if messages:
            return messages[-1]
        keys = ", ".join(map(str, result)) or "nothing"
        msg = f"task.graph must return the key 'output' or 'messages'; it returned {keys}"
        raise ConfigurationError(msg)
    return result


def _plain(value: Any) -> Json:
    """Return an output as plain JSON data.

    Raises:
        InvalidAnswerError: It cannot be written as JSON.
    """
    from langchain_core.messages import BaseMessage  # noqa: PLC0415 - the graph imports it

    try:
        if isinstance(value, BaseMessage):
            value = str(value.text)  # a plain str: orjson accepts no subclass
        elif isinstance(value, BaseModel):
            value = value.model_dump(mode="json")
        return to_plain_json(value)
    except ValueError as error:  # pydantic's errors are ValueErrors too
        msg = f"the output of task.graph cannot be written as JSON: {error}"
        raise InvalidAnswerError(replace_surrogates(msg), to_json_text(value)) from None
