"""Serving a node: all of its servers, its endpoints file and its record, until told to stop."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from typing import Final

from ..core.errors import FanfoldError, SiteError
from .events import Record
from .guard import Guard, guarded
from .listing import Listing
from .load import LoadNotes
from .lock import HostLock
from .plan import NodePlan, files_of
from .server import Desk, Server

_ALIVE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class Orders:
    """What a serving process is told from outside.

    Attributes:
        say: Tells the user something.
        stop: Set when the servers shall end.
        hurry: Set when nothing is waited for any more.
    """

    say: Callable[[str], None]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    hurry: asyncio.Event = field(default_factory=asyncio.Event)


async def keep(plan: NodePlan, lock: HostLock, orders: Orders) -> None:
    """Serve a node until told to stop.

    Args:
        plan: What to serve.
        lock: The right to do so; it is given back at the end.
        orders: What the process is told from outside.

    Raises:
        SiteError: All servers were given up; with the last lines of each.
    """
    files, stack = files_of(plan), ExitStack()
    with stack:
        stack.callback(lock.give_back)
        record = await asyncio.to_thread(Record, files.record, plan.host)
        stack.callback(record.close)
        await asyncio.to_thread(files.failure.unlink, missing_ok=True)
        async with guarded(files, lock, plan.watching.stop_s) as guard:
            await _Keeper(plan, guard, record, orders).run()


class _Keeper:
    """Serves one node."""

    def __init__(self, plan: NodePlan, guard: Guard, record: Record, orders: Orders) -> None:
        self._plan, self._guard, self._record, self._orders = plan, guard, record, orders
        self._changed = asyncio.Event()
        desk = Desk(plan, guard, record, orders.say, self._changed.set, orders.hurry)
        self._servers = [Server(server, desk) for server in plan.servers]
        self._listing = Listing(files_of(plan).endpoints, plan.host)
        self._loads = LoadNotes(plan, self._servers, record)

    async def run(self) -> None:
        """Serve until told to stop."""
        self._record.note("begin", instances=len(self._servers), pid=os.getpid())
        self._orders.say(self._beginning())
        self._changed.set()  # removes what a killed process has left
        try:
            async with asyncio.TaskGroup() as group:
                lives = [group.create_task(server.live()) for server in self._servers]
                several = (self._list(), self._tick(), self._loads.run())
                helpers = [group.create_task(one) for one in several]
                await self._until_over(lives)
                await asyncio.to_thread(self._listing.close)  # before its servers end
                await self._loads.last()
                for task in (*lives, *helpers):
                    task.cancel()
        except* FanfoldError as errors:
            raise errors.exceptions[0] from None
        finally:
            self._listing.close()
            why = "stopped" if self._orders.stop.is_set() else "given up"
            self._record.note("end", why=why)
        if not self._orders.stop.is_set():
            raise SiteError(self._failure())
        self._orders.say(f"{self._plan.host}: all servers have ended")

    def _beginning(self) -> str:
        ports = [server.plan.port for server in self._servers]
        many = f"{len(ports)} servers, ports {ports[0]} to {ports[-1]}"
        what = many if len(ports) > 1 else f"a server, port {ports[0]}"
        logs = files_of(self._plan).record.parent
        return f"{self._plan.host}: starting {what}; logs: {logs}"

    async def _until_over(self, lives: Sequence[asyncio.Task[None]]) -> None:
        """Wait until told to stop, or until no server lives; tell of each that is given up."""
        stop = asyncio.ensure_future(self._orders.stop.wait())
        try:
            while not stop.done() and (alive := {task for task in lives if not task.done()}):
                await asyncio.wait({stop, *alive}, return_when=asyncio.FIRST_COMPLETED)
                if all(task.done() for task in lives):
                    return  # the error tells of all
                for server, task in zip(self._servers, lives, strict=True):
                    if task in alive and task.done():
                        self._orders.say(server.given_up or server.name)
        finally:
            stop.cancel()

    async def _list(self) -> None:
        """Keep the endpoints file equal to what is ready."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            names = [server.name for server in self._servers if server.ready]
            try:
                await asyncio.to_thread(self._listing.write, names)
            except OSError as error:
                path = files_of(self._plan).endpoints
                self._orders.say(f"{path}: cannot be written, tried again: {error.strerror}")
                await asyncio.sleep(self._plan.watching.every_s)
                self._changed.set()

    async def _tick(self) -> None:
        """Look after the watcher, and note that the node lives."""
        loop, said = asyncio.get_running_loop(), float("-inf")
        while True:
            await self._guard.check()
            if loop.time() - said >= _ALIVE_S:
                said = loop.time()
                self._record.note("alive", ready=sum(server.ready for server in self._servers))
            await asyncio.sleep(self._plan.watching.every_s)

    def _failure(self) -> str:
        """Return why no server is left, and leave it for whoever wants to serve next."""
        reasons = "\n".join(server.given_up or server.name for server in self._servers)
        text = f"{self._plan.host}: no server is left\n{reasons}"
        with suppress(OSError):  # the error itself says it as well
            files_of(self._plan).failure.write_text(text, encoding="utf-8")
        return text
