"""Protocols between folders, and the log of an item's calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from .types import Json, Message, Reply, Usage


@runtime_checkable
class ChatModel(Protocol):
    """Something that answers chat messages: the fleet, by its lower or its LangChain door."""

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Answer one conversation.

        Args:
            messages: Chat messages in OpenAI's form, oldest first.

        Returns:
            The reply as it came; its content and finish reason are for the caller to judge.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: Asking on is hopeless for every item.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """A place where shards run. It carries JSON there and back and knows nothing else.

    Relied upon: one summary per order, or an error, or nothing at all. Not relied upon: order,
    exactly-once, cancellation, types of remote exceptions.
    """

    @property
    def name(self) -> str:
        """Return what messages call it."""
        ...

    def capacity(self) -> int:
        """Return how many shards it can work on at a time, now."""
        ...

    async def start(self) -> None:
        """Make it ready.

        Raises:
            ConfigurationError: It cannot be, whatever is tried again.
            BackendError: It could not be this time.
        """
        ...

    async def submit(self, order: dict[str, Json]) -> dict[str, Json]:
        """Have one order worked on, once.

        Returns:
            The worker's summary.

        Raises:
            WorkerLostError: The worker or the connection to it died; others may live.
            BackendError: The place itself is down; :meth:`rebuild` may help.
        """
        ...

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        """Return, by shard, what an earlier coordinator of the run left here; often nothing."""
        ...

    async def rebuild(self) -> None:
        """Throw what is broken away and make it ready anew."""
        ...

    async def close(self, grace_s: float = 10.0) -> None:
        """Give everything back within ``grace_s``, whatever still runs."""
        ...


@runtime_checkable
class Stoppable(Protocol):
    """A backend that can tell its workers to stop; others rely on the run folder's stop file."""

    async def stop(self) -> None:
        """Ask the workers to begin no further item; their summaries come as ever."""
        ...


PromptCounter: TypeAlias = Callable[[Mapping[str, Any]], Awaitable[int | None]]
"""Counts the tokens of a request's prompt as the model does; None when nobody can."""


class Reservation(Protocol):
    """What is reserved for one request; the first of the three that is called ends it."""

    def settle(self, usage: Usage) -> None:
        """Take what an answer used, and give the rest back; all of it if it does not say."""
        ...

    def settle_all(self) -> Usage:
        """Take all of it: the request may have been paid, and its answer is lost.

        Returns:
            The tokens that it was reserved for.
        """
        ...

    def release(self, *, sent: bool) -> None:
        """Give it back: nothing was read; a request that was sent counts all the same."""
        ...


class Account(Protocol):
    """What one item may spend."""

    @property
    def waiting(self) -> int:
        """Calls of the item that wait for the budget."""
        ...

    async def reserve(
        self, most: Usage, body: Mapping[str, Any], log: CallLog | None = None
    ) -> Reservation:
        """Reserve what one request may cost, waiting for what others may give back.

        Args:
            most: The most tokens that it may use.
            body: The request, to be counted better when room is scarce.
            log: The item's calls: whether its reservations can be given back while it waits.

        Raises:
            BudgetExhaustedError: What is left does not carry it, and nobody gives anything back.
        """
        ...

    def try_reserve(self, most: Usage) -> Reservation | None:
        """Reserve what one request may cost if there is room at once."""
        ...

    def close(self) -> None:
        """Give back what no request has taken; the item has ended."""
        ...


class UsageSink(Protocol):
    """Who was asked, and is told in the end what it was good for."""

    def add_useful(self, usage: Usage) -> None:
        """Count tokens of answers that count."""
        ...


class EndpointQueue(Protocol):
    """Where calls wait for an endpoint."""

    @property
    def is_deadlocked(self) -> bool:
        """Whether all requests in flight are streams that nobody reads, and no time helps."""
        ...


@dataclass(slots=True)
class EndpointUsage:
    """What one endpoint did for an item.

    Attributes:
        endpoint: Its label.
        model: Model's name in its last answer; None: it gave none.
        requests: Requests that it was sent.
        usage: Tokens over all of its answers.
        lost: The most tokens of requests that may have been paid and brought no answer.
        useful: Tokens of its answers that count; known when the item has ended.
        sink: Who is told that.
    """

    endpoint: str
    sink: UsageSink
    model: str | None = None
    requests: int = 0
    usage: Usage = field(default_factory=Usage)
    lost: Usage = field(default_factory=Usage)
    useful: Usage = field(default_factory=Usage)


