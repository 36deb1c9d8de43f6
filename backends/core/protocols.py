"""Protocols between folders, and the log of an item's calls."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, TypeAlias, runtime_checkable

from .types import Json, Message, Reply, Usage


@runtime_checkable
class ChatModel(Protocol):
    """A client that answers chat messages: ``FleetClient`` or ``LangChainClient``."""

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Answer one conversation.

        Args:
            messages: Chat messages in OpenAI's form, oldest first.

        Returns:
            The reply as it came; the caller checks its content and finish reason.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: No item can succeed any more.
        """
        ...


class CompletionClient(Protocol):
    """A client that sends whole requests: ``FleetClient``."""

    @property
    def model(self) -> str:
        """Return the model's name."""
        ...

    async def complete(self, body: Mapping[str, Json]) -> tuple[dict[str, Json], Reply]:
        """Send one request as it is.

        Args:
            body: The request; ``model`` is replaced by the model's name. ``URL_FIELD`` names the
                URL of a request that does not ask for a chat completion.

        Returns:
            The answer as the server sent it, and what it says.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: No item can succeed any more.
        """
        ...


@runtime_checkable
class Backend(Protocol):
    """Runs shards: it carries JSON messages to workers and back, and depends on nothing else.

    Guaranteed: one shard result per shard task, or an error, or nothing at all. Not guaranteed:
    order, exactly-once delivery, cancellation, types of remote exceptions.
    """

    @property
    def name(self) -> str:
        """Return the name for messages."""
        ...

    def capacity(self) -> int:
        """Return how many shards it can run at a time, now."""
        ...

    async def start(self) -> None:
        """Make the backend ready.

        Raises:
            ConfigurationError: It cannot start, and a retry does not help.
            BackendError: It could not start this time.
        """
        ...

    async def submit(self, task: dict[str, Json]) -> dict[str, Json]:
        """Run one shard task, once.

        Returns:
            The worker's shard result.

        Raises:
            WorkerLostError: The worker or the connection to it died; others may still work.
            BackendError: The backend itself is down; :meth:`rebuild` may help.
        """
        ...

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        """Return, by shard, results of tasks that an earlier coordinator left here; often empty."""
        ...

    async def rebuild(self) -> None:
        """Discard broken parts and make the backend ready again."""
        ...

    async def close(self, grace_s: float = 10.0) -> None:
        """Release everything within ``grace_s``, even if tasks still run."""
        ...


@runtime_checkable
class Stoppable(Protocol):
    """A backend that can signal its workers to stop; others rely on the run folder's stop file."""

    async def stop(self) -> None:
        """Ask the workers to start no more items; their results arrive as usual."""
        ...


@runtime_checkable
class TaskLogger(Protocol):
    """A backend that logs its tasks in the run folder, so that a later coordinator finds them."""

    async def open_log(self, folder: Path) -> None:
        """Log the tasks of another run from now on; ``reattach`` returns those left in its log.

        Args:
            folder: The folder of the run.

        Raises:
            JournalError: The log is damaged.
        """
        ...

    async def close_log(self) -> None:
        """Write what is left to log: the run has ended.

        Raises:
            JournalError: It cannot be written.
        """
        ...


@runtime_checkable
class ResultKeeper(Protocol):
    """A backend that keeps results which arrive after their tasks were counted as lost."""

    async def collect(self, shard: str) -> dict[str, Json] | None:
        """Return the result of a task of the shard that was counted as lost, or None."""
        ...


PromptCounter: TypeAlias = Callable[[Mapping[str, Any]], Awaitable[int | None]]
"""Counts the tokens of a request's prompt as the model does; None if no counter is available."""


class Reservation(Protocol):
    """The amount reserved for one request; the first call of one of its methods ends it."""

    @property
    def usage(self) -> Usage:
        """Return the most tokens that the request may use, as it is sent."""
        ...

    def settle(self, usage: Usage) -> None:
        """Charge what an answer used, and release the rest; charge all if the usage is unknown."""
        ...

    def settle_all(self) -> Usage:
        """Charge all of it: the request may have been paid, and its answer is lost.

        Returns:
            The tokens that were reserved.
        """
        ...

    def release(self, *, sent: bool) -> None:
        """Release it: nothing was read; a request that was sent still counts."""
        ...


class Account(Protocol):
    """The budget of one item."""

    @property
    def waiting(self) -> int:
        """Return the number of the item's calls that wait for the budget."""
        ...

    async def reserve(
        self,
        most: Usage,
        body: Mapping[str, Any],
        log: CallLog | None = None,
        *,
        shorten: bool = False,
    ) -> Reservation:
        """Reserve the maximum cost of one request, waiting for amounts that others may release.

        Args:
            most: The most tokens that it may use.
            body: The request, to be counted more exactly if the budget is scarce.
            log: The item's calls: whether its reservations can be released while it waits.
            shorten: Whether a scarce budget may reserve a shorter answer, by those that it has
                seen; the request must then be sent with that limit.

        Raises:
            BudgetExhaustedError: The remaining budget does not cover it, and no other call will
                release any.
        """
        ...

    def try_reserve(self, most: Usage) -> Reservation | None:
        """Reserve the maximum cost of one request if the budget covers it at once."""
        ...

    def close(self) -> None:
        """Release unused reservations; the item has ended."""
        ...


class UsageSink(Protocol):
    """Receives the tokens that turned out to be useful."""

    def add_useful(self, usage: Usage) -> None:
        """Count tokens of answers that were used."""
        ...


