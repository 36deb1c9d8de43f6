"""An answer that is read token by token (server-sent events)."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import orjson

from . import failures, judge
from .answer import Complaint, RawAnswer
from .failures import Failure
from .transport import BodyReader

_OK: Final = 200
_DATA: Final = b"data:"
_DONE: Final = b"data: [DONE]"

End = Callable[[dict[str, Any] | Failure | None], None]


@dataclass(frozen=True, slots=True)
class Watch:
    """What a stream reports.

    Attributes:
        pause: Called when nobody reads it for the moment.
        resume: Called when it is read again, or has ended.
        end: Called once: with a summary of a whole answer, with what broke it off, or with None
            when the caller left early.
    """

    pause: Callable[[], None]
    resume: Callable[[], None]
    end: End


class OpenStream:
    """A stream whose first token has come; holds its endpoint until closed.

    Args:
        reader: Reads the rest of the answer.
        head: The lines up to the first token's.
        endpoint: Label of who answers.
        silence_s: Longest wait for a further line, in seconds.
        watch: Where it reports how it goes on.

    Attributes:
        headers: The answer's headers.
    """

    def __init__(
        self,
        reader: BodyReader,
        head: Sequence[bytes],
        endpoint: str,
        silence_s: float,
        watch: Watch,
    ) -> None:
        self._reader, self._response = reader, reader.response
        self._head = head
        self._endpoint = endpoint
        self._silence_s = silence_s
        self._watch = watch
        self._summary: dict[str, Any] = {}
        self._failure: Failure | None = None
        self._open = True
        self._reading = False
        self.headers = reader.response.headers
        watch.pause()

    @classmethod
    async def begin(
        cls, reader: BodyReader, endpoint: str, silence_s: float, watch: Watch
    ) -> OpenStream | Failure:
        """Read up to the first token, or return why there is none.

        What comes before it (the speaker's role) is held back, so that the call may still move.
        """
        response = reader.response
        if response.status != _OK:
            raw = RawAnswer(response.status, response.headers, await reader.read())
            return failures.of_answer(raw, endpoint)
        head: list[bytes] = []
        while line := await reader.read_line():
            head.append(line)
            chunk = _decode(line) if line.startswith(_DATA) else None
            if failure := _error_event(chunk, line, response, endpoint):
                response.close()
                return failure
            if _says_something(chunk):
                return cls(reader, head, endpoint, silence_s, watch)
            if line.startswith(_DONE):
                break
        if any(map(bytes.strip, head)):
            response.close()
            return failures.of_end(endpoint)
        raw = RawAnswer(response.status, response.headers, b"")
        return failures.of_reply(raw, "the stream held nothing", endpoint)

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the stream's lines, and close it at the end.

        Raises:
            EndpointLostError: The stream was cut or fell silent.
        """
        try:
            for line in self._head:
                yield self._look(line)
            while line := await self._next():
                yield self._look(line)
            self._check_end()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._failure = failures.of_exception(error, self._endpoint)
            raise self._failure.error from error
        finally:
            self.close()

    async def _next(self) -> bytes:
        self._reading = True
        self._watch.resume()
        try:
            async with asyncio.timeout(self._silence_s):
                return await self._reader.read_line()
        finally:
            self._reading = False
            if self._open:
                self._watch.pause()

    def _check_end(self) -> None:
        if self._failure is None and not self._summary.get("finished"):
            self._failure = failures.of_end(self._endpoint)
        if self._failure is not None:
            raise self._failure.error

    def close(self) -> None:
        """Let the endpoint go; leaving early frees the server's slot too."""
        if not self._open:
            return
        self._open = False
        if not self._reading:
            self._watch.resume()
        whole = self._failure is None and self._summary.get("finished")
        if not self._response.content.at_eof():
            self._response.close()
        self._watch.end(self._failure or (self._summary if whole else None))

    def _look(self, line: bytes) -> bytes:
        """Note model, fingerprint, usage and the end as they pass."""
        if line.startswith(_DONE):
            # Readers stop here, so that what is missing must be told here.
            self._check_end()
        elif line.startswith(_DATA) and (chunk := _decode(line)):
            for key in ("model", "system_fingerprint", "usage"):
                if chunk.get(key):
                    self._summary[key] = chunk[key]
            if failure := _error_event(chunk, line, self._response, self._endpoint):
                self._failure = failure
            choices = chunk.get("choices") or [{}]
            reason = choices[0].get("finish_reason")
            if isinstance(reason, str) and reason in judge.ABORTED:
                self._failure = failures.of_end(self._endpoint)
            elif reason:
                self._summary["finished"] = True
        return line


def _decode(line: bytes) -> dict[str, Any] | None:
    try:
        document = orjson.loads(line[len(_DATA) :])
    except orjson.JSONDecodeError:
        return None
    if not isinstance(document, dict):
        return None
    choices = document.get("choices")
    if choices:
        listed = choices if isinstance(choices, list) else []
        document["choices"] = [one for one in listed if isinstance(one, dict)]
    return document


def _says_something(chunk: Mapping[str, Any] | None) -> bool:
    """Tell whether an event brings a token, a call or an end."""
    if chunk is None:
        return False
    for choice in chunk.get("choices") or ():
        delta = choice.get("delta")
        parts = delta if isinstance(delta, dict) else {}
        if choice.get("finish_reason") or any(v for k, v in parts.items() if k != "role"):
            return True
    return False


def _error_event(
    document: dict[str, Any] | None, line: bytes, response: aiohttp.ClientResponse, endpoint: str
) -> Failure | None:
    if document is None:
        return None
    if document.get("id") == judge.GATEWAY_ERROR_ID:
        raw = RawAnswer(_OK, response.headers, line[len(_DATA) :].strip())
        return failures.of_abort(raw, endpoint)
    if not (document.get("error") or document.get("object") == "error"):
        return None
    complaint = Complaint.of(document)
    code = complaint.code or ""
    status = int(code) if code.isdigit() else 500
    raw = RawAnswer(status, response.headers, line[len(_DATA) :].strip())
    return failures.of_complaint(raw, complaint, status, endpoint)
