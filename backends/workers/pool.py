"""WorkerPool: queue of shards over backends, requeue of lost ones."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

from ..core.errors import (
    ConfigurationError,
    FanfoldError,
    RunStoppedError,
    SiteError,
    WorkerLostError,
)
from ..core.messages import Order, Summary
from ..core.protocols import Backend, Stoppable
from .member import Arrival, Beat, Flight, Place, PoolPolicy, Watch


class PoolDrainedError(FanfoldError):
    """No order is given out any more."""


class Room:
    """Hands out the room of several places.

    Args:
        places: The places.
    """

    def __init__(self, places: Sequence[Place]) -> None:
        self._places = places
        self._waiting = deque[asyncio.Future[Place]]()
        self._closed: FanfoldError | None = None

    async def enter(self, *, ahead: bool = False) -> Place:
        """Wait for a place with room, and take it.

        Args:
            ahead: Before everybody who waits: a shard that was lost.

        Raises:
            PoolDrainedError: No order is given out any more.
            RunStoppedError: No place is left, or no worker came.
            ConfigurationError: No place is left, and why.
        """
        turn: asyncio.Future[Place] = asyncio.get_running_loop().create_future()
        if ahead:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        self.hand_out()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                turn.result().release()
            raise

    def hand_out(self) -> None:
        """Give the room that there is to those who wait longest."""
        while self._waiting:
            turn = self._waiting[0]
            if not turn.done():
                place = max(self._places, key=Place.idle)
                if self._closed is not None:
                    turn.set_exception(type(self._closed)(self._closed.message))
                elif all(p.given_up for p in self._places):
                    turn.set_exception(self._nowhere())
                elif place.room() > 0:
                    place.take()
                    turn.set_result(place)
                else:
                    return
            self._waiting.popleft()

    def drain(self) -> None:
        """Give no room any more, and send those away who wait."""
        self.refuse(PoolDrainedError("the run is being stopped"))

    def refuse(self, reason: FanfoldError) -> None:
        """Give no room any more, and tell those why who wait and who come.

        Of several reasons the first one counts.
        """
        self._closed = self._closed or reason
        self.hand_out()

    def _nowhere(self) -> FanfoldError:
        error = next(p.given_up for p in self._places if p.given_up)
        if isinstance(error, ConfigurationError):
            return ConfigurationError(error.message)
        return RunStoppedError(f"no place is left where shards can run: {error}")


logger = logging.getLogger(__name__)

MakeOrder = Callable[[int], Awaitable[Order | None]]
"""Makes the order of an attempt, what is finished meanwhile left out; None: nothing is left."""
Withdraw = Callable[[int], Awaitable[None]]
"""Takes back the order of an attempt that counts as lost, should anybody still work on it."""

_UNBEGUN: Final = 4
"""A shard may be lost so many times more often if nobody had begun it."""


class ShardPool:
    """Several places as one.

    A shard goes to the place with the most room. One that is lost goes on elsewhere; however
    late its first copy answers, that answer is not used.

    Args:
        backends: The places.
        policy: How patient to be.
    """

    def __init__(self, backends: Sequence[Backend], policy: PoolPolicy) -> None:
        self._policy = policy
        self._places = [Place(backend, policy, self._changed) for backend in backends]
        self._room, self._arrival = Room(self._places), Arrival(policy.queue_s)
        self._ticker: asyncio.Task[None] | None = None
        self._left = dict[str, Flight]()

    async def start(self) -> None:
        """Make all places ready; those that cannot be are tried again later, while one is.

        Raises:
            ConfigurationError: A place cannot be made ready, whatever is tried again.
            SiteError: No place is ready.
        """
        outcomes = await asyncio.gather(
            *(place.backend.start() for place in self._places), return_exceptions=True
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for error in errors:
            if not isinstance(error, SiteError):
                raise error
        if len(errors) == len(self._places):
            raise errors[0]
        for error in errors:
            logger.warning("%s", error)
        for place in self._places:
            for shard, answer in (await place.backend.reattach()).items():
                watch = Watch(self._policy, None, place)
                self._left[shard] = place.fly(shard, answer, watch)
        self._ticker = asyncio.create_task(self._tick())

    def capacity(self) -> int:
        """Return how many shards can be worked on at a time, now."""
        return sum(place.backend.capacity() for place in self._places)

    @property
    def out(self) -> int:
        """Return how many orders are out."""
        return sum(place.busy for place in self._places)

    @property
    def left(self) -> list[str]:
        """Return the shards that an earlier coordinator of the run left at the places."""
        return list(self._left)

    async def take_over(self, shard: str) -> Summary | None:
        """Wait for a shard that an earlier coordinator ordered; None if it is lost."""
        try:
            return await self._left.pop(shard).summary()
        except SiteError as error:
            logger.warning("shard %s, ordered in an earlier life: %s", shard, error.message)
            return None

    @property
    def silence_s(self) -> float:
        """Return after how many seconds of silence a worker counts as lost."""
        return self._policy.silence_s

    async def run(
        self,
        make: MakeOrder,
        beat: Callable[[int], Beat | None],
        withdraw: Withdraw | None = None,
    ) -> tuple[Order, Summary] | None:
        """Have a shard worked on, by as many orders as it takes.

        Args:
            make: Makes an order; called when there is room for it.
            beat: Returns, for an attempt, what tells how long its worker has been silent; or
                None, where nothing can tell.
            withdraw: Takes back the order of an attempt, where that can be done.

        Raises:
            RunStoppedError: The shard was lost as often as the policy allows, no place is left,
                or no worker has come.
            ConfigurationError: A place or a worker cannot do its work, whatever is tried again.

        Returns:
            The order that was answered, and the worker's summary; None when nothing was left to
            order, or the pool was stopped before anybody had the shard.
        """
        begun = attempt = 0
        while True:
            try:
                place = await self._room.enter(ahead=attempt > 0)
            except PoolDrainedError:
                return None
            watch = Watch(self._policy, beat(attempt), place)
            try:
                return await self._once(place, watch, make, attempt)
            except SiteError as error:
                if withdraw is not None:
                    await withdraw(attempt)
                # an order that no place took does not wear its shard out
                attempt += 1
                begun += watch.begun and isinstance(error, WorkerLostError)
                logger.warning("shard %s", error.message)
                if begun >= self._policy.attempts or attempt >= self._policy.attempts * _UNBEGUN:
                    msg = f"a shard was lost {attempt} times, the last time: {error.message}"
                    raise RunStoppedError(msg) from error

    async def _once(
        self, place: Place, watch: Watch, make: MakeOrder, attempt: int
    ) -> tuple[Order, Summary] | None:
        try:
            order = await make(attempt)
        except BaseException:
            place.release()
            raise
        if order is None:
            place.release()
            return None
        self._arrival.sent()
        name = f"{order.shard}, attempt {attempt}"
        flight = place.fly(name, place.backend.submit(order.to_json()), watch, taken=True)
        return order, await flight.summary()

    async def stop(self) -> None:
        """Give no order out any more, and ask the places that can to begin no further item."""
        self._room.drain()
        backends = (place.backend for place in self._places)
        _tell(
            await asyncio.gather(
                *(backend.stop() for backend in backends if isinstance(backend, Stoppable)),
                return_exceptions=True,
            )
        )

    async def close(self, grace_s: float = 10.0) -> None:
        """Close all places within ``grace_s`` and a little more."""
        if self._ticker is not None:
            self._ticker.cancel()
            with suppress(asyncio.CancelledError):
                await self._ticker
        closing = (place.close(grace_s) for place in self._places)
        _tell(await asyncio.gather(*closing, return_exceptions=True))

    def _changed(self) -> None:
        self._room.hand_out()

    async def _tick(self) -> None:
        """Look after everybody at once: hundreds of shards that look for themselves cost more."""
        while True:
            await asyncio.sleep(self._policy.tick_s)
            if reason := self._arrival.look(self._places):
                self._room.refuse(RunStoppedError(reason))
                for place in self._places:
                    place.lose(reason)
            for place in self._places:
                place.look()
            self._room.hand_out()


def _tell(outcomes: Iterable[object]) -> None:
    for error in outcomes:
        if isinstance(error, Exception):
            logger.warning("%s", error)
