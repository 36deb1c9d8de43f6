"""Run shards on agents; the manager of a run's agents (no academy import at top)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import BrokenExecutor, Executor
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

from ...core.aio import wait_first
from ...core.errors import BackendError, ConfigurationError, MissingExtraError
from ...core.types import Json
from ..executor import (
    SingleProcessExecutor,
    WorkShard,
    is_fatal,
    make_executor,
    run_in_thread,
    shutdown_executor,
)
from .exchange import ExchangeSettings, delete_mailboxes, open_exchange, pack, unpack

if TYPE_CHECKING:
    from academy.exchange import ExchangeClient, ExchangeFactory
    from academy.identifier import EntityId
    from academy.logging.configs.base import LogConfig
    from academy.manager import Manager

    from .agent import AgentConnection


logger = logging.getLogger(__name__)

_CLOSE_S: Final = 5.0

MakeExecutor = Callable[[], Executor]


class AgentManager:
    """Manage a run's agents; opens with the first agent's backend and closes with the last.

    Args:
        settings: The exchange settings.
        work: The function that agents run; importable.
        slots: Tasks that an agent runs at a time.
        make: Makes the executor that agents run on; None runs each in its own process, or, over the
            local exchange, in this one.

    Attributes:
        any_agent_up: Set once the first agent has answered.

    Raises:
        ConfigurationError: The local exchange does not reach beyond this process.
        MissingExtraError: Academy is not installed.
    """

    def __init__(
        self, settings: ExchangeSettings, work: WorkShard, slots: int, make: MakeExecutor | None
    ) -> None:
        if settings.config.kind == "local" and make is not None:
            msg = (
                "backend.exchange.kind local keeps all agents in this process; with "
                "backend.executor use http, redis or globus"
            )
            raise ConfigurationError(msg)
        _require_academy()
        self.settings, self.slots = settings, slots
        self.any_agent_up = asyncio.Event()
        self._work, self._make = work, make
        self._stack = AsyncExitStack()
        self._manager: Manager[Any] | None = None
        self._executor: tuple[str, Executor] | None = None
        self._opening, self._making = asyncio.Lock(), asyncio.Lock()
        self._users = self._launched = 0
        self._connect: Callable[[], Awaitable[Manager[Any]]] | None = None
        self._clients: list[ExchangeClient[Any]] = []
        self._mailboxes: list[EntityId] = []

    async def acquire(self) -> None:
        """Open the exchange for the first user.

        Raises:
            BackendError: The exchange does not answer.
            ConfigurationError: It can never be opened.
        """
        async with self._opening:
            if self._manager is None:
                await self._open()
            self._users += 1

    async def _open(self) -> None:
        from academy.logging.helpers import log_context  # noqa: PLC0415 - an extra

        from .agent import QuietLogConfig  # noqa: PLC0415 - needs the extra

        async with AsyncExitStack() as stack:
            quiet = QuietLogConfig()
            stack.enter_context(log_context(quiet))
            factory = await stack.enter_async_context(open_exchange(self.settings))
            self._connect = lambda: self._new_manager(factory, quiet)
            self._manager = await self._connect()
            self._stack = stack.pop_all()

    async def _new_manager(self, factory: ExchangeFactory[Any], quiet: LogConfig) -> Manager[Any]:
        from academy.manager import Manager  # noqa: PLC0415 - an extra

        try:
            client = await factory.create_user_client()
        except Exception as error:
            msg = f"{self.settings.label} does not answer: {type(error).__name__}: {error}"
            raise BackendError(msg) from error
        self._clients.append(client)
        self._mailboxes.append(client.client_id)
        return Manager(client, log_config=quiet)

    async def launch(self, name: str) -> AgentConnection:
        """Launch an agent; it answers later.

        Raises:
            BackendError: The exchange does not answer, or the executor cannot be made.
        """
        from academy.runtime import RuntimeConfig  # noqa: PLC0415 - an extra
        from academy.serialize import SerializationStrategy  # noqa: PLC0415 - an extra

        from .agent import AgentConnection, AgentSettings, ShardAgent  # noqa: PLC0415 - needs the extra

        manager = self._manager
        if manager is None:
            raise BackendError(f"{name}: not started")
        owner = None if self.settings.config.kind in {"local", "globus"} else manager.user_id
        json = SerializationStrategy.JSON  # no pickle crosses an exchange
        config = RuntimeConfig(allowed_deserializers={json}, default_serializer=json)
        where, executor = await self._get_executor(manager)
        try:
            registration = await manager.register_agent(ShardAgent)
            self._mailboxes.append(registration.agent_id)
            await manager.launch(
                ShardAgent,
                args=(AgentSettings(self._work, self.slots, owner, self.settings.heartbeat_s),),
                config=config,
                executor=where,
                registration=registration,
            )
        except Exception as error:
            msg = f"{name}: cannot be launched: {type(error).__name__}: {error}"
            raise BackendError(msg) from error
        return AgentConnection(name, manager, registration.agent_id, self.settings, executor)

    async def _get_executor(self, manager: Manager[Any]) -> tuple[str, Executor | None]:
        """Return the name and executor for an agent."""
        self._launched += 1
        if self.settings.config.kind == "local":
            return "event_loop", None
        if self._make is None:
            process = SingleProcessExecutor()
            manager.add_executor(f"process {self._launched}", process)
            return f"process {self._launched}", process
        async with self._making:  # one for all agents, which start at once
            if self._executor is None:
                made = await make_executor(self._make, "backend.executor")
                self._executor = f"executor {self._launched}", made
                manager.add_executor(*self._executor)
            return self._executor

    async def handle_lost_agent(self, agent: AgentConnection) -> None:
        """Replace what broke with a lost agent, before the next one is launched.

        Raises:
            BackendError: The exchange does not answer.
        """
        is_own = self._executor is not None and agent.executor is self._executor[1]
        broken = isinstance(agent.error, BrokenExecutor) or is_fatal(agent.error)
        if is_own and agent.executor is not None and broken:
            self._executor, executor = None, agent.executor
            await asyncio.wait(
                {run_in_thread(lambda: shutdown_executor(executor))}, timeout=_CLOSE_S
            )
        async with self._opening:
            if (
                agent.is_unreachable
                and agent.manager is self._manager
                and self._connect is not None
            ):
                self._manager = await self._connect()
                if self._executor is not None:
                    self._manager.add_executor(*self._executor)

    async def release(self) -> None:
        """Close the exchange and the executor for the last user; bounded."""
        async with self._opening:
            self._users -= 1
            if self._users > 0 or self._manager is None:
                return
            self._manager = self._connect = None
            try:
                await self._close()
            finally:
                await self._stack.aclose()

    async def _close(self) -> None:
        if self._executor is not None:
            executor, self._executor = self._executor[1], None
            ended = run_in_thread(lambda: shutdown_executor(executor))
            await asyncio.wait({ended}, timeout=_CLOSE_S)
        clients, self._clients = self._clients, []
        mailboxes, self._mailboxes = self._mailboxes, []
        for call in (*map(self._close_client, clients), delete_mailboxes(self.settings, mailboxes)):
            bounded = asyncio.wait_for(call, _CLOSE_S)
            (error,) = await asyncio.gather(bounded, return_exceptions=True)
            if error is not None:
                logger.warning("%s: cannot be cleaned up: %r", self.settings.label, error)

    async def _close_client(self, client: ExchangeClient[Any]) -> None:
        if self.settings.config.kind == "redis":
            # wakes its listener, which a cancellation may fail to do
            await client.terminate(client.client_id)
        await client.close()


def _require_academy() -> None:
    try:
        import academy.agent  # noqa: F401, PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise MissingExtraError("backend.kind academy", "academy") from error


_END_S: Final = 2.0
_LOST_END_S: Final = 5.0
_LATE_S: Final = 10.0
"""Seconds to wait for an agent at the start when another one has answered."""


class AcademyBackend:
    """Run shards on an agent; when the agent dies, a new one replaces it.

    Args:
        manager: The manager of the run's agents.
        name: Name in messages.
        queue_s: Seconds that an agent may wait for its executor.
    """

    def __init__(self, manager: AgentManager, name: str, queue_s: float) -> None:
        self.name = name
        self._manager, self._queue_s = manager, queue_s
        self._agent: AgentConnection | None = None
        self._has_manager = False

    def capacity(self) -> int:
        """Return the agent's slots; 0 while it is not up."""
        return self._manager.slots if self._agent is not None and self._agent.is_up else 0

    async def start(self) -> None:
        """Launch the agent and wait for it; only briefly if another one is up already.

        Raises:
            BackendError: It ended at once, or the exchange does not answer.
            ConfigurationError: It can never work.
        """
        if not self._has_manager:
            await self._manager.acquire()
            self._has_manager = True
        if self._agent is None or self._agent.lost.done():
            self._agent = await self._manager.launch(self.name)
        agent, another = self._agent, self._manager.any_agent_up.wait()
        await wait_first(agent.first_ping, agent.lost, another, timeout_s=self._queue_s)
        await wait_first(agent.first_ping, agent.lost, timeout_s=_LATE_S)
        await self._check_agent(agent)

    async def _check_agent(self, agent: AgentConnection) -> None:
        """Record that an agent is up; one that still starts is no error.

        Raises:
            BackendError: The agent is lost.
            ConfigurationError: It cannot import what it needs.
        """
        if agent.is_up:
            self._manager.any_agent_up.set()
        elif agent.lost.done():
            await asyncio.wait({agent.ended}, timeout=_END_S)  # its error may say more
            msg = f"{self.name}: {agent.error or agent.lost.result()}"
            if isinstance(agent.error, ImportError | AttributeError):
                msg += "; install fanfold[academy] where agents run"
                raise ConfigurationError(msg) from agent.error
            raise BackendError(msg)

    async def submit(self, task: dict[str, Json]) -> dict[str, Json]:
        """Run one task.

        Raises:
            WorkerLostError: The agent died.
            BackendError: No agent is up here.
            ConfigurationError: The task is larger than a message of the exchange may be.
        """
        agent = self._agent
        if agent is None or not agent.is_up:
            raise BackendError(f"{self.name}: not started, or its agent is dead")
        message = await asyncio.to_thread(pack, task)
        most = self._manager.settings.max_message_bytes
        if most is not None and len(message) > most:
            msg = (
                f"{self.name}: a task takes {len(message):,} bytes and "
                f"{self._manager.settings.label} "
                f"carries {most:,}; set shard.items, or use backend.exchange.kind: redis"
            )
            raise ConfigurationError(msg)
        return await asyncio.to_thread(unpack, await agent.run_task(message))

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        """Return nothing: agents end with their coordinator."""
        return {}

    async def rebuild(self) -> None:
        """Wait for an agent that is starting; else shut it down and launch a new one.

        Raises:
            BackendError: No agent started.
            ConfigurationError: None can ever start.
        """
        agent = self._agent
        if agent is not None and (agent.is_up or agent.lost.done()):
            if agent.lost.done() and not isinstance(agent.executor, SingleProcessExecutor):
                # it may soon end with an error and free its worker
                await asyncio.wait({agent.ended}, timeout=_LOST_END_S)
            await agent.shutdown(0.0)
            self._agent = None  # not earlier: close() must still find it
            await self._manager.handle_lost_agent(agent)
        if self._agent is None:
            await self.start()
            return
        agent = self._agent
        await wait_first(agent.first_ping, agent.lost, timeout_s=self._queue_s)
        await self._check_agent(agent)
        if not agent.is_up:
            raise BackendError(f"{self.name}: no agent has started in {self._queue_s:.0f} s")

    async def stop(self) -> None:
        """Ask the agent to begin no further item."""
        if self._agent is not None:
            await self._agent.stop()

    async def close(self, grace_s: float = 10.0) -> None:
        """Shut the agent down within ``grace_s`` and a little more."""
        agent, self._agent = self._agent, None
        if agent is not None:
            await agent.shutdown(grace_s)
        if self._has_manager:
            self._has_manager = False
            await self._manager.release()
