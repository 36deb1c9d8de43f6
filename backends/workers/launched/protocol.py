"""What a desk and its workers say to each other: one JSON object per WebSocket message.

A worker begins with ``hello`` (fanfold's version, host, process). Then the desk says ``order``, and
the worker ``summary`` or ``failed`` to each of them; the desk may say ``stop`` at any time. A
worker that can do no more says so with its summary (``leaves``). The end of the connection is the
end of the worker.
"""

from __future__ import annotations

from typing import Any, Final

import orjson

from ...core.errors import BackendError
from ...core.types import Json

VERSION: Final = 2
"""Version of these messages."""

URL_ENV: Final = "FANFOLD_COORDINATOR_URL"
"""Variable of a worker: where the desk is."""
TOKEN_ENV: Final = "FANFOLD_COORDINATOR_TOKEN"
"""Variable of a worker: what it shows there."""

MAX_MESSAGE_BYTES: Final = 64_000_000
"""Most bytes of a message; orders and summaries are bounded to a few MB, aggregates are not."""

CLOSE_REFUSED: Final = 4000
"""Code with which the desk closes a connection that it does not want; the reason says why."""


def encode_message(kind: str, **facts: Json) -> bytes:
    """Return a message.

    Args:
        kind: What it is.
        **facts: What it says.
    """
    return orjson.dumps({"v": VERSION, "kind": kind, **facts})


def decode_message(data: Any) -> dict[str, Any]:
    """Read a message.

    Args:
        data: What came.

    Raises:
        BackendError: It is none.
    """
    try:
        found = orjson.loads(data)
    except (orjson.JSONDecodeError, TypeError) as error:
        raise BackendError(f"a message that is no JSON: {error}") from None
    if not isinstance(found, dict) or not isinstance(found.get("kind"), str):
        raise BackendError("a message that does not say what it is")
    return found
