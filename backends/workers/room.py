"""Who gets the next free place, first come, first served."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence

from ..core.errors import ConfigurationError, FanfoldError, RunStoppedError
from .member import Place


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
