"""All servers of a node: start, watch, restart, publish, load samples."""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from ..core.errors import BackendError, FanfoldError
from ..core.parsing import ServerLoad, parse_load_metrics
from .events import EventLog
from .lock import (
    NodeLock,
    NodeUsers,
    WatchdogClient,
    hold_user_lock,
    is_on_demand,
    read_owner,
    request_stop_when_unused,
    run_watchdog,
)
from .plan import NodeFiles, NodePlan, node_files
from .server import NodeState, Server, fetch


class EndpointsFile:
    """Writes the endpoints file; its methods block.

    Args:
        path: The file.
        host: The node's name.
    """

    def __init__(self, path: Path, host: str) -> None:
        self._path, self._host = path, host
        self._lock, self._closed = threading.Lock(), False

    def write(self, names: Sequence[str]) -> None:
        """List servers; without any the file is removed. After :meth:`close` nothing is written.

        Raises:
            OSError: The file cannot be written; the old one is as it was.
        """
        with self._lock:
            if self._closed:
                return
            if not names:
                self._path.unlink(missing_ok=True)
                return
            head = f"# servers of {self._host} that are ready, as fanfold saw them last\n"
            partial = self._path.with_name(f".{self._path.name}.partial")
            partial.unlink(missing_ok=True)
            with partial.open("x", encoding="utf-8") as file:
                file.write(head + "".join(f"{name}\n" for name in names))
            partial.replace(self._path)

    def close(self) -> None:
        """Remove the file for good."""
        with self._lock:
            self._closed = True
            with suppress(OSError):  # the folder is gone: so is the file
                self._path.unlink(missing_ok=True)


_METRICS: Final = "/metrics"
_OK: Final = 200
_REFUSED: Final = range(400, 500)
_LONGEST_S: Final = 60.0
"""So long nothing is noted where nothing changes."""

_FINE: Final = 32
"""A change is noted from this part of the most that a server ever worked on."""

_LEAST_S: Final = 0.5
_PART: Final = 60
"""Looks are at most this part of the time apart for which the node is served: jobs of a minute
have too few of them else."""

_LAST_S: Final = 1.0


