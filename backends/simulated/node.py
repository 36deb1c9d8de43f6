"""One simulated node: slots, queue, latency, jobs, counters."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import orjson

from ..core.parsing import read_message_text
from .engine import BLOCK_TOKENS, Engine, EngineDriver, EngineRequest, hash_blocks
from .requests import Question
from .responders import Answer, halve_answer
from .responses import (
    DISTORTIONS,
    DONE,
    Envelope,
    completion_body,
    encode_event,
    send_distorted,
    stream_end,
    stream_middle,
    stream_start,
)
from .server import Exchange
from .spec import SimulationSpec
from .values import BYTES_PER_TOKEN, ApiError, draw_normal, error_body


@dataclass(slots=True)
class NodeCounts:
    """Counters of one node.

    Attributes:
        requests: Completion requests that arrived, refused ones included.
        refused: Requests refused for their own fault or for a full queue, by status.
        finished: Answers sent, by finish reason.
        injected: Faults injected, by kind.
        disconnects: Clients that disconnected before their answer.
        prompt_tokens: Prompt tokens of the answers sent.
        completion_tokens: Output tokens of the answers sent.
        broken_tokens: Prompt and output tokens of sent answers that cannot be parsed.
        abandoned_tokens: Prompt and output tokens processed for clients that disconnected, or
            lost when the node died.
        running_max: Maximum of requests processed at once.
        waiting_max: Longest queue.
    """

    requests: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    disconnects: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    broken_tokens: int = 0
    abandoned_tokens: int = 0
    running_max: int = 0
    waiting_max: int = 0

    def to_mapping(self) -> dict[str, Any]:
        """Return the counters as plain data for JSON."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {k: dict(v) if isinstance(v, Counter) else v for k, v in values.items()}


@dataclass(slots=True)
class QuestionStats:
    """Statistics of one question.

    Attributes:
        asked: Number of requests for it.
        served: Number of complete answers.
        tokens: Prompt and output tokens of these answers.
        first_s: Time of the first complete answer, in simulated seconds since the start.
        last_s: Time of the last complete answer.
    """

    asked: int = 0
    served: int = 0
    tokens: int = 0
    first_s: float | None = None
    last_s: float | None = None


class QuestionLog:
    """Statistics of all questions by key: which were answered repeatedly, and what that wasted."""

    def __init__(self) -> None:
        self._questions: dict[bytes, QuestionStats] = {}
        self._wasted = 0

    def record_arrival(self, key: bytes) -> int:
        """Record an arrival; return the number of earlier arrivals of the question."""
        serving = self._questions.get(key)
        if serving is None:
            serving = self._questions[key] = QuestionStats()
        serving.asked += 1
        return serving.asked - 1

    def record_answer(self, key: bytes, tokens: int, now: float) -> None:
        """Record a complete answer.

        Args:
            key: The question's key.
            tokens: Prompt and output tokens.
            now: Simulated seconds since the start.
        """
        serving = self._questions.setdefault(key, QuestionStats())
        if serving.served:
            self._wasted += tokens
        else:
            serving.first_s = now
        serving.served += 1
        serving.tokens += tokens
        serving.last_s = now

    def summary(self) -> dict[str, int]:
        """Return totals: distinct questions, answers, duplicates, tokens wasted on duplicates."""
        served = sum(serving.served for serving in self._questions.values())
        answered = sum(serving.served > 0 for serving in self._questions.values())
        return {
            "distinct": len(self._questions),
            "answered": answered,
            "served": served,
            "duplicates": served - answered,
            "wasted_tokens": self._wasted,
        }

    def by_key(self) -> dict[str, dict[str, Any]]:
        """Return the statistics of every question, by its key in hexadecimal."""
        return {
            key.hex(): {name: getattr(serving, name) for name in QuestionStats.__slots__}
            for key, serving in self._questions.items()
        }

    def clear(self) -> None:
        """Delete all statistics."""
        self._questions.clear()
        self._wasted = 0


