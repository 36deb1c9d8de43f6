"""WorkerPool: queue of shards over backends, requeue of lost ones."""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

from ..core.errors import (
    BackendError,
    ConfigurationError,
    FanfoldError,
    RunStoppedError,
    WorkerLostError,
)
from ..core.messages import ShardResult, ShardTask
from ..core.protocols import Backend, Stoppable
from .member import FirstWorkerTimer, Heartbeat, InFlightTask, PoolMember, PoolPolicy, TaskTimeout


class PoolDrainedError(FanfoldError):
    """No order is given out any more."""


class SlotQueue:
    """Hands out the room of several places.

    Args:
        places: The places.
    """

    def __init__(self, places: Sequence[PoolMember]) -> None:
        self._members = places
        self._waiting = deque[asyncio.Future[PoolMember]]()
        self._closed: FanfoldError | None = None

    async def acquire(self, *, at_front: bool = False) -> PoolMember:
        """Wait for a place with room, and take it.

        Args:
            at_front: Before everybody who waits: a shard that was lost.

        Raises:
            PoolDrainedError: No order is given out any more.
            RunStoppedError: No place is left, or no worker came.
            ConfigurationError: No place is left, and why.
        """
        turn: asyncio.Future[PoolMember] = asyncio.get_running_loop().create_future()
        if at_front:
            self._waiting.appendleft(turn)
        else:
            self._waiting.append(turn)
        self.assign()
        try:
            return await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled() and turn.exception() is None:
                turn.result().release()
            raise

    def assign(self) -> None:
        """Give the room that there is to those who wait longest."""
        while self._waiting:
            turn = self._waiting[0]
            if not turn.done():
                place = max(self._members, key=PoolMember.free_slots)
                if self._closed is not None:
                    turn.set_exception(type(self._closed)(self._closed.message))
                elif all(p.failure for p in self._members):
                    turn.set_exception(self._no_member_error())
                elif place.capacity_left() > 0:
                    place.acquire()
                    turn.set_result(place)
                else:
                    return
            self._waiting.popleft()

    def drain(self) -> None:
        """Give no room any more, and send those away who wait."""
        self.close(PoolDrainedError("the run is being stopped"))

    def close(self, reason: FanfoldError) -> None:
        """Give no room any more, and tell those why who wait and who come.

        Of several reasons the first one counts.
        """
        self._closed = self._closed or reason
        self.assign()

    def _no_member_error(self) -> FanfoldError:
        error = next(p.failure for p in self._members if p.failure)
        if isinstance(error, ConfigurationError):
            return ConfigurationError(error.message)
        return RunStoppedError(f"no place is left where shards can run: {error}")


logger = logging.getLogger(__name__)

MakeTask = Callable[[int], Awaitable[ShardTask | None]]
"""Makes the order of an attempt, what is finished meanwhile left out; None: nothing is left."""
RevokeTask = Callable[[int], Awaitable[None]]
"""Takes back the order of an attempt that counts as lost, should anybody still work on it."""

_UNBEGUN: Final = 4
"""A shard may be lost so many times more often if nobody had begun it."""


