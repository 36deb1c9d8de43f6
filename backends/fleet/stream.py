"""An answer that is read token by token (server-sent events).

Servers differ. One that ignores ``stream`` sends the whole completion as JSON; others send it as
one event, with ``message`` in place of ``delta``. Both are answers, and are passed on as the events
that a client expects.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import aiohttp
import orjson

from ..core.errors import EndpointError, EndpointLostError
from ..core.values import cut_levels, read_json
from . import failures, judge
from .answer import Complaint, RawAnswer
from .failures import Failure
from .transport import BodyReader

_OK: Final = 200
_DATA: Final = b"data:"
_DONE: Final = b"data: [DONE]"
_MARK: Final = b"\xef\xbb\xbf"
"""A byte order mark, which may stand before the first line."""
_FIELDS: Final = (b"data:", b"event:", b"id:", b"retry:", b":")
"""What a line of an event stream begins with."""

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
        is_empty: Whether the answer has ended and says nothing.
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
        self._spoken = False
        self._ended = set[str]()
        self.headers = {key.lower(): value for key, value in reader.response.headers.items()}
        self.headers["content-type"] = "text/event-stream"
        self.is_empty = False
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
            sent = response.request_info.headers
            raw = RawAnswer(response.status, response.headers, await reader.read(), sent)
            return failures.of_answer(raw.masked(), endpoint)
        head: list[bytes] = []
        started = False
        while line := await reader.read_line():
            if not started:
                line = line.removeprefix(_MARK)
                if line.strip() and not line.startswith(_FIELDS):
                    return await cls._of_document(reader, line, endpoint, silence_s, watch)
            started = started or bool(line.strip())
            head.append(line)
            try:
                chunk = _decode(line) if line.startswith(_DATA) else None
                failure = _error_event(chunk, line, response, endpoint)
            except ValueError:
                chunk, failure = None, failures.of_event(endpoint)
            if failure is not None:
                response.close()
                return failure
            said, reason = _says_something(chunk), _reason(chunk)
            if said or reason:
                stream = cls(reader, head, endpoint, silence_s, watch)
                stream.is_empty = not said and reason == "stop"
                return stream
            if line.startswith(_DONE):
                break
        if started:
            response.close()
            return failures.of_end(endpoint)
        raw = RawAnswer(response.status, response.headers, b"")
        return failures.of_reply(raw, "the stream held nothing", endpoint)

    @classmethod
    async def _of_document(
        cls, reader: BodyReader, first: bytes, endpoint: str, silence_s: float, watch: Watch
    ) -> OpenStream | Failure:
        """Take a body that is no event stream for the whole answer, or say why it is none."""
        response = reader.response
        lines = [first]
        while line := await reader.read_line():
            lines.append(line)
        raw = RawAnswer(
            response.status, response.headers, b"".join(lines), response.request_info.headers
        )
        document = judge.read(raw, endpoint)
        if isinstance(document, Failure):
            return document
        events = [_event(chunk) for chunk in _chunks_of(document)]
        events.append(_DONE + b"\n\n")
        stream = cls(reader, events, endpoint, silence_s, watch)
        stream.is_empty = judge.is_empty(document)
        return stream

    async def drain(self) -> None:
        """Read what is left of an answer that nobody is waiting for, so that its usage is known."""
        try:
            async for _ in self.lines():
                pass
        except EndpointLostError:
            return  # it is counted as lost

    async def lines(self) -> AsyncIterator[bytes]:
        """Yield the stream's events, and close it at the end.

        Raises:
            EndpointLostError: The stream was cut or fell silent.
        """
        try:
            for line in self._head:
                if event := self._look(line):
                    yield event
            while self._open and (line := await self._next()):
                if event := self._look(line):
                    yield event
            self._check_end()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._failure = failures.of_exception(
                error, self._endpoint, self._response.request_info.headers
            )
            raise _begun(self._failure) from error
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
            raise _begun(self._failure)

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
        """Note model, fingerprint, usage and the end as they pass; return a line's event."""
        if line.startswith(_DONE):
            # Readers stop here, so that what is missing must be told here.
            self._check_end()
            return _DONE + b"\n\n"
        if line.startswith(_DATA):
            try:
                chunk = _decode(line)
            except ValueError:
                self._failure = failures.of_event(self._endpoint)
                raise _begun(self._failure) from None
            if chunk is None:
                return b""  # a sign of life, and no part of an answer
            for key in ("model", "system_fingerprint", "usage"):
                if chunk.get(key):
                    self._summary[key] = chunk[key]
            if failure := _error_event(chunk, line, self._response, self._endpoint):
                self._failure = failure
                if isinstance(answer := failure.error.__cause__, RawAnswer):
                    chunk = _decode(_DATA + answer.body) or chunk  # without the key
            choices = chunk.get("choices") or [{}]
            reason = choices[0].get("finish_reason")
            self._end_once(choices)
            if isinstance(reason, str) and reason in judge.ABORTED:
                self._failure = failures.of_end(self._endpoint)
            elif reason:
                self._summary["finished"] = True
            if _is_whole(choices):
                self._summary["finished"] = True
                return b"".join(_event(one) for one in _chunks_of(chunk, self._spoken))
            self._spoken = self._spoken or bool(choices[0].get("delta"))
            return _event(chunk)
        return b""  # of an event, readers need no more than its data

    def _end_once(self, choices: list[dict[str, Any]]) -> None:
        """Drop a reason for the end that is told again: LangChain joins them to one text."""
        for choice in choices:
            if choice.get("finish_reason"):
                index = str(choice.get("index"))
                if index in self._ended:
                    choice["finish_reason"] = None
                self._ended.add(index)


