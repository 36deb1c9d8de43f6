"""The agent: it works on orders that its coordinator sends. Needs the extra ``academy``."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from academy.agent import Agent, action, loop
from academy.exchange.mailbox_status import MailboxStatus
from academy.identifier import EntityId
from academy.logging.configs.base import LogConfig

from ...core.process import Scratch
from ...core.types import Json
from ..executor import WorkShard, in_thread
from .parcel import pack, unpack

_OVER: Final = frozenset({MailboxStatus.TERMINATED, MailboxStatus.MISSING})


@dataclass(frozen=True, slots=True)
class Duty:
    """What an agent is told when it is launched.

    Attributes:
        work: What works on an order: an importable function.
        slots: Orders that it works on at a time; more wait in it.
        owner: The coordinator's mailbox; None where agents cannot look after it.
        pause_s: Seconds between two looks after the coordinator.
    """

    work: WorkShard
    slots: int
    owner: EntityId | None
    pause_s: float


class ShardAgent(Agent):
    """Works on orders in threads of their own, so that its heartbeat goes on.

    What it takes and gives is one JSON text each; an order's failure comes as data within.

    Args:
        duty: What it is told.
    """

    def __init__(self, duty: Duty) -> None:
        super().__init__()
        self._duty = duty
        self._slots = asyncio.Semaphore(duty.slots)
        self._running, self._leaving = set[object](), False
        self._scratch: Scratch | None = None

    async def agent_on_startup(self) -> None:
        """Make room for what tells orders without a stop file of their own to stop."""
        self._scratch = await asyncio.to_thread(Scratch, "agent")

    @action
    async def work_on(self, parcel: str) -> str:
        """Work on one order and return its summary, both packed."""
        async with self._slots:
            order = await asyncio.to_thread(unpack, parcel)
            if order.get("stop_file") is None:  # nobody shares a folder with us
                order["stop_file"] = str(self._stop)
            found = list[dict[str, Json]]()
            # in a thread that holds up neither the agent's end nor the process's
            await in_thread(lambda: found.append(self._worked_on(order)))
            return await asyncio.to_thread(pack, found[0])

    def _worked_on(self, order: dict[str, Json]) -> dict[str, Json]:
        mine = object()
        self._running.add(mine)
        try:
            return self._duty.work(order)
        finally:
            self._running.discard(mine)
            if self._leaving and not self._running:
                self._tidy()

    @property
    def _stop(self) -> Path:
        assert self._scratch is not None, "an agent that has not started takes no orders"
        return self._scratch.path / "stop"

    def _tidy(self) -> None:
        """Remove the stop file once nobody looks at it; a later agent does if this one cannot."""
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    @action
    async def stop(self) -> None:
        """Begin no further item of orders that bring no stop file of their own."""
        await asyncio.to_thread(self._stop.touch)

    @loop
    async def look_after_owner(self, shutdown: asyncio.Event) -> None:
        """End when the coordinator has gone, however it went, or has ended our mailbox."""
        status, missed = self.agent_exchange_client.status, 0
        while not shutdown.is_set():
            found = [await status(self.agent_id)]  # Academy would only stop listening
            if self._duty.owner is not None:
                found.append(await status(self._duty.owner))
                missed = 0 if found[-1] is MailboxStatus.ACTIVE else missed + 1
            if missed > 1 or _OVER.intersection(found):
                self.agent_shutdown()
            with suppress(TimeoutError):
                await asyncio.wait_for(shutdown.wait(), self._duty.pause_s)

    async def agent_on_shutdown(self) -> None:
        """Have what is still in work end soon."""
        self._leaving = True
        if self._running:
            await asyncio.to_thread(self._stop.touch)
        else:
            await asyncio.to_thread(self._tidy)


class Quiet(LogConfig):
    """Keeps Academy's own log to itself: fanfold says what matters, once.

    A level that somebody has set for the logger ``academy`` stands.
    """

    def init_logging(self) -> Callable[[], None]:
        """Quieten the logger; returns what undoes it."""
        logger = logging.getLogger("academy")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)
            return lambda: logger.setLevel(logging.NOTSET)
        return lambda: None
