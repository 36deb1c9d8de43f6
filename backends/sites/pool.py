"""Shards over places: pulled by free capacity, watched, and sent elsewhere when lost."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass

from ..contract.errors import RunStoppedError, SiteError
from ..contract.protocols import Backend
from ..contract.types import Json
from ..contract.wire import Order, Summary

logger = logging.getLogger(__name__)

_POLL_S = 0.25


@dataclass(frozen=True, slots=True)
class PoolPolicy:
    """How patient a pool is.

    Attributes:
        attempts: Most orders for one shard.
        deadline_s: Seconds after its first sign of life until a shard counts as lost.
        silence_s: Seconds without a sign of life until a shard that gave one counts as lost.
        rebuild_s: Pause before a broken place is rebuilt, doubled at each further time.
    """

    attempts: int = 3
    deadline_s: float = 7200.0
    silence_s: float = 120.0
    rebuild_s: float = 1.0


class Watch:
    """Tells when a shard last gave a sign of life.

    Args:
        beat: Returns the time of the last sign (monotonic seconds), or None before the first.
    """

    def __init__(self, policy: PoolPolicy, beat: Callable[[], float | None]) -> None:
        self._policy, self._beat = policy, beat
        self._first: float | None = None

    def verdict(self) -> str | None:
        """Return why the shard counts as lost, or None."""
        last, now = self._beat(), time.monotonic()
        if last is None:
            return None  # it may still wait in a queue, for hours on a busy machine
        self._first = self._first or last
        if now - last > self._policy.silence_s:
            return f"no sign of life for {now - last:.0f} s"
        if now - self._first > self._policy.deadline_s:
            return f"not finished {self._policy.deadline_s:.0f} s after it began"
        return None


class ShardPool:
    """Several places as one.

    A shard goes to the place with the most room. One that is lost goes on elsewhere; however
    late its first copy answers, it is counted once.

    Args:
        backends: The places.
        policy: How patient to be.
    """

    def __init__(self, backends: Sequence[Backend], policy: PoolPolicy) -> None:
        self._places = [_Place(backend, policy) for backend in backends]
        self._policy = policy
        self._freed = asyncio.Event()

    async def start(self) -> None:
        """Make all places ready; those that cannot be are left out while one is.

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
            logger.warning("%s", error.message)
        if len(errors) == len(self._places):
            raise errors[0]

    def capacity(self) -> int:
        """Return how many shards can be worked on at a time, now."""
        return sum(place.backend.capacity() for place in self._places)

    async def run(
        self,
        make: Callable[[int], Awaitable[Order | None]],
        beat: Callable[[int], Callable[[], float | None]],
    ) -> tuple[Order, Summary] | None:
        """Have a shard worked on, by as many orders as it takes.

        Args:
            make: Makes the order of an attempt, what is finished meanwhile left out; None when
                nothing is left.
            beat: Returns, for an attempt, what tells its last sign of life.

        Raises:
            RunStoppedError: The shard was lost as often as the policy allows.

        Returns:
            The order that was answered, and the worker's summary; None when nothing was left.
        """
        reasons, name = list[str](), "?"
        for attempt in range(self._policy.attempts):
            order = await make(attempt)
            if order is None:
                return None
            name = order.shard
            try:
                return order, await self._once(order, Watch(self._policy, beat(attempt)))
            except SiteError as error:
                reasons.append(error.message)
                logger.warning("shard %s, attempt %d: %s", order.shard, attempt, error.message)
        msg = f"shard {name} was lost {len(reasons)} times, the last time: {reasons[-1]}"
        raise RunStoppedError(msg)

    async def _once(self, order: Order, watch: Watch) -> Summary:
        place = await self._room()
        task = asyncio.ensure_future(place.backend.submit(order.to_json()))
        try:
            return Summary.from_json(await self._watched(task, watch))
        except SiteError:
            await place.mend()
            raise
        finally:
            place.busy -= 1
            self._freed.set()

    async def _room(self) -> _Place:
        """Wait for a place with room, and take it."""
        while True:
            place = max(self._places, key=_Place.room)
            if place.room() > 0:
                place.busy += 1
                return place
            self._freed.clear()
            with suppress(TimeoutError):  # capacity also changes without a word to us
                await asyncio.wait_for(self._freed.wait(), _POLL_S)

    async def _watched(
        self, task: asyncio.Future[dict[str, Json]], watch: Watch
    ) -> dict[str, Json]:
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_POLL_S)
                reason = watch.verdict()
                if reason is not None and not task.done():
                    raise SiteError(f"a worker is lost: {reason}")
            return task.result()
        finally:
            if not task.done():
                task.cancel()

    async def close(self, grace_s: float = 10.0) -> None:
        """Close all places within ``grace_s``."""
        await asyncio.gather(*(place.backend.close(grace_s) for place in self._places))


class _Place:
    """A backend, what it has in hand, and its mending."""

    def __init__(self, backend: Backend, policy: PoolPolicy) -> None:
        self.backend, self.busy = backend, 0
        self._policy = policy
        self._mending = asyncio.Lock()
        self._failures = 0

    def room(self) -> int:
        """Return how many more shards it can take."""
        return self.backend.capacity() - self.busy

    async def mend(self) -> None:
        """Rebuild the place if it is broken; one at a time, others wait for it."""
        async with self._mending:
            if self.backend.capacity() > 0:
                return
            pause = self._policy.rebuild_s * 2.0 ** min(self._failures, 6)
            self._failures += 1
            await asyncio.sleep(pause)
            await self.backend.rebuild()
