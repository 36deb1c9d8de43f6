"""The agent, and the coordinator's connection to it (imports academy)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from academy.agent import Agent, action, loop
from academy.exception import AcademyRemoteError
from academy.exchange.mailbox_status import MailboxStatus
from academy.handle import Handle
from academy.identifier import AgentId, EntityId
from academy.logging.configs.base import LogConfig
from academy.manager import Manager
from academy.message import Message
from academy.serialize import SerializationStrategy, allowed_deserializers

from ...core.errors import WorkerLostError
from ...core.process import TemporaryFolder
from ...core.types import Json
from ..executor import SingleProcessExecutor, WorkShard, run_in_thread
from .exchange import ExchangeSettings, pack, unpack

_OVER: Final = frozenset({MailboxStatus.TERMINATED, MailboxStatus.MISSING})


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """What an agent is told when it is launched.

    Attributes:
        work: What works on an order: an importable function.
        slots: Orders that it works on at a time; more wait in it.
        owner: The coordinator's mailbox; None where agents cannot look after it.
        poll_s: Seconds between two looks after the coordinator.
    """

    work: WorkShard
    slots: int
    owner: EntityId | None
    poll_s: float


class ShardAgent(Agent):
    """Works on orders in threads of their own, so that its heartbeat goes on.

    What it takes and gives is one JSON text each; an order's failure comes as data within.

    Args:
        duty: What it is told.
    """

    def __init__(self, duty: AgentSettings) -> None:
        super().__init__()
        self._settings = duty
        self._slots = asyncio.Semaphore(duty.slots)
        self._running, self._is_shutting_down = set[object](), False
        self._scratch: TemporaryFolder | None = None

    async def agent_on_startup(self) -> None:
        """Make room for what tells orders without a stop file of their own to stop."""
        self._scratch = await asyncio.to_thread(TemporaryFolder, "agent")

    @action
    async def work_on(self, parcel: str) -> str:
        """Work on one order and return its summary, both packed."""
        async with self._slots:
            order = await asyncio.to_thread(unpack, parcel)
            if order.get("stop_file") is None:  # nobody shares a folder with us
                order["stop_file"] = str(self._stop_file)
            found = list[dict[str, Json]]()
            # in a thread that holds up neither the agent's end nor the process's
            await run_in_thread(lambda: found.append(self._run_task(order)))
            return await asyncio.to_thread(pack, found[0])

    def _run_task(self, order: dict[str, Json]) -> dict[str, Json]:
        mine = object()
        self._running.add(mine)
        try:
            return self._settings.work(order)
        finally:
            self._running.discard(mine)
            if self._is_shutting_down and not self._running:
                self._remove_folder()

    @property
    def _stop_file(self) -> Path:
        assert self._scratch is not None, "an agent that has not started takes no orders"
        return self._scratch.path / "stop"

    def _remove_folder(self) -> None:
        """Remove the stop file once nobody looks at it; a later agent does if this one cannot."""
        if self._scratch is not None:
            self._scratch.remove()
            self._scratch = None

    @action
    async def stop(self) -> None:
        """Begin no further item of orders that bring no stop file of their own."""
        await asyncio.to_thread(self._stop_file.touch)

    @loop
    async def watch_owner(self, shutdown: asyncio.Event) -> None:
        """End when the coordinator has gone, however it went, or has ended our mailbox."""
        status, missed = self.agent_exchange_client.status, 0
        while not shutdown.is_set():
            found = [await status(self.agent_id)]  # Academy would only stop listening
            if self._settings.owner is not None:
                found.append(await status(self._settings.owner))
                missed = 0 if found[-1] is MailboxStatus.ACTIVE else missed + 1
            if missed > 1 or _OVER.intersection(found):
                self.agent_shutdown()
            with suppress(TimeoutError):
                await asyncio.wait_for(shutdown.wait(), self._settings.poll_s)

    async def agent_on_shutdown(self) -> None:
        """Have what is still in work end soon."""
        self._is_shutting_down = True
        if self._running:
            await asyncio.to_thread(self._stop_file.touch)
        else:
            await asyncio.to_thread(self._remove_folder)


class QuietLogConfig(LogConfig):
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


_JSON: Final = SerializationStrategy.JSON
_HEED_S: Final = 1.0
_STOP_S: Final = 2.0
_KILLED_S: Final = 5.0


class AgentConnection:
    """An agent that was launched.

    Args:
        name: What messages call it.
        manager: What launched it.
        agent: Its id.
        at: Where it is met.
        executor: What it runs on; None is this event loop.

    Attributes:
        is_up: Whether it has answered.
        is_unreachable: Whether it lives, and yet we do not hear it.
        lost: Done once nothing is expected of it any more, with the reason.
        ended: Done when it has ended, with its error if it had one.
    """

    def __init__(
        self,
        name: str,
        manager: Manager[Any],
        agent: AgentId[Any],
        at: ExchangeSettings,
        executor: Executor | None,
    ) -> None:
        self.name, self.manager, self.executor = name, manager, executor
        self.is_up = self.is_unreachable = False
        self._client, self._agent, self._at = manager.exchange_client, agent, at
        self._handle = _Handle(
            agent, exchange=self._client, ignore_context=True, request_serializer=_JSON
        )
        self.lost: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.ended = asyncio.create_task(manager.wait({agent}, raise_error=True))
        self.ended.add_done_callback(self._on_ended)
        self.first_ping = asyncio.create_task(self._handle.ping())
        self.first_ping.add_done_callback(self._on_first_ping)
        self._ping_task: asyncio.Task[None] | None = None

    @property
    def error(self) -> BaseException | None:
        """Return what it ended with, if it ended with an error."""
        over = self.ended.done() and not self.ended.cancelled()
        return self.ended.exception() if over else None

    def _on_first_ping(self, ping: asyncio.Task[float]) -> None:
        if ping.cancelled():
            return
        if (error := ping.exception()) is not None:
            self._mark_lost(f"did not answer: {type(error).__name__}: {error}")
        elif not self.lost.done():
            self.is_up = True
            self._ping_task = asyncio.create_task(self._ping_until_lost())

    def _on_ended(self, _: asyncio.Task[None]) -> None:
        self._mark_lost(f"{self.error}" if self.error else "it ended")

    def _mark_lost(self, reason: str) -> None:
        self.is_up = False
        if not self.lost.done():
            self.lost.set_result(reason)

    async def _ping_until_lost(self) -> None:
        """Ask for a sign of life again and again, until none comes."""
        missed_s = 0.0
        while not self.lost.done():
            await asyncio.sleep(self._at.heartbeat_s)
            ping = self._handle.ping(timeout=self._at.silence_s)
            (sign,) = await asyncio.gather(ping, return_exceptions=True)
            missed_s = missed_s + self._at.heartbeat_s if isinstance(sign, BaseException) else 0.0
            if isinstance(sign, TimeoutError):
                await self._handle_silence()
            elif missed_s >= self._at.silence_s:
                self._mark_lost(f"{self._at.label} does not answer: {sign!r}")

    async def _handle_silence(self) -> None:
        """Tell by its heartbeat whether it is dead, or our own ears are."""
        status = self._client.status(self._agent)
        (found,) = await asyncio.gather(status, return_exceptions=True)
        self.is_unreachable = found is MailboxStatus.ACTIVE
        what = "it cannot be heard any more" if self.is_unreachable else "no heartbeat"
        self._mark_lost(f"{what} for {self._at.silence_s:g} s")

    async def run_task(self, parcel: str) -> str:
        """Have one order worked on.

        Raises:
            WorkerLostError: The agent died, or broke on the order.
        """
        call = asyncio.create_task(self._call("work_on", parcel))
        call.add_done_callback(_consume_error)
        try:
            either: set[asyncio.Future[Any]] = {call, self.lost}
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        finally:
            if not call.done():
                call.cancel()  # the agent is told, if it still lives
        if not call.done():
            raise WorkerLostError(f"{self.name}: {self.lost.result()}")
        try:
            return str(call.result())
        except AcademyRemoteError as error:
            raise WorkerLostError(f"{self.name}: {_last_line(error)}") from error
        except Exception as error:  # of the exchange, or the agent is about to end
            self._mark_lost(f"{type(error).__name__}: {error}")
            raise WorkerLostError(f"{self.name}: {self.lost.result()}") from error

    async def _call(self, name: str, *args: str) -> str | None:
        allowed_deserializers.set({_JSON})  # in this task
        answer: str | None = await self._handle.action(name, *args)
        return answer

    async def stop(self) -> None:
        """Ask it to begin no further item; bounded, and no error if it does not hear."""
        if self.is_up:
            call = asyncio.create_task(self._call("stop"))
            call.add_done_callback(_consume_error)
            await asyncio.wait({call}, timeout=_STOP_S)

    async def shutdown(self, grace_s: float) -> None:
        """End it within ``grace_s`` and a little more.

        An agent on Redis may read on though it was told to shut down; ending its mailbox wakes
        it. What still runs then is killed, where it has a process of its own.
        """
        if self.is_up and grace_s > 0:
            await self._call_bounded(self._handle.shutdown(), grace_s / 2)
            await asyncio.wait({self.ended}, timeout=min(_HEED_S, grace_s / 2))
        self._mark_lost("it was dismissed")
        if not self.ended.done():
            await self._call_bounded(self._client.terminate(self._agent), _STOP_S)
            await asyncio.wait({self.ended}, timeout=grace_s / 2)
        if isinstance(self.executor, SingleProcessExecutor):
            await asyncio.to_thread(self.executor.shutdown)
            await asyncio.wait({self.ended}, timeout=_KILLED_S)
        for task in (self.first_ping, self._ping_task, self.ended):
            if task is not None:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    @staticmethod
    async def _call_bounded(call: Any, seconds: float) -> None:
        task = asyncio.ensure_future(call)
        task.add_done_callback(_consume_error)
        await asyncio.wait({task}, timeout=seconds)
        task.cancel()


class _Handle(Handle[Any]):
    """Survives an answer that comes twice; of one such, Academy's listener dies unheard.

    It comes twice when an agent answers, or its process ends, while its mailbox is being ended.
    """

    async def _process_response(self, response: Message[Any]) -> None:
        with suppress(KeyError):  # it was answered before
            await super()._process_response(response)


def _consume_error(call: asyncio.Future[Any]) -> None:
    if not call.cancelled():
        call.exception()  # nobody may be waiting for it any more


def _last_line(error: Exception) -> str:
    """Return the end of a remote traceback."""
    return str(error).strip().rpartition("\n")[2]
