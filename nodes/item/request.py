"""Step of an item that is a request itself: send it as it is, keep the server's answer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from ...backends.core.errors import (
    AnswerError,
    ConfigurationError,
    EndpointError,
    InvalidItemError,
)
from ...backends.core.protocols import CURRENT_CALLS
from ...backends.core.request_urls import REQUEST_URLS, URL_FIELD
from ...backends.core.types import CHAT_URL, Row
from ...backends.core.values import to_json_text
from ...backends.core.vectors import KEEP_FIELD, KEEP_VECTOR, pack_answer
from ..context import ItemRuntime
from .item_state import ItemState
from .prepare import make_item_error

_OWN_FIELDS: Final = frozenset({"model", "stream", "stream_options", URL_FIELD}) | {
    "stream_include_usage",
    "stream_continuous_usage_stats",
}
"""Fields of a request that fanfold sets: it reads whole answers."""
_LEAST_ERROR: Final = 400
"""The least HTTP status that is an error."""


async def request(state: ItemState, runtime: ItemRuntime) -> ItemState:
    """Send the item's own request; its output is the answer as the server sent it.

    Of a request of fanfold's own, the output is the part that it names.
    """
    client = runtime.context.completions
    if client is None:
        msg = "the item graph was built for requests (input.format), but the settings name none"
        raise ConfigurationError(msg)
    try:
        completion, reply = await client.complete(_make_body(state["row"], client.model))
    except InvalidItemError as error:
        return {"error": make_item_error(error)}
    except EndpointError as error:
        return _make_failure(error)
    calls = CURRENT_CALLS.get()
    if calls is not None:
        calls.useful, calls.useful_endpoint = reply.usage, reply.endpoint
    if state["row"].get(KEEP_FIELD) != KEEP_VECTOR:
        return {"output": completion}
    try:
        return {"output": pack_answer(completion)}
    except AnswerError as error:
        return {"error": make_item_error(error)}


def _make_body(row: Row, model: str) -> Mapping[str, Any]:
    """Return the body that is sent.

    Raises:
        InvalidItemError: Its URL is not supported, or it is for another model.
    """
    url, body = row["url"], row["body"]
    if url not in REQUEST_URLS:
        msg = f"url {url!r} is not supported; fanfold sends requests to {', '.join(REQUEST_URLS)}"
        raise InvalidItemError(msg)
    named = body.get("model")
    if named not in (None, model):
        msg = (
            f"the request is for the model {named!r}, but the endpoints of this run serve {model!r}"
            " (model.name, endpoints.models)"
        )
        raise InvalidItemError(msg)
    sent = {key: value for key, value in body.items() if key not in _OWN_FIELDS}
    return sent if url == CHAT_URL else {**sent, URL_FIELD: url}


def _make_failure(error: EndpointError) -> ItemState:
    """Return the end of an item that failed; ``raw`` has the server's status if there is one."""
    failed = ItemState(error=make_item_error(error))
    if error.status is not None and error.status >= _LEAST_ERROR:
        failed["raw"] = to_json_text({"status_code": error.status, "code": error.code})
    return failed