@dataclass(slots=True)
class CallLog:
    """The calls of one item.

    Attributes:
        requests: Requests sent, failed ones and retries included.
        usage: Tokens over all answers.
        endpoint: Label of the endpoint that answered last, or that failed last.
        model: Model's name in the last answer.
        simulated: Whether the last answer came from a simulated fleet.
        lost: The most tokens of requests that may have been paid and brought no answer.
        useful: Tokens of the answer that counts; None: of all answers.
        useful_endpoint: Label of the endpoint that gave this answer.
        account: What the item may spend; None is no limit.
        reused: Answers taken from earlier requests, which cost nothing.
        usage_by_endpoint: What each endpoint did, by its label.
        attempts: The first requests, as the item's record tells them.
        calls: Calls that the fleet has begun and not ended; a stream's call ends with its first
            token.
        following: Those of them that wait for the answer to an equal request.
        loop: Where the last one runs.
        in_flight: Requests in flight.
        idle_streams: Those of them that are streams and are not read at the moment.
        queued: Calls that wait for an endpoint, or for what other items' calls show of one.
        queue: Where they wait.
        streams: What closes the streams that are open, by the stream.
        counted: Whether the fleet has counted the item as answered.
    """

    requests: int = 0
    usage: Usage = field(default_factory=Usage)
    endpoint: str | None = None
    model: str | None = None
    simulated: bool | None = None
    lost: Usage = field(default_factory=Usage)
    useful: Usage | None = None
    useful_endpoint: str | None = None
    account: Account | None = None
    reused: int = 0
    usage_by_endpoint: dict[str, EndpointUsage] = field(default_factory=dict, compare=False)
    attempts: list[dict[str, Any]] = field(default_factory=list, compare=False)
    calls: int = field(default=0, compare=False)
    following: int = field(default=0, compare=False)
    loop: asyncio.AbstractEventLoop | None = field(default=None, compare=False, repr=False)
    in_flight: int = field(default=0, compare=False)
    idle_streams: int = field(default=0, compare=False)
    queued: int = field(default=0, compare=False)
    queue: EndpointQueue | None = field(default=None, compare=False, repr=False)
    streams: dict[object, Callable[[], None]] | None = field(
        default=None, compare=False, repr=False
    )

    counted: bool = field(default=False, compare=False)

    @property
    def stalled(self) -> bool:
        """Whether no request of the item goes on by itself: its streams wait for the item."""
        return self.in_flight == self.idle_streams

    @property
    def blocked(self) -> bool:
        """Whether a synchronous call of any item blocks the loop in which this one runs."""
        return self.loop in BLOCKED_LOOPS

    @property
    def goes_on(self) -> bool:
        """Whether a call of the item goes on by itself: it waits for no other item."""
        if not self.stalled:
            return True
        waits = 0 if self.account is None else self.account.waiting
        if self.calls > waits + self.following + self.queued:
            return True
        return self.queued > 0 and (self.queue is None or not self.queue.is_deadlocked)

    def get_endpoint_usage(self, endpoint: str, sink: UsageSink) -> EndpointUsage:
        """Return what an endpoint does for the item.

        Args:
            endpoint: Its label.
            sink: Is told what was useful.
        """
        share = self.usage_by_endpoint.get(endpoint)
        if share is None:
            share = self.usage_by_endpoint[endpoint] = EndpointUsage(endpoint, sink)
        return share

    def begin_attempt(self, endpoint: str) -> dict[str, Any] | None:
        """Note that a request is sent; return what is known of it, None after the first ones.

        Args:
            endpoint: The endpoint's label.
        """
        if len(self.attempts) >= MAX_ATTEMPT_RECORDS:
            return None
        start = time.time_ns() // 1_000_000 / 1000
        attempt = {"endpoint": endpoint, "start": start, "seconds": None, "outcome": None}
        self.attempts.append(attempt)
        return attempt

    def close_streams(self) -> None:
        """Close the streams that the item has left open: an error's traceback may keep them."""
        for close in tuple((self.streams or {}).values()):
            close()

    def close(self, *, done: bool) -> None:
        """Settle which tokens were useful; the item has ended.

        Args:
            done: Whether it has an answer.
        """
        if not done:
            return
        for share in self.usage_by_endpoint.values():
            if self.useful is None:
                share.useful = share.usage
            elif share.endpoint == self.useful_endpoint:
                share.useful = self.useful
            else:
                continue
            share.sink.add_useful(share.useful)


MAX_ATTEMPT_RECORDS: Final = 8
"""So many requests of an item are told one by one in its record."""

BLOCKED_LOOPS: Final[set[asyncio.AbstractEventLoop | None]] = set()
"""Loops that wait for a synchronous call: nothing in them goes on before it has ended."""

CURRENT_CALLS: Final[ContextVar[CallLog | None]] = ContextVar("fanfold_calls", default=None)
