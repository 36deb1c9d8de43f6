"""Agents as backends; the manager of a run's agents (no academy import at top)."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from concurrent.futures import BrokenExecutor, Executor
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING, Any, Final

from ...core.errors import ConfigurationError, MissingExtraError, SiteError
from ...core.types import Json
from ..executor import OneProcess, WorkShard, end, in_thread, is_fatal, make_executor
from .exchange import Meeting, meeting, pack, sweep, unpack

if TYPE_CHECKING:
    from academy.exchange import ExchangeClient, ExchangeFactory
    from academy.identifier import EntityId
    from academy.logging.configs.base import LogConfig
    from academy.manager import Manager

    from .agent import Hand


logger = logging.getLogger(__name__)

_CLOSE_S: Final = 5.0

MakeExecutor = Callable[[], Executor]


class Hall:
    """Opens with the first agent's place and closes with the last.

    Args:
        at: Where coordinator and agents meet.
        work: What agents run: an importable function.
        slots: Orders that an agent works on at a time.
        make: Makes the executor that agents run on; None has each in a process of its own, or,
            over the local exchange, in this one.

    Attributes:
        somebody: Set once the first agent has answered.

    Raises:
        ConfigurationError: The local exchange does not reach beyond this process.
        MissingExtraError: Academy is not installed.
    """

    def __init__(self, at: Meeting, work: WorkShard, slots: int, make: MakeExecutor | None) -> None:
        if at.kind == "local" and make is not None:
            msg = (
                "backend.exchange.kind local keeps all agents in this process; with "
                "backend.executor use http, redis or globus"
            )
            raise ConfigurationError(msg)
        _require_academy()
        self.at, self.slots = at, slots
        self.somebody = asyncio.Event()
        self._work, self._make = work, make
        self._stack = AsyncExitStack()
        self._manager: Manager[Any] | None = None
        self._executor: tuple[str, Executor] | None = None
        self._opening, self._making = asyncio.Lock(), asyncio.Lock()
        self._inside = self._launched = 0
        self._connect: Callable[[], Awaitable[Manager[Any]]] | None = None
        self._clients: list[ExchangeClient[Any]] = []
        self._mailboxes: list[EntityId] = []

    async def enter(self) -> None:
        """Open the exchange, for the first who enters.

        Raises:
            SiteError: The exchange does not answer.
            ConfigurationError: It cannot be opened, whatever is tried again.
        """
        async with self._opening:
            if self._manager is None:
                await self._open()
            self._inside += 1

    async def _open(self) -> None:
        from academy.logging.helpers import log_context  # noqa: PLC0415 - an extra

        from .agent import Quiet  # noqa: PLC0415 - needs the extra

        async with AsyncExitStack() as stack:
            quiet = Quiet()
            stack.enter_context(log_context(quiet))
            factory = await stack.enter_async_context(meeting(self.at))
            self._connect = lambda: self._new_manager(factory, quiet)
            self._manager = await self._connect()
            self._stack = stack.pop_all()

    async def _new_manager(self, factory: ExchangeFactory[Any], quiet: LogConfig) -> Manager[Any]:
        from academy.manager import Manager  # noqa: PLC0415 - an extra

        try:
            client = await factory.create_user_client()
        except Exception as error:
            msg = f"{self.at.place} does not answer: {type(error).__name__}: {error}"
            raise SiteError(msg) from error
        self._clients.append(client)
        self._mailboxes.append(client.client_id)
        return Manager(client, log_config=quiet)

    async def launch(self, name: str) -> Hand:
        """Launch an agent; it answers later.

        Raises:
            SiteError: The exchange does not answer, or the executor cannot be made.
        """
        from academy.runtime import RuntimeConfig  # noqa: PLC0415 - an extra
        from academy.serialize import SerializationStrategy  # noqa: PLC0415 - an extra

        from .agent import (  # noqa: PLC0415 - needs the extra
            Duty,
            Hand,
            ShardAgent,
        )

        manager = self._manager
        if manager is None:
            raise SiteError(f"{name}: not started")
        owner = None if self.at.kind in {"local", "globus"} else manager.user_id
        json = SerializationStrategy.JSON  # no pickle crosses an exchange
        config = RuntimeConfig(allowed_deserializers={json}, default_serializer=json)
        where, executor = await self._place(manager)
        try:
            registration = await manager.register_agent(ShardAgent)
            self._mailboxes.append(registration.agent_id)
            await manager.launch(
                ShardAgent,
                args=(Duty(self._work, self.slots, owner, self.at.beat_s),),
                config=config,
                executor=where,
                registration=registration,
            )
        except Exception as error:
            msg = f"{name}: cannot be launched: {type(error).__name__}: {error}"
            raise SiteError(msg) from error
        return Hand(name, manager, registration.agent_id, self.at, executor)

    async def _place(self, manager: Manager[Any]) -> tuple[str, Executor | None]:
        """Return the executor for an agent, and its name."""
        self._launched += 1
        if self.at.kind == "local":
            return "event_loop", None
        if self._make is None:
            process = OneProcess()
            manager.add_executor(f"process {self._launched}", process)
            return f"process {self._launched}", process
        async with self._making:  # one for all agents, who come at once
            if self._executor is None:
                made = await make_executor(self._make, "backend.executor")
                self._executor = f"executor {self._launched}", made
                manager.add_executor(*self._executor)
            return self._executor

    async def bury(self, hand: Hand) -> None:
        """Hear of a lost agent, and replace what broke with it before the next one is launched.

        Raises:
            SiteError: The exchange does not answer.
        """
        mine = self._executor is not None and hand.executor is self._executor[1]
        broken = isinstance(hand.error, BrokenExecutor) or is_fatal(hand.error)
        if mine and hand.executor is not None and broken:
            self._executor, executor = None, hand.executor
            await asyncio.wait({in_thread(lambda: end(executor))}, timeout=_CLOSE_S)
        async with self._opening:
            if hand.deaf and hand.manager is self._manager and self._connect is not None:
                self._manager = await self._connect()
                if self._executor is not None:
                    self._manager.add_executor(*self._executor)

    async def leave(self) -> None:
        """Close the exchange and the executor, for the last who leaves; bounded."""
        async with self._opening:
            self._inside -= 1
            if self._inside > 0 or self._manager is None:
                return
            self._manager = self._connect = None
            try:
                await self._close()
            finally:
                await self._stack.aclose()

    async def _close(self) -> None:
        if self._executor is not None:
            executor, self._executor = self._executor[1], None
            ended = in_thread(lambda: end(executor))
            await asyncio.wait({ended}, timeout=_CLOSE_S)
        clients, self._clients = self._clients, []
        mailboxes, self._mailboxes = self._mailboxes, []
        for call in (*map(self._hang_up, clients), sweep(self.at, mailboxes)):
            bounded = asyncio.wait_for(call, _CLOSE_S)
            (error,) = await asyncio.gather(bounded, return_exceptions=True)
            if error is not None:
                logger.warning("%s was left untidy: %r", self.at.place, error)

    async def _hang_up(self, client: ExchangeClient[Any]) -> None:
        if self.at.kind == "redis":  # wakes its listener, which a cancellation may fail to do
            await client.terminate(client.client_id)
        await client.close()


def _require_academy() -> None:
    try:
        import academy.agent  # noqa: F401, PLC0415 - an extra
    except ModuleNotFoundError as error:
        raise MissingExtraError("backend.kind academy", "academy") from error


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
