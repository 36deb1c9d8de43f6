"""An answer that is read token by token (server-sent events)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, Final

import aiohttp
import orjson

from ..contract.errors import EndpointLostError
from . import failures
from .answer import Complaint, RawAnswer
from .failures import Failure

_OK: Final = 200
_DATA: Final = b"data:"

End = Callable[[dict[str, Any] | None], None]


class OpenStream:
    """A stream whose first event has come; holds its endpoint until closed.

    Args:
        response: The answer, its head read.
        first: The first line with data.
        endpoint: Label of who answers.
        end: Called once, with a summary of a whole answer, or None when it stayed a part.

    Attributes:
        headers: The answer's headers.
    """

    def __init__(
        self, response: aiohttp.ClientResponse, first: bytes, endpoint: str, end: End
    ) -> None:
        self._response = response
        self._first = first
        self._endpoint = endpoint
        self._end = end
        self._summary: dict[str, Any] = {}
        self._open = True
        self.headers = response.headers

    @classmethod
    async def begin(
        cls, response: aiohttp.ClientResponse, endpoint: str, end: End
    ) -> OpenStream | Failure:
        """Read up to the first event, or return why there is none."""
        if response.status != _OK:
            raw = RawAnswer(response.status, response.headers, await response.read())
            return failures.of_answer(raw, endpoint)
        async for line in response.content:
            if not line.startswith(_DATA):
                continue
            if failure := _error_event(line, response, endpoint):
                response.close()
                return failure
            return cls(response, line, endpoint, end)
        raw = RawAnswer(response.status, response.headers, b"")
        return failures.of_reply(raw, "the stream held nothing", endpoint)

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the stream's lines, and close it at the end.

        Raises:
            EndpointLostError: The stream was cut or fell silent.
        """
        whole = False
        try:
            yield self._look(self._first)
            async for line in self._response.content:
                yield self._look(line)
            whole = True
        except (aiohttp.ClientError, TimeoutError) as error:
            raise failures.of_exception(error, self._endpoint).error from error
        finally:
            self.close(whole)
        if not self._summary.get("finished"):
            raise EndpointLostError(
                f"{self._endpoint}: the stream ended before the answer was whole",
                self._endpoint,
            )

    def close(self, whole: bool = False) -> None:
        """Let the endpoint go; leaving early frees the server's slot too."""
        if not self._open:
            return
        self._open = False
        if not whole:
            self._response.close()
        self._end(self._summary if whole and self._summary.get("finished") else None)

    def _look(self, line: bytes) -> bytes:
        """Note model, fingerprint, usage and the end as they pass."""
        if line.startswith(_DATA) and (chunk := _decode(line)):
            for key in ("model", "system_fingerprint", "usage"):
                if chunk.get(key):
                    self._summary[key] = chunk[key]
            choices = chunk.get("choices") or [{}]
            if choices[0].get("finish_reason") or chunk.get("error"):
                self._summary["finished"] = True
        return line


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        document = orjson.loads(line[len(_DATA) :])
    except orjson.JSONDecodeError:
        return None
    return document if isinstance(document, dict) else None


def _error_event(line: bytes, response: aiohttp.ClientResponse, endpoint: str) -> Failure | None:
    document = _decode(line)
    if document is None or not (document.get("error") or document.get("object") == "error"):
        return None
    complaint = Complaint.of(document)
    code = complaint.code or ""
    status = int(code) if code.isdigit() else 500
    raw = RawAnswer(status, response.headers, line[len(_DATA) :].strip())
    return failures.of_complaint(raw, complaint, status, endpoint)