def _make_queue_error(limit: int) -> ApiError:
    text = (
        "The engine is currently busy and cannot accept new requests: the limit of "
        f"{limit} queued requests is reached. Please try again later."
    )
    return ApiError(text, 503, "Service Unavailable")


class NodeWork(Protocol):
    """Request that a node processes."""

    def start(self) -> None:
        """Start processing: a slot is free."""
        ...

    def make_engine_request(self) -> EngineRequest:
        """Return the request as an engine processes it, which reports its progress to it."""
        ...


class Node:
    """Model server with a number of slots; first in, first out.

    Args:
        index: The node's number.
        slots: Requests processed at once (``max_num_seqs``).
        queue_limit: Longest queue, or None.
        speed: Factor on the speed.
    """

    def __init__(self, index: int, slots: int, queue_limit: int | None, speed: float) -> None:
        self.index = index
        self.slots = slots
        self.speed = speed
        self.alive = True
        self.arrivals = 0
        """Completion requests since the start; kept by a reset, unlike the counters."""
        self.counts = NodeCounts()
        self._queue_limit = queue_limit
        self._running: dict[NodeWork, None] = {}
        self._waiting: deque[NodeWork] = deque()

    @property
    def running(self) -> int:
        """Number of requests being processed."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Number of queued requests."""
        return len(self._waiting)

    @property
    def work(self) -> tuple[NodeWork, ...]:
        """All requests, running ones first."""
        return (*self._running, *self._waiting)

    def admit(self, work: NodeWork) -> None:
        """Accept a request: start or queue it.

        Raises:
            ApiError: 503: the queue is full.
        """
        if len(self._running) < self.slots:
            self._start(work)
        elif self._queue_limit is not None and len(self._waiting) >= self._queue_limit:
            raise _make_queue_error(self._queue_limit)
        else:
            self._waiting.append(work)
            self.counts.waiting_max = max(self.counts.waiting_max, len(self._waiting))

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use."""
        return self.running / self.slots

    @property
    def cache_hits(self) -> tuple[int, int] | None:
        """Prompt tokens looked up in the prefix cache, and those found; None without a cache."""
        return None

    def release(self, work: NodeWork) -> None:
        """Free the slot or queue position of a request that ended; start the next one."""
        if work not in self._running:
            self._waiting.remove(work)
            return
        del self._running[work]
        if self._waiting:
            self._start(self._waiting.popleft())

    def _start(self, work: NodeWork) -> None:
        self._running[work] = None
        self.counts.running_max = max(self.counts.running_max, len(self._running))
        work.start()


class EngineNode(Node):
    """Model server whose engine has a queue, a batch, KV blocks and a prefix cache.

    Args:
        index: The node's number.
        engine: Its engine.
        queue_limit: Longest queue, or None.
        speed: Seconds of the engine in one second.
    """

    def __init__(self, index: int, engine: Engine, queue_limit: int | None, speed: float) -> None:
        super().__init__(index, engine.spec.max_num_seqs, queue_limit, speed)
        self._engine = engine
        self._driver = EngineDriver(engine, speed)
        self._requests: dict[NodeWork, EngineRequest] = {}

    @property
    def running(self) -> int:
        """Number of requests in the batch."""
        return self._engine.running

    @property
    def waiting(self) -> int:
        """Number of queued requests."""
        return self._engine.waiting

    @property
    def work(self) -> tuple[NodeWork, ...]:
        """All requests, oldest first."""
        return tuple(self._requests)

    @property
    def kv_usage(self) -> float:
        """Share of the KV cache in use."""
        return self._engine.cache.in_use / self._engine.cache.blocks

    @property
    def cache_hits(self) -> tuple[int, int] | None:
        """Prompt tokens looked up in the prefix cache, and those found."""
        cache = self._engine.cache
        return BLOCK_TOKENS * cache.queries, BLOCK_TOKENS * cache.hits

    def admit(self, work: NodeWork) -> None:
        """Accept a request: its engine starts or queues it.

        Raises:
            ApiError: 503: the queue is full.
        """
        limit = self._queue_limit
        if limit is not None and self.running + self.waiting >= self.slots + limit:
            raise _make_queue_error(limit)
        request = self._requests[work] = work.make_engine_request()
        self._driver.submit(request)
        self.counts.running_max = max(self.counts.running_max, self.running)
        self.counts.waiting_max = max(self.counts.waiting_max, self.waiting)

    def release(self, work: NodeWork) -> None:
        """Remove a request that ended or is cancelled."""
        self._driver.cancel(self._requests.pop(work))


@dataclass(frozen=True, slots=True)
class Timing:
    """Real seconds from the start of processing of a request.

    Attributes:
        first_s: Until the first token.
        total_s: Until the last token.
    """

    first_s: float
    total_s: float


class LatencyModel:
    """Time to first token and per token, as set in the specification.

    ``first = ttft_s + prompt / prefill_rate``, then ``tpot_s * (1 + alpha * (running - 1) /
    slots)`` per output token; everything is multiplied by a log-normal factor and divided by the
    node's speed and by ``time_scale``. Time in the queue is added.

    Args:
        spec: The fleet's specification.
    """

    def __init__(self, spec: SimulationSpec) -> None:
        self._spec = spec

    def compute_timing(
        self, prompt: int, output: int, load: float, speed: float, key: tuple[object, ...]
    ) -> Timing:
        """Return the duration of one request.

        Args:
            prompt: Prompt tokens.
            output: Output tokens.
            load: Other requests running on the node, as a share of its slots.
            speed: The node's speed; 1 is that of the specification.
            key: Seed of the jitter.
        """
        spec = self._spec
        factor = 1.0 / (speed * spec.time_scale)
        if spec.jitter:
            factor *= math.exp(spec.jitter * draw_normal(spec.seed, "jitter", *key))
        first = spec.ttft_s + prompt / spec.prefill_rate
        return Timing(
            first_s=first * factor,
            total_s=(first + output * spec.tpot_s * (1 + spec.alpha * load)) * factor,
        )


@dataclass(slots=True, eq=False)
class CompletionJob:
    """One request that a node processes.

    Attributes:
        exchange: Receives the answer.
        node: The node that processes it.
        question: The question.
        answer: The answer to send.
        envelope: Metadata of the answer.
        fault: Kind of the injected fault, or ``""``.
        compute_timing: Returns the times once processing starts; None on a node with an engine.
        on_finished: Called with the job when the answer is sent; not if the client disconnected.
        speed: Factor on the speed of this request on a node with an engine, 1 at most: its answer
            is held back.
    """

    exchange: Exchange
    node: Node
    question: Question
    answer: Answer
    envelope: Envelope
    fault: str
    compute_timing: Callable[[], Timing] | None
    on_finished: Callable[[CompletionJob], None]
    speed: float = 1.0
    _timer: asyncio.TimerHandle | None = field(default=None, init=False)
    _begun: bool = field(default=False, init=False)
    _timing: Timing | None = field(default=None, init=False)
    _request: EngineRequest | None = field(default=None, init=False)
    _started: float = field(default=0.0, init=False)

    def submit(self) -> None:
        """Submit the job to its node.

        Raises:
            ApiError: 503: the node's queue is full.
        """
        self.node.admit(self)
        self.exchange.on_lost = self._on_client_lost

    def start(self) -> None:
        """Start processing; see `NodeWork`."""
        assert self.compute_timing is not None, "a node with an engine starts no timers"
        timing, loop = self.compute_timing(), asyncio.get_running_loop()
        self._timing, self._started = timing, loop.time()
        if self.question.stream and self.fault not in DISTORTIONS:
            self._timer = loop.call_later(timing.first_s, self._first, timing)
        else:
            self._timer = loop.call_later(timing.total_s, self._whole)

    def make_engine_request(self) -> EngineRequest:
        """Return the request for an engine; see `NodeWork`."""
        self._started = asyncio.get_running_loop().time()
        self._request = EngineRequest(
            hash_prompt(self.question.messages),
            self.question.prompt_tokens,
            max(1, self.answer.tokens),
            on_progress=self._on_progress,
        )
        return self._request

    def _on_progress(self, request: EngineRequest) -> None:
        """Send the beginning of a stream after the first token, and the rest after the last."""
        streamed = self.question.stream and self.fault not in DISTORTIONS
        if request.ended_at is None:
            if streamed:
                self._begin()
            return
        usage = self.envelope.usage
        if usage is not None and usage["prompt_tokens_details"] is not None:
            usage["prompt_tokens_details"] = {"cached_tokens": request.cached_tokens}
        loop, end = asyncio.get_running_loop(), self._last if streamed else self._whole
        if self.speed < 1:
            held_s = (1 / self.speed - 1) * (loop.time() - self._started)
            self._timer = loop.call_later(held_s, end)
        else:
            end()

    def abort(self) -> None:
        """End early, as a server during shutdown: half an answer, marked ``abort``."""
        self._stop()
        self.answer = halve_answer(self.answer)
        if self._begun or self.question.stream:
            self._last()
        else:
            self._whole()

    def crash(self) -> None:
        """End without an answer, as a server that dies: the client sees a reset."""
        self._stop()
        self.node.counts.abandoned_tokens += self._count_tokens_so_far()
        self.exchange.on_lost = None
        self.exchange.reset()
        self.node.release(self)

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()

    def _on_client_lost(self) -> None:
        self._stop()
        self.node.counts.disconnects += 1
        self.node.counts.abandoned_tokens += self._count_tokens_so_far()
        self.node.release(self)

    def _count_tokens_so_far(self) -> int:
        """Return the tokens processed so far; none while the request is queued."""
        if self._request is not None:
            return self.question.prompt_tokens if self._request.is_running else 0
        if self._timing is None:
            return 0
        seconds = asyncio.get_running_loop().time() - self._started - self._timing.first_s
        whole = max(self._timing.total_s - self._timing.first_s, 1e-9)
        share = min(1.0, max(0.0, seconds / whole))
        return self.question.prompt_tokens + int(share * self.answer.tokens)

    def _whole(self) -> None:
        send_distorted(self.exchange, completion_body(self.envelope, self.answer), self.fault)
        self._end()

    def _begin(self) -> None:
        self._begun = True
        self.exchange.begin()
        self.exchange.write(stream_start(self.envelope, self.answer))

    def _first(self, timing: Timing) -> None:
        self._begin()
        rest = timing.total_s - timing.first_s
        self._timer = asyncio.get_running_loop().call_later(rest, self._last)

    def _last(self) -> None:
        if not self._begun:
            self._begin()
        body = stream_middle(self.envelope, self.answer)
        match self.fault:
            case "stream_cut":
                self.exchange.write(body[: len(body) // 2] or b":")
                self.exchange.drop()
            case "stream_error":
                failure = error_body("Simulated engine failure.", "InternalServerError", 500)
                self._send(encode_event(orjson.Fragment(failure)) + DONE)
            case "stream_no_finish":
                self._send(body + DONE)
            case "stream_api_error":
                self._send(body + _gateway_error(self.envelope))
            case _:
                usage = self.question.include_usage and self.fault != "no_usage"
                self._send(body + stream_end(self.envelope, self.answer, usage))
        self._end()

    def _send(self, data: bytes) -> None:
        self.exchange.write(data)
        self.exchange.end()

    def _end(self) -> None:
        self.exchange.on_lost = None
        self.on_finished(self)
        self.node.release(self)


def hash_prompt(messages: Sequence[Mapping[str, Any]]) -> list[int]:
    """Return the keys of the full KV blocks of a conversation."""
    parts = (f"{message.get('role')}:{read_message_text(message)}" for message in messages)
    return hash_blocks("\n".join(parts), BLOCK_TOKENS * BYTES_PER_TOKEN)


def _gateway_error(envelope: Envelope) -> bytes:
    """Return the end of a FIRST gateway stream whose source failed: it looks successful."""
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
    return encode_event(chunk) + DONE
