"""The fleet as a transport of the openai package.

openai 3 speaks through httpx2. Where a request takes the package's own path (streams, pydantic
answers, every error) only the last step is replaced: the bytes go to the fleet instead of to
``base_url``. So messages and errors are the stock ones by construction, and no call can leave
behind the fleet's back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Final, TypeAlias

import httpx2
import orjson

from ..core.errors import ConfigurationError, EndpointError, EndpointLostError
from .answer import RawAnswer
from .fleet import Fleet
from .stream import OpenStream

NOWHERE: Final = "http://fleet.invalid/v1"
"""Base URL of the stock clients: a name that never resolves (RFC 6761, 6.4)."""

NO_SECRET: Final = "no-key-is-ever-sent"

Outcome: TypeAlias = EndpointError | dict[str, Any]

_REPLAY: ContextVar[Outcome | None] = ContextVar("fanfold_replay", default=None)
SERVED_BY: Final[ContextVar[str | None]] = ContextVar("fanfold_served_by", default=None)
"""Label of the endpoint that served the last request of this context."""
FAILED: Final[ContextVar[EndpointError | None]] = ContextVar("fanfold_failed", default=None)
"""Why the last request of this context has failed, or None."""

_HOP_HEADERS: Final = frozenset({"content-encoding", "content-length", "transfer-encoding"})


@contextmanager
def replayed(outcome: Outcome) -> Iterator[None]:
    """Make the next request of this context end with an outcome that is already known."""
    token = _REPLAY.set(outcome)
    try:
        yield
    finally:
        _REPLAY.reset(token)


class FleetTransport(httpx2.AsyncBaseTransport):
    """Sends the openai package's requests through a fleet.

    Args:
        fleet: Where they go.
    """

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Answer one request.

        Raises:
            ConfigurationError: The request is no chat completion.
            httpx2.TransportError: No endpoint answered.
            RunStoppedError: Asking on is hopeless.
        """
        if not request.url.path.endswith("/chat/completions"):
            raise ConfigurationError(
                f"a fleet serves chat completions only, not {request.url.path}"
            )
        outcome = _REPLAY.get()
        if outcome is not None:
            return _response(outcome, request)
        body = orjson.loads(await request.aread())
        FAILED.set(None)
        try:
            if body.get("stream"):
                stream, server = await self._fleet.here().open_stream(body)
                SERVED_BY.set(server.label)
                return httpx2.Response(
                    200, headers=_end_to_end(stream.headers), stream=_Lines(stream)
                )
            document, endpoint = await self._fleet.here().post(body)
        except EndpointError as error:
            FAILED.set(error)
            return _response(error, request, streamed=bool(body.get("stream")))
        SERVED_BY.set(endpoint.label if endpoint else None)
        return _response(document, request)


class NoSyncTransport(httpx2.BaseTransport):
    """Refuses: the synchronous doors go through the asynchronous ones."""

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Refuse.

        Raises:
            ConfigurationError: Always.
        """
        raise ConfigurationError(
            f"{request.url.path}: a fleet has no synchronous client of its own"
        )


class _Lines(httpx2.AsyncByteStream):
    """The lines of an open stream, as httpx2 reads a body."""

    def __init__(self, stream: OpenStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        try:
            async for line in self._stream.lines():
                yield line
        except EndpointLostError as error:
            raise httpx2.ReadError(error.message) from error

    async def aclose(self) -> None:
        self._stream.close()


def _response(
    outcome: Outcome, request: httpx2.Request, *, streamed: bool = False
) -> httpx2.Response:
    """Return what stock reads; to stock, a body that is no event stream is an empty stream."""
    if isinstance(outcome, dict):
        headers = {"content-type": "application/json"}
        return httpx2.Response(200, headers=headers, content=orjson.dumps(outcome))
    raw = outcome.__cause__
    if not isinstance(raw, RawAnswer) or (
        raw.status < 400 and (streamed or _partial(outcome))  # noqa: PLR2004
    ):
        kind = httpx2.ReadTimeout if isinstance(raw, TimeoutError) else httpx2.ConnectError
        raise kind(outcome.message, request=request) from outcome
    return httpx2.Response(raw.status, headers=_end_to_end(raw.headers), content=raw.body)


def _partial(error: EndpointError) -> bool:
    """Tell whether the answer looks whole but is not: stock would take it for a good one."""
    return isinstance(error, EndpointLostError)


def _end_to_end(headers: Mapping[str, str]) -> list[tuple[str, str]]:
    return [(k, v) for k, v in headers.items() if k.lower() not in _HOP_HEADERS]
