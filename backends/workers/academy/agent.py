"""Define the agent and the coordinator's connection to it (imports academy)."""

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

from ...core.aio import wait_first
from ...core.errors import WorkerLostError
from ...core.process import TemporaryFolder
from ...core.types import Json
from ..executor import SingleProcessExecutor, WorkShard, run_in_thread
from .exchange import ExchangeSettings, pack, unpack

_ENDED_STATES: Final = frozenset({MailboxStatus.TERMINATED, MailboxStatus.MISSING})


@dataclass(frozen=True, slots=True)
class AgentSettings:
    """Settings of an agent at its launch.

    Attributes:
        work: The function that runs a task; importable.
        slots: Tasks that it runs at a time; more wait in it.
        owner: The coordinator's mailbox; None where agents cannot check it.
        poll_s: Seconds between two checks of the coordinator.
    """

    work: WorkShard
    slots: int
    owner: EntityId | None
    poll_s: float


class ShardAgent(Agent):
    """Run tasks in threads, so that the agent's heartbeat goes on.

    Messages are JSON texts; the failure of a task is data within its result.

    Args:
        settings: The agent's settings.
    """

    def __init__(self, settings: AgentSettings) -> None:
        super().__init__()
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.slots)
        self._running, self._is_shutting_down = set[object](), False
        self._temporary: TemporaryFolder | None = None

    async def agent_on_startup(self) -> None:
        """Create the folder of the stop file for tasks without one."""
        self._temporary = await asyncio.to_thread(TemporaryFolder, "agent")

    @action
    async def work_on(self, message: str) -> str:
        """Run one packed task and return its packed result."""
        async with self._slots:
            task = await asyncio.to_thread(unpack, message)
            if task.get("stop_file") is None:  # no shared folder
                task["stop_file"] = str(self._stop_file)
            found = list[dict[str, Json]]()
            # in a thread that delays neither the agent's end nor the process's
            await run_in_thread(lambda: found.append(self._run_task(task)))
            return await asyncio.to_thread(pack, found[0])

    def _run_task(self, task: dict[str, Json]) -> dict[str, Json]:
        token = object()
        self._running.add(token)
        try:
            return self._settings.work(task)
        finally:
            self._running.discard(token)
            if self._is_shutting_down and not self._running:
                self._remove_folder()

    @property
    def _stop_file(self) -> Path:
        assert self._temporary is not None, "an agent that has not started runs no tasks"
        return self._temporary.path / "stop"

    def _remove_folder(self) -> None:
        """Remove the stop file once no task polls it; else a later agent removes it."""
        if self._temporary is not None:
            self._temporary.remove()
            self._temporary = None

    @action
    async def stop(self) -> None:
        """Begin no further item of tasks without a stop file."""
        await asyncio.to_thread(self._stop_file.touch)

    @loop
    async def watch_owner(self, shutdown: asyncio.Event) -> None:
        """Exit when the coordinator has ended, even if killed, or closed this mailbox."""
        status, missed = self.agent_exchange_client.status, 0
        while not shutdown.is_set():
            found = [await status(self.agent_id)]  # Academy itself would only stop listening
            if self._settings.owner is not None:
                found.append(await status(self._settings.owner))
                missed = 0 if found[-1] is MailboxStatus.ACTIVE else missed + 1
            if missed > 1 or _ENDED_STATES.intersection(found):
                self.agent_shutdown()
            with suppress(TimeoutError):
                await asyncio.wait_for(shutdown.wait(), self._settings.poll_s)

    async def agent_on_shutdown(self) -> None:
        """Ask running tasks to stop soon."""
        self._is_shutting_down = True
        if self._running:
            await asyncio.to_thread(self._stop_file.touch)
        else:
            await asyncio.to_thread(self._remove_folder)


class QuietLogConfig(LogConfig):
    """Suppress Academy's own log: fanfold logs what matters, once.

    A level that the user has set for the logger ``academy`` is kept.
    """

    def init_logging(self) -> Callable[[], None]:
        """Silence the logger; returns a function that restores it."""
        logger = logging.getLogger("academy")
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.CRITICAL)
            return lambda: logger.setLevel(logging.NOTSET)
        return lambda: None