class LoadSampler:
    """Asks a node's servers what they work on, and notes it.

    Args:
        plan: The node's plan.
        servers: Its servers, in the order of their numbers.
        record: Where it is noted.
    """

    def __init__(self, plan: NodePlan, servers: Sequence[Server], record: EventLog) -> None:
        self._plan, self._servers, self._event_log = plan, servers, record
        self._mute = set[int]()
        self._most = 0
        self._recorded: list[tuple[int, ServerLoad] | None] = [None] * len(servers)
        self._when = float("-inf")

    async def run(self) -> None:
        """Look again and again."""
        begun = time.monotonic()
        while True:
            await self.sample()
            pause = max(_LEAST_S, (time.monotonic() - begun) / _PART)
            await asyncio.sleep(min(self._plan.watching.every_s, pause))

    async def sample(self) -> None:
        """Ask all servers that are ready, and note what they say if it is news."""
        told = await asyncio.gather(*map(self._fetch_load, self._servers))
        if not any(told):
            return
        self._most = max(self._most, *(one.running or 0 for one in told if one))
        both = zip(self._servers, told, strict=True)
        now = [None if one is None else (server.starts, one) for server, one in both]
        pairs = zip(self._recorded, now, strict=True)
        if time.monotonic() - self._when < _LONGEST_S and not any(
            self._has_changed(*p) for p in pairs
        ):
            return
        self._when = time.monotonic()
        self._recorded = [this or before for before, this in zip(self._recorded, now, strict=True)]
        self._event_log.append(
            "load",
            running=[one and one.running for one in told],
            waiting=[one and one.waiting for one in told],
        )

    async def sample_last(self) -> None:
        """Look once more before the servers end; waits for a second at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_S):
                await self.sample()

    async def _fetch_load(self, server: Server) -> ServerLoad | None:
        number, watching = server.plan.instance, self._plan.watching
        if not server.ready or number in self._mute:
            return None
        address, key = self._plan.address, self._plan.key
        answer = await fetch(address, server.plan.port, _METRICS, watching.answer_s, key)
        if answer is None:
            return None
        status, body = answer
        if status in _REFUSED:
            self._mute.add(number)
        gauges = parse_load_metrics(body) if status == _OK else None
        return gauges if gauges is not None and gauges.running is not None else None

    def _has_changed(
        self, before: tuple[int, ServerLoad] | None, now: tuple[int, ServerLoad] | None
    ) -> bool:
        """Say whether a server does notably more or less than was noted of this start of it."""
        if now is None:
            return False
        if before is None or before[0] != now[0]:
            return True
        was, this = before[1], now[1]
        change = abs((this.running or 0) - (was.running or 0))
        return (
            bool(was.running) != bool(this.running)
            or bool(was.waiting) != bool(this.waiting)
            or change >= max(1, self._most / _FINE)
        )


_ALIVE_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class SupervisorControl:
    """What a serving process is told from outside.

    Attributes:
        report: Tells the user something.
        stop: Set when the servers shall end.
        stop_waiting: Set when nothing is waited for any more.
    """

    report: Callable[[str], None]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stop_waiting: asyncio.Event = field(default_factory=asyncio.Event)


async def run_supervisor(plan: NodePlan, lock: NodeLock, orders: SupervisorControl) -> None:
    """Serve a node until told to stop.

    Args:
        plan: What to serve.
        lock: The right to do so; it is given back at the end.
        orders: What the process is told from outside.

    Raises:
        BackendError: All servers were given up; with the last lines of each.
    """
    files, stack = node_files(plan), ExitStack()
    with stack:
        stack.callback(lock.release)
        record = await asyncio.to_thread(EventLog, files.event_log, plan.host)
        stack.callback(record.close)
        await asyncio.to_thread(files.failure.unlink, missing_ok=True)
        async with run_watchdog(files, lock, plan.watching.stop_s) as guard:
            await Supervisor(plan, guard, record, orders).run()


class Supervisor:
    """Serves one node."""

    def __init__(
        self, plan: NodePlan, guard: WatchdogClient, record: EventLog, orders: SupervisorControl
    ) -> None:
        self._plan, self._watchdog, self._event_log, self._control = plan, guard, record, orders
        self._changed = asyncio.Event()
        desk = NodeState(plan, guard, record, orders.report, self._changed.set, orders.stop_waiting)
        self._servers = [Server(server, desk) for server in plan.servers]
        self._endpoints_file = EndpointsFile(node_files(plan).endpoints, plan.host)
        self._load_sampler = LoadSampler(plan, self._servers, record)

    async def run(self) -> None:
        """Serve until told to stop."""
        self._event_log.append("begin", instances=len(self._servers), pid=os.getpid())
        self._control.report(self._beginning())
        self._changed.set()  # removes what a killed process has left
        try:
            async with asyncio.TaskGroup() as group:
                lives = [group.create_task(server.run()) for server in self._servers]
                several = (
                    self._publish_endpoints(),
                    self._send_heartbeats(),
                    self._load_sampler.run(),
                )
                helpers = [group.create_task(one) for one in several]
                await self._wait_until_done(lives)
                await asyncio.to_thread(self._endpoints_file.close)  # before its servers end
                await self._load_sampler.sample_last()
                for task in (*lives, *helpers):
                    task.cancel()
        except* FanfoldError as errors:
            raise errors.exceptions[0] from None
        finally:
            self._endpoints_file.close()
            why = "stopped" if self._control.stop.is_set() else "given up"
            self._event_log.append("end", why=why)
        if not self._control.stop.is_set():
            raise BackendError(self._write_failure())
        self._control.report(f"{self._plan.host}: all servers have ended")

    def _beginning(self) -> str:
        ports = [server.plan.port for server in self._servers]
        many = f"{len(ports)} servers, ports {ports[0]} to {ports[-1]}"
        what = many if len(ports) > 1 else f"a server, port {ports[0]}"
        logs = node_files(self._plan).event_log.parent
        return f"{self._plan.host}: starting {what}; logs: {logs}"

    async def _wait_until_done(self, lives: Sequence[asyncio.Task[None]]) -> None:
        """Wait until told to stop, or until no server lives; tell of each that is given up."""
        stop = asyncio.ensure_future(self._control.stop.wait())
        try:
            while not stop.done() and (alive := {task for task in lives if not task.done()}):
                await asyncio.wait({stop, *alive}, return_when=asyncio.FIRST_COMPLETED)
                if all(task.done() for task in lives):
                    return  # the error tells of all
                for server, task in zip(self._servers, lives, strict=True):
                    if task in alive and task.done():
                        self._control.report(server.failure or server.name)
        finally:
            stop.cancel()

    async def _publish_endpoints(self) -> None:
        """Keep the endpoints file equal to what is ready."""
        while True:
            await self._changed.wait()
            self._changed.clear()
            names = [server.name for server in self._servers if server.ready]
            try:
                await asyncio.to_thread(self._endpoints_file.write, names)
            except OSError as error:
                path = node_files(self._plan).endpoints
                self._control.report(f"{path}: cannot be written, tried again: {error.strerror}")
                await asyncio.sleep(self._plan.watching.every_s)
                self._changed.set()

    async def _send_heartbeats(self) -> None:
        """Look after the watcher, and note that the node lives."""
        loop, said = asyncio.get_running_loop(), float("-inf")
        while True:
            await self._watchdog.ensure_running()
            if loop.time() - said >= _ALIVE_S:
                said = loop.time()
                self._event_log.append("alive", ready=sum(server.ready for server in self._servers))
            await asyncio.sleep(self._plan.watching.every_s)

    def _write_failure(self) -> str:
        """Return why no server is left, and leave it for whoever wants to serve next."""
        reasons = "\n".join(server.failure or server.name for server in self._servers)
        text = f"{self._plan.host}: no server is left\n{reasons}"
        with suppress(OSError):  # the error itself says it as well
            node_files(self._plan).failure.write_text(text, encoding="utf-8")
        return text


_STANDBY_S: Final = 1.0
_LOOK_S: Final = 1.0


async def serve_or_standby(plan: NodePlan, orders: SupervisorControl) -> None:
    """Serve a node until told to stop.

    Where another process serves it already, nothing is started; this one stands by, and takes
    over when the other has ended. What a worker has started ends with this one, or when the last
    worker has left.

    Raises:
        BackendError: All servers were given up; with the last lines of each.
        ConfigurationError: The servers folder cannot be made.
    """
    files = node_files(plan)
    await asyncio.to_thread(files.create_folders)
    async with hold_user_lock(files):
        lock = await _acquire_lock(plan, files, orders)
        if lock is not None:
            await run_supervisor(plan, lock, orders)
            return
    if await asyncio.to_thread(is_on_demand, files):
        orders.report(
            f"{plan.host}: the servers that a worker has started end with the last worker"
        )
        await _stop_on_demand(files, orders)


async def _acquire_lock(
    plan: NodePlan, files: NodeFiles, orders: SupervisorControl
) -> NodeLock | None:
    """Wait for the right to serve the node; None when told to stop before."""
    told = False
    while not orders.stop.is_set():
        lock = await asyncio.to_thread(NodeLock.acquire_with_retries, files)
        if lock is not None:
            return lock
        if not told:
            who = await asyncio.to_thread(read_owner, files)
            orders.report(f"{plan.host}: is served already, by {who}; standing by")
            told = True
        await _wait_event(orders.stop, _STANDBY_S)
    return None


async def _stop_on_demand(files: NodeFiles, orders: SupervisorControl) -> None:
    """Have the servers that a worker has started end, and wait for that unless in a hurry."""
    while await asyncio.to_thread(is_on_demand, files):
        await asyncio.to_thread(request_stop_when_unused, files)  # again: it may just have begun
        if orders.stop_waiting.is_set():
            return
        await _wait_event(orders.stop_waiting, _LOOK_S)


async def serve_on_demand(plan: NodePlan, lock: NodeLock, orders: SupervisorControl) -> None:
    """Serve a node for as long as somebody uses it.

    Args:
        plan: What to serve.
        lock: The right to do so; it is given back at the end.
        orders: What the process is told from outside.

    Raises:
        BackendError: All servers were given up; with the last lines of each.
    """
    users = await asyncio.to_thread(NodeUsers, node_files(plan))
    watch = asyncio.create_task(_stop_when_unused(users, plan.linger_s, orders))
    try:
        await run_supervisor(plan, lock, orders)
    finally:
        watch.cancel()
        users.close()


async def _stop_when_unused(users: NodeUsers, linger_s: float, orders: SupervisorControl) -> None:
    """Order a stop when nobody has used the servers for a while."""
    loop = asyncio.get_running_loop()
    used = loop.time()
    while True:
        if users.has_users():
            used = loop.time()
        elif (
            users.is_stop_requested() or loop.time() - used >= linger_s
        ) and users.try_block_users():
            orders.report(f"nobody has used the servers for {loop.time() - used:.0f} s")
            orders.stop.set()
            return
        await asyncio.sleep(min(_LOOK_S, max(0.05, linger_s / 4)))


async def _wait_event(event: asyncio.Event, timeout_s: float) -> None:
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait({waiting}, timeout=timeout_s)
    waiting.cancel()
