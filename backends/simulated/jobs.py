"""A request from its admission to its last byte."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import orjson

from .answering import Answer, partial
from .errors import error_body
from .latency import Timing
from .node import Node
from .refusals import DISTORTIONS, distort
from .requests import Question
from .responses import DONE, Envelope, closing, completion_body, event, middle, opening
from .server import Exchange


@dataclass(slots=True, eq=False)
class Job:
    """One request that a node works on.

    Attributes:
        exchange: Where the answer goes.
        node: The node that works on it.
        question: What is asked.
        answer: What will be said.
        envelope: What surrounds the answer.
        fault: Kind of the fault that struck, or ``""``.
        clock: Gives the times once the work starts.
        finished: Called with the job when the answer is sent; not when the client left.
    """

    exchange: Exchange
    node: Node
    question: Question
    answer: Answer
    envelope: Envelope
    fault: str
    clock: Callable[[], Timing]
    finished: Callable[[Job], None]
    _timer: asyncio.TimerHandle | None = field(default=None, init=False)
    _begun: bool = field(default=False, init=False)
    _timing: Timing | None = field(default=None, init=False)
    _started: float = field(default=0.0, init=False)

    def submit(self) -> None:
        """Hand the job to its node.

        Raises:
            ApiError: 503: the node's queue is full.
        """
        self.node.admit(self)
        self.exchange.on_lost = self._left

    def start(self) -> None:
        """Begin the work; see `node.Work`."""
        timing, loop = self.clock(), asyncio.get_running_loop()
        self._timing, self._started = timing, loop.time()
        if self.question.stream and self.fault not in DISTORTIONS:
            self._timer = loop.call_later(timing.first_s, self._first, timing)
        else:
            self._timer = loop.call_later(timing.total_s, self._whole)

    def abort(self) -> None:
        """End early, as a server does that is told to stop: half an answer, marked ``abort``."""
        self._stop()
        self.answer = partial(self.answer)
        if self._begun or self.question.stream:
            self._last()
        else:
            self._whole()

    def crash(self) -> None:
        """End without an answer, as a server does that dies: the client sees a reset."""
        self._stop()
        self.node.counts.abandoned_tokens += self._written()
        self.exchange.on_lost = None
        self.exchange.reset()
        self.node.release(self)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _left(self) -> None:
        self._stop()
        self.node.counts.disconnects += 1
        self.node.counts.abandoned_tokens += self._written()
        self.node.release(self)

    def _written(self) -> int:
        """Return the tokens read and written so far; none while the request is queued."""
        if self._timing is None:
            return 0
        seconds = asyncio.get_running_loop().time() - self._started - self._timing.first_s
        whole = max(self._timing.total_s - self._timing.first_s, 1e-9)
        share = min(1.0, max(0.0, seconds / whole))
        return self.question.prompt_tokens + int(share * self.answer.tokens)

    def _whole(self) -> None:
        distort(self.exchange, completion_body(self.envelope, self.answer), self.fault)
        self._end()

    def _first(self, timing: Timing) -> None:
        self._begun = True
        self.exchange.begin()
        self.exchange.write(opening(self.envelope, self.answer))
        rest = timing.total_s - timing.first_s
        self._timer = asyncio.get_running_loop().call_later(rest, self._last)

    def _last(self) -> None:
        if not self._begun:
            self.exchange.begin()
            self.exchange.write(opening(self.envelope, self.answer))
        body = middle(self.envelope, self.answer)
        match self.fault:
            case "stream_cut":
                self.exchange.write(body[: len(body) // 2] or b":")
                self.exchange.drop()
            case "stream_error":
                failure = error_body("Simulated engine failure.", "InternalServerError", 500)
                self._send(event(orjson.Fragment(failure)) + DONE)
            case "stream_no_finish":
                self._send(body + DONE)
            case "stream_api_error":
                self._send(body + _gateway_error(self.envelope))
            case _:
                usage = self.question.include_usage and self.fault != "no_usage"
                self._send(body + closing(self.envelope, self.answer, usage))
        self._end()

    def _send(self, data: bytes) -> None:
        self.exchange.write(data)
        self.exchange.end()

    def _end(self) -> None:
        self.exchange.on_lost = None
        self.finished(self)
        self.node.release(self)


def _gateway_error(envelope: Envelope) -> bytes:
    """Return how the FIRST gateway ends a stream whose source failed: as if all were well."""
    choice = {
        "index": 0,
        "delta": {"content": "\n\n[ERROR] Error: the endpoint failed."},
        "finish_reason": "stop",
    }
    chunk = {
        "id": "chatcmpl-api-error",
        "object": "chat.completion.chunk",
        "created": envelope.created,
        "model": envelope.model,
        "choices": [choice],
    }
    return event(chunk) + DONE