def _begun(failure: Failure) -> EndpointError:
    """Return a failure's error, which came when a part of the answer was read."""
    if isinstance(failure.error, EndpointLostError):
        failure.error.begun = True
    return failure.error


def _event(document: Mapping[str, Any]) -> bytes:
    return _DATA + b" " + orjson.dumps(document) + b"\n\n"


def _chunks_of(document: Mapping[str, Any], spoken: bool = False) -> Iterator[dict[str, Any]]:
    """Return the events by which a whole completion is streamed.

    Args:
        document: The completion.
        spoken: Whether its text has come before, token by token.
    """
    head = {**document, "object": "chat.completion.chunk"}
    usage = head.pop("usage", None)
    choices = []
    for choice in (one for one in document["choices"] if isinstance(one, dict)):
        rest = {key: value for key, value in choice.items() if key not in {"message", "delta"}}
        message = dict(choice.get("message") or {})
        if calls := message.get("tool_calls"):
            message["tool_calls"] = [{"index": n, **call} for n, call in enumerate(calls)]
        choices.append({"index": 0, **rest, "delta": {} if spoken else message})
    yield {**head, "choices": choices}
    if usage:
        yield {**head, "choices": [], "usage": usage}


def _decode(line: bytes) -> dict[str, Any] | None:
    """Return what an event holds, its fields made plain; None if it is no object.

    Raises:
        ValueError: It cannot be read.
    """
    data = line[len(_DATA) :].strip()
    if not data.startswith(b"{"):
        return None
    try:
        document: dict[str, Any] = read_json(data)
    except RecursionError as error:
        raise ValueError(str(error)) from None
    choices = document.get("choices")
    if isinstance(choices, list) and _is_whole(choices):
        judge.make_plain(document)
    else:
        judge.make_plain_chunk(document)
    cut_levels(data, document)
    return document


def _is_whole(choices: Sequence[Any]) -> bool:
    """Tell whether an event holds the whole message in place of a part of it."""
    first = next((one for one in choices if isinstance(one, dict)), {})
    return isinstance(first.get("message"), dict) and not first.get("delta")


def _says_something(chunk: Mapping[str, Any] | None) -> bool:
    """Tell whether an event brings a token, a call or a refusal."""
    if chunk is None:
        return False
    for choice in chunk.get("choices") or ():
        said = choice.get("delta") or choice.get("message")
        if isinstance(said, dict) and any(map(said.get, judge.SAID)):
            return True
    return False


def _reason(chunk: Mapping[str, Any] | None) -> Any:
    """Return the reason that an event names for the end of the answer, or None."""
    choices = (chunk or {}).get("choices") or ()
    return next((c["finish_reason"] for c in choices if c.get("finish_reason")), None)


def _error_event(
    document: dict[str, Any] | None, line: bytes, response: aiohttp.ClientResponse, endpoint: str
) -> Failure | None:
    if document is None:
        return None
    if document.get("id") == judge.GATEWAY_ERROR_ID:
        return failures.of_abort(_line_answer(line, _OK, response), endpoint)
    if not (document.get("error") or document.get("object") == "error"):
        return None
    raw = _line_answer(line, 500, response)
    complaint = Complaint.of(read_json(raw.body))
    code = complaint.code or ""
    raw.status = int(code) if code.isdigit() else 500
    return failures.of_complaint(raw, complaint, raw.status, endpoint)


def _line_answer(line: bytes, status: int, response: aiohttp.ClientResponse) -> RawAnswer:
    """Return an event as if it were an answer, without the request's keys."""
    body = line[len(_DATA) :].strip()
    return RawAnswer(status, response.headers, body, response.request_info.headers).masked()
