"""One backend of the pool: tasks in flight, timeouts, first-worker watch, rebuild."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final, Protocol

from ..core.errors import ConfigurationError, FanfoldError, SiteError, WorkerLostError
from ..core.messages import Summary
from ..core.protocols import Backend
from ..core.types import Json

logger = logging.getLogger(__name__)

_TELL_S: Final = 60.0
_TELL_MOST_S: Final = 3600.0


class Hearing(Protocol):
    """A place that may have been heard of."""

    @property
    def busy(self) -> int:
        """Return how many orders it has."""
        ...

    @property
    def heard(self) -> bool:
        """Say whether a worker there has begun or answered."""
        ...


class Arrival:
    """Looks out for the first worker of all, and tells what is waited for until it comes.

    Args:
        queue_s: Seconds to wait for it.
        clock: Returns the time in seconds, of a clock that never goes back.
    """

    def __init__(self, queue_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._queue_s, self._clock = queue_s, clock
        self._since: float | None = None
        self._tell_s = _TELL_S
        self._over = False

    def sent(self) -> None:
        """Note that an order goes out: from the first one on somebody is waited for."""
        if self._since is None:
            self._since = self._clock()

    def look(self, places: Sequence[Hearing]) -> str | None:
        """Return, once, why nobody is waited for any longer; else None."""
        if self._over or self._since is None:
            return None
        orders = sum(place.busy for place in places)
        if orders == 0:
            self._since = None
            return None
        if any(place.heard for place in places):
            self._over = True
            return None
        return self._waited(self._clock() - self._since, orders)

    def _waited(self, seconds: float, orders: int) -> str | None:
        said = f"no worker has been heard of in the {seconds:.0f} s since the first order"
        if seconds > self._queue_s:
            self._over = True
            return (
                f"{said} (backend.queue_s); see whether workers were started, and what the engine "
                "says of them"
            )
        if seconds >= self._tell_s:
            self._tell_s += min(self._tell_s, _TELL_MOST_S)
            logger.warning(
                "%s (%d are out): workers may still start or wait in a batch system's queue; the "
                "run waits for %.0f s in all (backend.queue_s)",
                said,
                orders,
                self._queue_s,
            )
        return None


Beat = Callable[[], float | None]
"""Returns for how many seconds a worker has been silent, or None before its first sign of life."""


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """How patient a pool is.

    Attributes:
        attempts: Most orders for one shard that were begun.
        deadline_s: Seconds after its first sign of life until an order counts as lost.
        silence_s: Seconds without a sign of life until an order that gave one counts as lost.
        queue_s: Seconds that an order may wait before it begins, besides those in which the ones
            before it are worked on.
        ahead: Orders that a worker holds: the one in work and those that wait for it.
        rebuild_s: Pause before a broken place is rebuilt, doubled at each further time.
        tick_s: Seconds between two looks at what is out.
    """

    attempts: int = 3
    deadline_s: float = 7200.0
    silence_s: float = 120.0
    queue_s: float = 86400.0
    ahead: int = 2
    rebuild_s: float = 1.0
    tick_s: float = 0.5


class Answering(Protocol):
    """A place that has answered before, or not yet."""

    @property
    def answered(self) -> float | None:
        """Return when it last answered (monotonic seconds)."""
        ...


class Watch:
    """Tells whether an order is lost.

    Without signs of life the clock starts when the place answers something else: before that the
    order may wait in a batch system's queue.

    Args:
        policy: How patient to be.
        beat: Tells how long the worker has been silent; None where nothing can tell.
        place: Where the order went.
    """

    def __init__(self, policy: PoolPolicy, beat: Beat | None, place: Answering) -> None:
        self._policy, self._beat, self._place = policy, beat, place
        self._ordered = time.monotonic()
        self._first: float | None = None

    @property
    def begun(self) -> bool:
        """Say whether a worker had begun, as far as anybody can tell."""
        return self._beat is None or self.heard

    @property
    def heard(self) -> bool:
        """Say whether its worker has given a sign of life."""
        return self._beat is not None and self._beat() is not None

    def verdict(self) -> str | None:
        """Return why the order counts as lost, or None."""
        now, policy = time.monotonic(), self._policy
        silent = self._beat() if self._beat is not None else None
        if silent is not None:
            self._first = self._first or now
            if silent > policy.silence_s:
                return f"no sign of life for {silent:.0f} s"
        elif self._beat is None and self._first is None:
            answered = self._place.answered
            self._first = answered if answered and answered > self._ordered else None
        if self._first is not None and now - self._first > policy.deadline_s:
            return f"not finished {policy.deadline_s:.0f} s after it began"
        waited = now - max(self._ordered, self._place.answered or 0.0)
        if self._first is None and waited > policy.queue_s + (policy.ahead - 1) * policy.deadline_s:
            return f"not begun {waited:.0f} s after it was sent, or its place last answered"
        return None


_CLOSE_S: Final = 10.0
"""Seconds that a backend may take to close beyond what it was given."""


class Place:
    """A backend as the pool sees it.

    Args:
        backend: The backend.
        policy: How patient to be.
        changed: Called when there may be room.

    Attributes:
        busy: Room taken: orders that are out, those that count as lost but still occupy their
            worker included.
        answered: When it last answered (monotonic seconds), or None.
        given_up: Why nothing is expected of it any more, or None.
    """

    def __init__(self, backend: Backend, policy: PoolPolicy, changed: Callable[[], None]) -> None:
        self.backend, self.busy = backend, 0
        self.answered: float | None = None
        self.given_up: FanfoldError | None = None
        self._policy, self._changed = policy, changed
        self._flights = set[Flight]()
        self._mending: asyncio.Task[None] | None = None
        self._failures = 0

    def idle(self) -> int:
        """Return how many workers have nothing to do; negative where orders wait for them."""
        return self.backend.capacity() - self.busy if self.room() > 0 else -(10**9)

    def room(self) -> int:
        """Return how many more orders it can take."""
        if self._mending is not None:
            return 0
        return self.backend.capacity() * self._policy.ahead - self.busy

    @property
    def heard(self) -> bool:
        """Say whether a worker here has begun or answered."""
        return self.answered is not None or any(flight.heard for flight in self._flights)

    def take(self) -> None:
        """Take room for one order."""
        self.busy += 1

    def release(self) -> None:
        """Give room back that no order went to."""
        self.busy -= 1
        self._changed()

    def fly(
        self, name: str, answer: Awaitable[dict[str, Json]], watch: Watch, *, taken: bool = False
    ) -> Flight:
        """Send an order, or watch one that was sent before.

        Args:
            name: What messages call it.
            answer: The backend's answer.
            watch: Tells whether it is lost.
            taken: Whether room was taken for it.
        """
        if not taken:
            self.take()
        flight = Flight(name, answer, watch, self._landed)
        self._flights.add(flight)
        return flight

    def _landed(self, flight: Flight) -> None:
        if flight not in self._flights:
            return  # it was left behind when the place was rebuilt
        self._flights.discard(flight)
        if flight.succeeded:
            self.answered, self._failures = time.monotonic(), 0
        self.release()  # the pool looks after a place that is broken: not once per answer

    def look(self) -> None:
        """Look after what is out, and begin to mend what is broken."""
        for flight in self._flights:
            flight.look()
        lost = sum(flight.is_lost for flight in self._flights)
        capacity = self.backend.capacity()
        if capacity <= lost and self._mending is None and self.given_up is None:
            self._mending = asyncio.create_task(self._mend())
            self._mending.add_done_callback(self._mended)

    def lose(self, reason: str) -> None:
        """Declare all that is out lost."""
        for flight in self._flights:
            flight.lose(reason)

    async def _mend(self) -> None:
        """Rebuild the place; what it still holds is lost."""
        for _ in range(self._policy.attempts):
            await asyncio.sleep(self._policy.rebuild_s * 2.0 ** min(self._failures, 6))
            self._failures += 1
            self._leave_behind()
            try:
                return await self.backend.rebuild()
            except ConfigurationError:
                raise
            except SiteError as error:
                logger.warning("%s", error.message)
                last = error
        raise last

    def _mended(self, task: asyncio.Task[None]) -> None:
        self._mending = None
        error = None if task.cancelled() else task.exception()
        if error is not None:
            known = isinstance(error, FanfoldError)
            text = f"{self.backend.name}: cannot be rebuilt: {type(error).__name__}: {error}"
            self.given_up = error if known else SiteError(text)  # type: ignore[assignment]
            logger.warning("%s", self.given_up)
        self._changed()

    def _leave_behind(self) -> None:
        left, self._flights = self._flights, set()
        self.busy -= len(left)
        for flight in left:
            flight.lose("its place broke down", SiteError)
            flight.abandon()

    async def close(self, grace_s: float) -> None:
        """Close the backend within ``grace_s`` and a little more."""
        if self._mending is not None:
            self._mending.cancel()
            with suppress(asyncio.CancelledError, SiteError, ConfigurationError):
                await self._mending
        self._leave_behind()
        try:
            await asyncio.wait_for(self.backend.close(grace_s), grace_s + _CLOSE_S)
        except TimeoutError:
            msg = f"{self.backend.name}: could not be closed in {grace_s + _CLOSE_S:.0f} s"
            raise SiteError(msg) from None


class Flight:
    """An order that is out.

    Whoever waits for it may go: the room stays taken until the backend answers.

    Args:
        name: What messages call it.
        answer: The backend's answer.
        watch: Tells whether it is lost.
        landed: Called when the backend has answered, however late.
    """

    def __init__(
        self,
        name: str,
        answer: Awaitable[dict[str, Json]],
        watch: Watch,
        landed: Callable[[Flight], None],
    ) -> None:
        self.name = name
        self._watch, self._landed = watch, landed
        self._lost: asyncio.Future[SiteError] = asyncio.get_running_loop().create_future()
        self._answer = asyncio.ensure_future(answer)
        self._answer.add_done_callback(self._answered)

    def _answered(self, answer: asyncio.Future[dict[str, Json]]) -> None:
        if not answer.cancelled():
            answer.exception()  # nobody may be waiting for it any more
        self._landed(self)

    @property
    def succeeded(self) -> bool:
        """Say whether the backend gave an answer."""
        answer = self._answer
        return answer.done() and not answer.cancelled() and answer.exception() is None

    @property
    def is_lost(self) -> bool:
        """Say whether nobody waits for it any more, though it was not answered."""
        return self._lost.done()

    @property
    def heard(self) -> bool:
        """Say whether its worker has given a sign of life."""
        return self._watch.heard

    def look(self) -> None:
        """Declare it lost if it is."""
        if not self._lost.done() and (reason := self._watch.verdict()):
            self.lose(reason)

    def lose(self, reason: str, kind: type[SiteError] = WorkerLostError) -> None:
        """Declare it lost, with its worker or else with its place."""
        if not self._lost.done():
            self._lost.set_result(kind(f"{self.name}: {reason}"))

    def abandon(self) -> None:
        """Break off waiting for the backend."""
        self._answer.cancel()

    async def summary(self) -> Summary:
        """Wait for the worker's summary.

        Raises:
            WorkerLostError: Its worker is lost.
            SiteError: The place failed.
            ConfigurationError: The worker or the place cannot do its work.
        """
        either: set[asyncio.Future[Any]] = {self._answer, self._lost}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if self._lost.done():
            raise self._lost.result()
        try:
            return Summary.from_json(self._answer.result())
        except SiteError as error:
            raise type(error)(f"{self.name}: {error.message}") from error
        except asyncio.CancelledError:
            raise WorkerLostError(f"{self.name}: the backend broke it off") from None