class WorkerPool:
    """Several places as one.

    A shard goes to the place with the most room. One that is lost goes on elsewhere; however
    late its first copy answers, that answer is not used.

    Args:
        backends: The places.
        policy: How patient to be.
    """

    def __init__(self, backends: Sequence[Backend], policy: PoolPolicy) -> None:
        self._policy = policy
        self._members = [PoolMember(backend, policy, self._assign_slots) for backend in backends]
        self._slots, self._first_worker = SlotQueue(self._members), FirstWorkerTimer(policy.queue_s)
        self._ticker: asyncio.Task[None] | None = None
        self._orphaned = dict[str, InFlightTask]()

    async def start(self) -> None:
        """Make all places ready; those that cannot be are tried again later, while one is.

        Raises:
            ConfigurationError: A place cannot be made ready, whatever is tried again.
            BackendError: No place is ready.
        """
        outcomes = await asyncio.gather(
            *(place.backend.start() for place in self._members), return_exceptions=True
        )
        errors = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for error in errors:
            if not isinstance(error, BackendError):
                raise error
        if len(errors) == len(self._members):
            raise errors[0]
        for error in errors:
            logger.warning("%s", error)
        for place in self._members:
            for shard, answer in (await place.backend.reattach()).items():
                watch = TaskTimeout(self._policy, None, place)
                self._orphaned[shard] = place.submit(shard, answer, watch)
        self._ticker = asyncio.create_task(self._poll_members())

    def capacity(self) -> int:
        """Return how many shards can be worked on at a time, now."""
        return sum(place.backend.capacity() for place in self._members)

    @property
    def in_flight(self) -> int:
        """Return how many orders are out."""
        return sum(place.used_slots for place in self._members)

    @property
    def orphaned(self) -> list[str]:
        """Return the shards that an earlier coordinator of the run left at the places."""
        return list(self._orphaned)

    async def adopt(self, shard: str) -> ShardResult | None:
        """Wait for a shard that an earlier coordinator ordered; None if it is lost."""
        try:
            return await self._orphaned.pop(shard).wait_result()
        except BackendError as error:
            logger.warning("shard %s, ordered in an earlier life: %s", shard, error.message)
            return None

    @property
    def silence_s(self) -> float:
        """Return after how many seconds of silence a worker counts as lost."""
        return self._policy.silence_s

    async def run(
        self,
        make_task: MakeTask,
        heartbeat: Callable[[int], Heartbeat | None],
        revoke: RevokeTask | None = None,
    ) -> tuple[ShardTask, ShardResult] | None:
        """Have a shard worked on, by as many orders as it takes.

        Args:
            make_task: Makes an order; called when there is room for it.
            heartbeat: Returns, for an attempt, what tells how long its worker has been silent; or
                None, where nothing can tell.
            revoke: Takes back the order of an attempt, where that can be done.

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
                place = await self._slots.acquire(at_front=attempt > 0)
            except PoolDrainedError:
                return None
            watch = TaskTimeout(self._policy, heartbeat(attempt), place)
            try:
                return await self._run_once(place, watch, make_task, attempt)
            except BackendError as error:
                if revoke is not None:
                    await revoke(attempt)
                # an order that no place took does not wear its shard out
                attempt += 1
                begun += watch.has_begun and isinstance(error, WorkerLostError)
                logger.warning("shard %s", error.message)
                if begun >= self._policy.attempts or attempt >= self._policy.attempts * _UNBEGUN:
                    msg = f"a shard was lost {attempt} times, the last time: {error.message}"
                    raise RunStoppedError(msg) from error

    async def _run_once(
        self, place: PoolMember, watch: TaskTimeout, make_task: MakeTask, attempt: int
    ) -> tuple[ShardTask, ShardResult] | None:
        try:
            order = await make_task(attempt)
        except BaseException:
            place.release()
            raise
        if order is None:
            place.release()
            return None
        self._first_worker.start()
        name = f"{order.shard}, attempt {attempt}"
        flight = place.submit(name, place.backend.submit(order.to_json()), watch, acquired=True)
        return order, await flight.wait_result()

    async def stop(self) -> None:
        """Give no order out any more, and ask the places that can to begin no further item."""
        self._slots.drain()
        backends = (place.backend for place in self._members)
        _log_errors(
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
        closing = (place.close(grace_s) for place in self._members)
        _log_errors(await asyncio.gather(*closing, return_exceptions=True))

    def _assign_slots(self) -> None:
        self._slots.assign()

    async def _poll_members(self) -> None:
        """Look after everybody at once: hundreds of shards that look for themselves cost more."""
        while True:
            await asyncio.sleep(self._policy.poll_s)
            if reason := self._first_worker.poll(self._members):
                self._slots.close(RunStoppedError(reason))
                for place in self._members:
                    place.mark_lost(reason)
            for place in self._members:
                place.poll()
            self._slots.assign()


def _log_errors(outcomes: Iterable[object]) -> None:
    for error in outcomes:
        if isinstance(error, Exception):
            logger.warning("%s", error)
