"""Supervise the servers of a node: start one task each, list them, and sample their load.

`server_supervisor.ServerSupervisor.run` restarts a server that ends.
"""

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

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_fixed

from ..core.aio import wait_first
from ..core.errors import BackendError, FanfoldError
from ..core.parsing import ServerLoad, parse_load_metrics
from .events import EventLog
from .lock import (
    NodeLock,
    NodeUsers,
    ServedModel,
    WatchdogClient,
    hold_user_lock,
    is_on_demand,
    read_owner,
    request_stop_when_unused,
    run_watchdog,
    write_served_model,
)
from .plan import NodeFiles, NodePlan, ServerFailure, node_files
from .server_process import fetch
from .server_supervisor import NodeState, ServerSupervisor


class EndpointsFile:
    """Write the endpoints file; the methods block.

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
            OSError: The file cannot be written; the old one is unchanged.
        """
        with self._lock:
            if self._closed:
                return
            if not names:
                self._path.unlink(missing_ok=True)
                return
            head = f"# ready servers of {self._host}; maintained by fanfold\n"
            partial = self._path.with_name(f".{self._path.name}.partial")
            partial.unlink(missing_ok=True)
            with partial.open("x", encoding="utf-8") as file:
                file.write(head + "".join(f"{name}\n" for name in names))
            partial.replace(self._path)

    def close(self) -> None:
        """Remove the file for good."""
        with self._lock:
            self._closed = True
            with suppress(OSError):  # the folder was removed with the file
                self._path.unlink(missing_ok=True)


_METRICS: Final = "/metrics"
_OK: Final = 200
_REFUSED: Final = range(400, 500)
_MAX_INTERVAL_S: Final = 60.0
"""Longest interval between two entries when nothing changes."""

_CHANGE_PART: Final = 32
"""A change is logged from this part of the largest load that a server has had."""

_MIN_INTERVAL_S: Final = 0.5
_INTERVAL_PART: Final = 60
"""Longest interval between samples as a part of the time served, for jobs of a minute."""

_LAST_S: Final = 1.0


class LoadSampler:
    """Sample the load of a node's servers, and log it.

    Args:
        plan: The node's plan.
        servers: Its servers, in the order of their numbers.
        event_log: Where the load is logged.
    """

    def __init__(
        self, plan: NodePlan, servers: Sequence[ServerSupervisor], event_log: EventLog
    ) -> None:
        self._plan, self._servers, self._event_log = plan, servers, event_log
        self._without_metrics = set[int]()
        self._most = 0
        self._recorded: list[tuple[int, ServerLoad] | None] = [None] * len(servers)
        self._when = float("-inf")

    async def run(self) -> None:
        """Sample until cancelled."""
        begun = time.monotonic()
        while True:
            await self.sample()
            pause = max(_MIN_INTERVAL_S, (time.monotonic() - begun) / _INTERVAL_PART)
            await asyncio.sleep(min(self._plan.watching.every_s, pause))

    async def sample(self) -> None:
        """Fetch the load of all ready servers, and log it if it has changed."""
        loads = await asyncio.gather(*map(self._fetch_load, self._servers))
        if not any(loads):
            return
        self._most = max(self._most, *(load.running or 0 for load in loads if load))
        both = zip(self._servers, loads, strict=True)
        now = [None if load is None else (server.starts, load) for server, load in both]
        pairs = zip(self._recorded, now, strict=True)
        if time.monotonic() - self._when < _MAX_INTERVAL_S and not any(
            self._has_changed(*p) for p in pairs
        ):
            return
        self._when = time.monotonic()
        self._recorded = [this or before for before, this in zip(self._recorded, now, strict=True)]
        self._event_log.append(
            "load",
            running=[load and load.running for load in loads],
            waiting=[load and load.waiting for load in loads],
        )

    async def sample_last(self) -> None:
        """Sample once more before the servers end; waits for a second at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(_LAST_S):
                await self.sample()

    async def _fetch_load(self, server: ServerSupervisor) -> ServerLoad | None:
        number, watching = server.plan.instance, self._plan.watching
        if not server.ready or number in self._without_metrics:
            return None
        address, key = self._plan.address, self._plan.key
        answer = await fetch(address, server.plan.port, _METRICS, watching.answer_s, key)
        if answer is None:
            return None
        status, body = answer
        if status in _REFUSED:
            self._without_metrics.add(number)
        gauges = parse_load_metrics(body) if status == _OK else None
        return gauges if gauges is not None and gauges.running is not None else None

    def _has_changed(
        self, before: tuple[int, ServerLoad] | None, now: tuple[int, ServerLoad] | None
    ) -> bool:
        """Return True if a server's load differs notably from its last entry since this start."""
        if now is None:
            return False
        if before is None or before[0] != now[0]:
            return True
        was, this = before[1], now[1]
        change = abs((this.running or 0) - (was.running or 0))
        return (
            bool(was.running) != bool(this.running)
            or bool(was.waiting) != bool(this.waiting)
            or change >= max(1, self._most / _CHANGE_PART)
        )


