"""Define the messages between coordinator and workers: one JSON object per WebSocket message.

A worker begins with ``hello`` (fanfold's version, host, process). The coordinator then sends
``task``, and the worker answers each with ``result`` or ``failed``; the coordinator may send
``stop`` at any time. A worker that cannot run another task sets ``leaves`` in its result. If the
connection ends, the worker ends.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from ...core.errors import BackendError
from ...core.types import Json

VERSION: Final = 2
"""Version of these messages."""

URL_ENV: Final = "FANFOLD_COORDINATOR_URL"
"""Variable of a worker: URL of the coordinator's WebSocket server."""
TOKEN_ENV: Final = "FANFOLD_COORDINATOR_TOKEN"
"""Variable of a worker: token for that server."""

MAX_MESSAGE_BYTES: Final = 64_000_000
"""Most bytes of a message; tasks and results are bounded to a few MB, aggregates are not."""

CLOSE_REFUSED: Final = 4000
"""Close code with which the coordinator refuses a worker, with the reason."""


def encode_message(kind: str, **facts: Json) -> bytes:
    """Return a message.

    Args:
        kind: Kind of the message.
        **facts: Its further fields.
    """
    return orjson.dumps({"v": VERSION, "kind": kind, **facts})


def decode_message(data: Any) -> dict[str, Any]:
    """Decode a message.

    Args:
        data: The received bytes.

    Raises:
        BackendError: They are no message.
    """
    try:
        found = orjson.loads(data)
    except (orjson.JSONDecodeError, TypeError) as error:
        raise BackendError(f"a message that is not JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise BackendError("a message without a kind")
    return found