class EndpointQueue(Protocol):
    """A queue of calls that wait for an endpoint."""

    @property
    def is_deadlocked(self) -> bool:
        """Return True if all requests in flight are unread streams, and time does not help."""
        ...

    @property
    def has_endpoint(self) -> bool:
        """Return True if an endpoint is alive and does not pause for long."""
        ...


@dataclass(slots=True)
class EndpointUsage:
    """Usage of one endpoint by an item.

    Attributes:
        endpoint: Its label.
        model: Model's name in its last answer; None: it gave none.
        requests: Requests sent to it.
        usage: Tokens over all of its answers.
        lost: The most tokens of requests that may have been paid and brought no answer.
        useful: Tokens of its answers that were used; known when the item has ended.
        sink: Receives the useful tokens.
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
        index: Index of the item; None outside a run.
        sample: Number of the item among the samples of its row, from 0.
        requests: Requests sent, failed ones and retries included.
        usage: Tokens over all answers.
        endpoint: Label of the endpoint that answered last, or that failed last.
        model: Model's name in the last answer.
        simulated: Whether the last answer came from a simulated fleet.
        lost: The most tokens of requests that may have been paid and brought no answer.
        useful: Tokens of the answer that was used; None: of all answers.
        useful_endpoint: Label of the endpoint that gave this answer.
        kept: Tokens of earlier answers that were used too, by endpoint.
        keeps_answers: Whether the answers are stored until the item has ended.
        account: The item's budget; None is no limit.
        reused: Answers taken from earlier requests, at no cost.
        usage_by_endpoint: Usage of each endpoint, by its label.
        attempts: The first requests, as they appear in the item's record.
        calls: Calls that the fleet has started and not ended; a stream's call ends with its first
            token.
        following: Those of them that wait for the answer to an equal request.
        loop: The loop of the last call.
        in_flight: Requests in flight.
        sent: Bodies of the requests that were sent and have no known end, by request.
        idle_streams: Those of them that are streams and are not being read.
        queued: Calls that wait for an endpoint, or for other items' calls to show whether one
            works.
        queue: Where they wait.
        streams: Functions that close the open streams, by stream.
        max_tokens: Longest answer in tokens that the last accepted request was sent with, if known.
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
    sent: dict[object, Mapping[str, Any]] = field(default_factory=dict, compare=False, repr=False)
    idle_streams: int = field(default=0, compare=False)
    queued: int = field(default=0, compare=False)
    queue: EndpointQueue | None = field(default=None, compare=False, repr=False)
    streams: dict[object, Callable[[], None]] | None = field(
        default=None, compare=False, repr=False
    )

    counted: bool = field(default=False, compare=False)
    kept: dict[str | None, Usage] = field(default_factory=dict, compare=False)
    keeps_answers: bool = field(default=False, compare=False)
    index: int | None = field(default=None, compare=False)
    sample: int = field(default=0, compare=False)
    max_tokens: int | None = field(default=None, compare=False)

    @property
    def stalled(self) -> bool:
        """Return True if no request of the item progresses on its own: its streams are not read."""
        return self.in_flight == self.idle_streams

    @property
    def waits_in_vain(self) -> bool:
        """Return True if no request of the item is in flight, and no endpoint accepts any soon."""
        waits = self.calls > self.following and self.in_flight == 0
        return waits and self.queue is not None and not self.queue.has_endpoint

    @property
    def blocked(self) -> bool:
        """Return True if a synchronous call of any item blocks the loop in which this one runs."""
        return self.loop in BLOCKED_LOOPS

    @property
    def goes_on(self) -> bool:
        """Return True if a call of the item progresses without waiting for another item."""
        if not self.stalled:
            return True
        waits = 0 if self.account is None else self.account.waiting
        if self.calls > waits + self.following + self.queued:
            return True
        return self.queued > 0 and (self.queue is None or not self.queue.is_deadlocked)

    def get_endpoint_usage(self, endpoint: str, sink: UsageSink) -> EndpointUsage:
        """Return the item's usage of an endpoint.

        Args:
            endpoint: Its label.
            sink: Receives the useful tokens.
        """
        usage = self.usage_by_endpoint.get(endpoint)
        if usage is None:
            usage = self.usage_by_endpoint[endpoint] = EndpointUsage(endpoint, sink)
        return usage

    def begin_attempt(self, endpoint: str) -> dict[str, Any] | None:
        """Record that a request is sent; return its record, None after the first ones.

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
        """Close the streams that the item left open: an error's traceback may keep them alive."""
        for close in tuple((self.streams or {}).values()):
            close()

    def keep_answer(self) -> None:
        """Record that the last answer is used, and that others follow."""
        if self.useful is not None:
            before = self.kept.get(self.useful_endpoint)
            used = self.useful if before is None else before + self.useful
            self.kept[self.useful_endpoint], self.useful = used, Usage(0, 0)

    def close(self, *, done: bool) -> None:
        """Record which tokens were useful; the item has ended.

        Args:
            done: Whether it has an answer.
        """
        if not done:
            return
        if self.useful is not None:
            self.keep_answer()
        for one in self.usage_by_endpoint.values():
            if self.useful is None:
                one.useful = one.usage
            elif one.endpoint in self.kept:
                one.useful = self.kept[one.endpoint]
            else:
                continue
            one.sink.add_useful(one.useful)


MAX_ATTEMPT_RECORDS: Final = 8
"""Limit of requests of an item that its record lists one by one."""

BLOCKED_LOOPS: Final[set[asyncio.AbstractEventLoop | None]] = set()
"""Loops that wait for a synchronous call: nothing in them runs until it has ended."""

CURRENT_CALLS: Final[ContextVar[CallLog | None]] = ContextVar("fanfold_calls", default=None)