_ALIVE_INTERVAL_S: Final = 60.0


@dataclass(frozen=True, slots=True)
class SupervisorControl:
    """Control of a serving process from outside.

    Attributes:
        report: Shows the user a message.
        stop: Set when the servers are to end.
        stop_waiting: Set when nothing is to be waited for any more.
    """

    report: Callable[[str], None]
    stop: asyncio.Event = field(default_factory=asyncio.Event)
    stop_waiting: asyncio.Event = field(default_factory=asyncio.Event)


async def run_supervisor(plan: NodePlan, lock: NodeLock, control: SupervisorControl) -> None:
    """Serve a node until stopped.

    Args:
        plan: The servers.
        lock: The lock on the node; released at the end.
        control: Control from outside.

    Raises:
        BackendError: All servers were given up; with the last lines of each.
    """
    files, stack = node_files(plan), ExitStack()
    with stack:
        stack.callback(lock.release)
        event_log = await asyncio.to_thread(EventLog, files.event_log, plan.host)
        stack.callback(event_log.close)
        await asyncio.to_thread(files.failure.unlink, missing_ok=True)
        async with run_watchdog(files, lock, plan.watching.stop_s) as watchdog:
            await NodeSupervisor(plan, watchdog, event_log, control).run()


class NodeSupervisor:
    """Serve one node."""

    def __init__(
        self,
        plan: NodePlan,
        watchdog: WatchdogClient,
        event_log: EventLog,
        control: SupervisorControl,
    ) -> None:
        self._plan, self._watchdog, self._event_log, self._control = (
            plan,
            watchdog,
            event_log,
            control,
        )
        self._changed = asyncio.Event()
        node = NodeState(
            plan, watchdog, event_log, control.report, self._changed.set, control.stop_waiting
        )
        self._servers = [ServerSupervisor(server, node) for server in plan.servers]
        self._endpoints_file = EndpointsFile(node_files(plan).endpoints, plan.host)
        self._load_sampler = LoadSampler(plan, self._servers, event_log)

    async def run(self) -> None:
        """Serve until stopped."""
        self._event_log.append("begin", instances=len(self._servers), pid=os.getpid())
        self._control.report(self._beginning())
        self._changed.set()  # removes the file of a killed process
        try:
            async with asyncio.TaskGroup() as group:
                server_tasks = [group.create_task(server.run()) for server in self._servers]
                coroutines = (
                    self._publish_endpoints(),
                    self._send_heartbeats(),
                    self._load_sampler.run(),
                )
                helpers = [group.create_task(one) for one in coroutines]
                await self._wait_until_done(server_tasks)
                await asyncio.to_thread(self._endpoints_file.close)  # before its servers end
                await self._load_sampler.sample_last()
                for task in (*server_tasks, *helpers):
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

    async def _wait_until_done(self, server_tasks: Sequence[asyncio.Task[None]]) -> None:
        """Wait until stopped or until no server is left; report each that is given up."""
        stop = self._control.stop
        while not stop.is_set() and (alive := {task for task in server_tasks if not task.done()}):
            await wait_first(stop.wait(), *alive)
            if all(task.done() for task in server_tasks):
                return  # the error names all
            for server, task in zip(self._servers, server_tasks, strict=True):
                if task in alive and task.done():
                    self._control.report(server.failure or server.name)

    async def _publish_endpoints(self) -> None:
        """Keep the endpoints file equal to the list of ready servers."""
        retrying = AsyncRetrying(
            sleep=asyncio.sleep,
            retry=retry_if_exception_type(OSError),
            wait=wait_fixed(self._plan.watching.every_s),
            before_sleep=self._report_unwritten,
        )
        while True:
            await self._changed.wait()
            await retrying(self._write_endpoints)

    async def _write_endpoints(self) -> None:
        self._changed.clear()
        names = [server.name for server in self._servers if server.ready]
        await asyncio.to_thread(self._endpoints_file.write, names)

    def _report_unwritten(self, state: RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome is not None else None
        assert isinstance(error, OSError), "other errors are not retried"
        path = node_files(self._plan).endpoints
        self._control.report(f"{path}: cannot be written: {error.strerror}; trying again")

    async def _send_heartbeats(self) -> None:
        """Keep the watchdog running, and log that the node is alive."""
        loop, logged_at = asyncio.get_running_loop(), float("-inf")
        while True:
            await self._watchdog.ensure_running()
            if loop.time() - logged_at >= _ALIVE_INTERVAL_S:
                logged_at = loop.time()
                self._event_log.append("alive", ready=sum(server.ready for server in self._servers))
            await asyncio.sleep(self._plan.watching.every_s)

    def _write_failure(self) -> str:
        """Return why no server is left, and write it for the next process that wants to serve."""
        reasons = "\n".join(server.failure or server.name for server in self._servers)
        text = f"{self._plan.host}: no server is left\n{reasons}"
        with suppress(OSError):  # the error contains it as well
            ServerFailure(text, self._plan.compute_digest()).write(node_files(self._plan).failure)
        return text


_STANDBY_S: Final = 1.0
_POLL_S: Final = 1.0


async def serve_or_standby(plan: NodePlan, control: SupervisorControl) -> None:
    """Serve a node until stopped.

    If another process serves it already, nothing is started; this one stands by, and takes over
    when the other has ended. Servers that a worker has started end with this process, or when the
    last worker has left.

    Raises:
        BackendError: All servers were given up; with the last lines of each.
        ConfigurationError: The servers folder cannot be created.
    """
    files = node_files(plan)
    await asyncio.to_thread(files.create_folders)
    async with hold_user_lock(files):
        lock = await _acquire_lock(plan, files, control)
        if lock is not None:
            served = ServedModel(plan.model, False, plan.compute_servers_digest())
            await asyncio.to_thread(write_served_model, files, served)
            await run_supervisor(plan, lock, control)
            return
    if await asyncio.to_thread(is_on_demand, files):
        control.report(
            f"{plan.host}: the servers that a worker has started end with the last worker"
        )
        await _stop_on_demand(files, control)


async def _acquire_lock(
    plan: NodePlan, files: NodeFiles, control: SupervisorControl
) -> NodeLock | None:
    """Wait for the lock on the node; None if stopped before."""
    reported = False
    while not control.stop.is_set():
        lock = await asyncio.to_thread(NodeLock.acquire_with_retries, files)
        if lock is not None:
            return lock
        if not reported:
            owner = await asyncio.to_thread(read_owner, files)
            control.report(f"{plan.host}: is served already by {owner}; standing by")
            reported = True
        await _wait_event(control.stop, _STANDBY_S)
    return None


async def _stop_on_demand(files: NodeFiles, control: SupervisorControl) -> None:
    """Stop the servers that a worker started, and wait for their end or ``stop_waiting``."""
    while await asyncio.to_thread(is_on_demand, files):
        # repeated: it may just have started
        await asyncio.to_thread(request_stop_when_unused, files)
        if control.stop_waiting.is_set():
            return
        await _wait_event(control.stop_waiting, _POLL_S)


async def serve_on_demand(plan: NodePlan, lock: NodeLock, control: SupervisorControl) -> None:
    """Serve a node while it has users.

    Args:
        plan: The servers.
        lock: The lock on the node; released at the end.
        control: Control from outside.

    Raises:
        BackendError: All servers were given up; with the last lines of each.
    """
    users = await asyncio.to_thread(NodeUsers, node_files(plan))
    watch = asyncio.create_task(_stop_when_unused(users, plan.linger_s, control))
    try:
        await run_supervisor(plan, lock, control)
    finally:
        watch.cancel()
        users.close()


async def _stop_when_unused(users: NodeUsers, linger_s: float, control: SupervisorControl) -> None:
    """Set ``stop`` when the servers have had no user for a while."""
    loop = asyncio.get_running_loop()
    last_used = loop.time()
    while True:
        if users.has_users():
            last_used = loop.time()
        elif (
            users.is_stop_requested() or loop.time() - last_used >= linger_s
        ) and users.try_block_users():
            control.report(f"the servers were not used for {loop.time() - last_used:.0f} s")
            control.stop.set()
            return
        await asyncio.sleep(min(_POLL_S, max(0.05, linger_s / 4)))


async def _wait_event(event: asyncio.Event, timeout_s: float) -> None:
    waiting = asyncio.ensure_future(event.wait())
    await asyncio.wait({waiting}, timeout=timeout_s)
    waiting.cancel()