_JSON: Final = SerializationStrategy.JSON
_SHUTDOWN_S: Final = 1.0
_STOP_S: Final = 2.0
_KILLED_S: Final = 5.0


class AgentConnection:
    """A launched agent.

    Args:
        name: Name in messages.
        manager: Academy's manager that launched it.
        agent: Its id.
        settings: The exchange settings.
        executor: What it runs on; None is this event loop.

    Attributes:
        is_up: Whether it has answered.
        is_unreachable: Whether it runs, but its answers do not arrive here.
        lost: Done once it is no longer usable, with the reason.
        ended: Done when it has ended, with its error if it had one.
    """

    def __init__(
        self,
        name: str,
        manager: Manager[Any],
        agent: AgentId[Any],
        settings: ExchangeSettings,
        executor: Executor | None,
    ) -> None:
        self.name, self.manager, self.executor = name, manager, executor
        self.is_up = self.is_unreachable = False
        self._client, self._agent, self._settings = manager.exchange_client, agent, settings
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
        """Return the error with which it ended, or None."""
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
        """Ping the agent until it stops answering."""
        missed_s = 0.0
        while not self.lost.done():
            await asyncio.sleep(self._settings.heartbeat_s)
            ping = self._handle.ping(timeout=self._settings.silence_s)
            (answer,) = await asyncio.gather(ping, return_exceptions=True)
            missed_s = (
                missed_s + self._settings.heartbeat_s if isinstance(answer, BaseException) else 0.0
            )
            if isinstance(answer, TimeoutError):
                await self._handle_silence()
            elif missed_s >= self._settings.silence_s:
                self._mark_lost(f"{self._settings.label} does not answer: {answer!r}")

    async def _handle_silence(self) -> None:
        """Decide by its heartbeat whether the agent is dead or only unreachable from here."""
        status = self._client.status(self._agent)
        (found,) = await asyncio.gather(status, return_exceptions=True)
        self.is_unreachable = found is MailboxStatus.ACTIVE
        what = "its answers no longer arrive" if self.is_unreachable else "no heartbeat"
        self._mark_lost(f"{what} for {self._settings.silence_s:g} s")

    async def run_task(self, message: str) -> str:
        """Run one task.

        Raises:
            WorkerLostError: The agent died, or the task raised an error.
        """
        call = asyncio.create_task(self._call("work_on", message))
        call.add_done_callback(_consume_error)
        try:
            await wait_first(call, self.lost)
        finally:
            call.cancel()  # if it is not done: also in the agent, if that still runs
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
        """Ask the agent to begin no further item; bounded, and no error if it does not answer."""
        if self.is_up:
            call = asyncio.create_task(self._call("stop"))
            call.add_done_callback(_consume_error)
            await asyncio.wait({call}, timeout=_STOP_S)

    async def shutdown(self, grace_s: float) -> None:
        """End the agent within ``grace_s`` and a little more.

        An agent on Redis may keep reading after a shutdown message; closing its mailbox wakes it.
        If it still runs then, its process is killed, where it has its own.
        """
        if self.is_up and grace_s > 0:
            await self._call_bounded(self._handle.shutdown(), grace_s / 2)
            await asyncio.wait({self.ended}, timeout=min(_SHUTDOWN_S, grace_s / 2))
        self._mark_lost("it was shut down")
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
    """A handle that survives a duplicate answer, which would silently stop Academy's listener.

    An answer comes twice when an agent answers, or its process ends, while its mailbox is being
    closed.
    """

    async def _process_response(self, response: Message[Any]) -> None:
        with suppress(KeyError):  # it was answered before
            await super()._process_response(response)


def _consume_error(call: asyncio.Future[Any]) -> None:
    if not call.cancelled():
        call.exception()  # retrieved, because the caller may have stopped waiting


def _last_line(error: Exception) -> str:
    """Return the last line of a remote traceback."""
    return str(error).strip().rpartition("\n")[2]
