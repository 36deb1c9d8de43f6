"""One agent of Academy as a place where shards run."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, Any, Final

from ...core.errors import ConfigurationError, SiteError
from ...core.types import Json
from ..process import OneProcess
from .hall import Hall
from .parcel import pack, unpack

if TYPE_CHECKING:
    from .hand import Hand

_END_S: Final = 2.0
_BURY_S: Final = 5.0
_LATE_S: Final = 10.0
"""So long is an agent waited for, at the start, when another has answered."""


class AcademyBackend:
    """A place that an agent holds; when the agent dies, a new one takes it.

    Args:
        hall: What it has in common with the run's other agents.
        name: What messages call it.
        queue_s: Seconds that an agent may wait for its executor.
    """

    def __init__(self, hall: Hall, name: str, queue_s: float) -> None:
        self.name = name
        self._hall, self._queue_s = hall, queue_s
        self._hand: Hand | None = None
        self._inside = False

    def capacity(self) -> int:
        """Return the agent's slots; none while it is not up."""
        return self._hall.slots if self._hand is not None and self._hand.up else 0

    async def start(self) -> None:
        """Launch the agent and wait for it, or a while only if another is up already.

        Raises:
            SiteError: It ended at once, or the exchange does not answer.
            ConfigurationError: It can never work.
        """
        if not self._inside:
            await self._hall.enter()
            self._inside = True
        if self._hand is None or self._hand.lost.done():
            self._hand = await self._hall.launch(self.name)
        others = asyncio.ensure_future(self._hall.somebody.wait())
        try:
            await self._wait(self._hand, self._queue_s, others)
        finally:
            others.cancel()
        await self._wait(self._hand, _LATE_S)
        await self._check(self._hand)

    @staticmethod
    async def _wait(hand: Hand, seconds: float, *others: asyncio.Future[Any]) -> None:
        events: set[asyncio.Future[Any]] = {hand.arrived, hand.lost, *others}
        await asyncio.wait(events, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)

    async def _check(self, hand: Hand) -> None:
        """Note that an agent is up; one that is still on its way is no error.

        Raises:
            SiteError: The agent is lost.
            ConfigurationError: It cannot import what it needs.
        """
        if hand.up:
            self._hall.somebody.set()
        elif hand.lost.done():
            await asyncio.wait({hand.ended}, timeout=_END_S)  # it may say more
            msg = f"{self.name}: {hand.error or hand.lost.result()}"
            if isinstance(hand.error, ImportError | AttributeError):
                msg += "; install fanfold[academy] where agents run"
                raise ConfigurationError(msg) from hand.error
            raise SiteError(msg)

    async def submit(self, order: dict[str, Json]) -> dict[str, Json]:
        """Have one order worked on.

        Raises:
            WorkerLostError: The agent died.
            SiteError: No agent is up here.
            ConfigurationError: The order is larger than the exchange carries.
        """
        hand = self._hand
        if hand is None or not hand.up:
            raise SiteError(f"{self.name}: not started, or its agent is dead")
        parcel = await asyncio.to_thread(pack, order)
        most = self._hall.at.carries
        if most is not None and len(parcel) > most:
            msg = (
                f"{self.name}: an order takes {len(parcel):,} bytes and {self._hall.at.place} "
                f"carries {most:,}; set shard.items, or use backend.exchange.kind: redis"
            )
            raise ConfigurationError(msg)
        return await asyncio.to_thread(unpack, await hand.work_on(parcel))

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        """Return nothing: agents end with their coordinator."""
        return {}

    async def rebuild(self) -> None:
        """Wait for an agent that is on its way; else dismiss it and launch a new one.

        Raises:
            SiteError: No agent came.
            ConfigurationError: None can ever come.
        """
        hand = self._hand
        if hand is not None and (hand.up or hand.lost.done()):
            if hand.lost.done() and not isinstance(hand.executor, OneProcess):
                # it may be about to end, with an error, and to free its worker
                await asyncio.wait({hand.ended}, timeout=_BURY_S)
            await hand.dismiss(0.0)
            self._hand = None  # not before: closing must still find it
            await self._hall.bury(hand)
        if self._hand is None:
            await self.start()
            return
        await self._wait(self._hand, self._queue_s)
        await self._check(self._hand)
        if not self._hand.up:
            raise SiteError(f"{self.name}: no agent has come in {self._queue_s:.0f} s")

    async def stop(self) -> None:
        """Ask the agent to begin no further item."""
        if self._hand is not None:
            await self._hand.stop()

    async def close(self, grace_s: float = 10.0) -> None:
        """Dismiss the agent within ``grace_s`` and a little more."""
        hand, self._hand = self._hand, None
        if hand is not None:
            await hand.dismiss(grace_s)
        if self._inside:
            self._inside = False
            await self._hall.leave()
