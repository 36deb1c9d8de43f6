"""Supervise one model server: wait until it is ready, watch it, restart it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_result,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
)

from ..core.errors import BackendError
from .events import EventLog
from .lock import WatchdogClient
from .plan import NodePlan, ServerPlan, node_files
from .server_process import ServerProcess, is_port_in_use, probe

_LONGEST_PAUSE_S: Final = 30.0
_FIRST_PROBE_S: Final = 0.1
_PROBE_GROWTH: Final = 1.5
_HTTP: Final = "HTTP "
_LOOPBACK: Final = "127.0.0.1"


@dataclass(frozen=True, slots=True)
class NodeState:
    """State that all servers of a node share.

    Attributes:
        plan: The node's plan.
        watchdog: Ends them if this process is killed.
        event_log: Log of their events.
        report: Shows the user a message.
        on_change: Called when a server becomes ready or stops being ready.
        stop_waiting: Set when nothing is to be waited for any more.
    """

    plan: NodePlan
    watchdog: WatchdogClient
    event_log: EventLog
    report: Callable[[str], None]
    on_change: Callable[[], None]
    stop_waiting: asyncio.Event


@dataclass(frozen=True, slots=True)
class _ServerExit:
    """How one start of a server ended.

    Attributes:
        reason: The reason, as text.
        lines: Its last output lines.
    """

    reason: str
    lines: list[str]


def _get_problem(state: RetryCallState) -> str:
    assert state.outcome is not None, "the server was probed"
    return str(state.outcome.result())


def _get_exit(state: RetryCallState) -> _ServerExit:
    assert state.outcome is not None, "the server has ended"
    end: _ServerExit = state.outcome.result()
    return end


class ServerSupervisor:
    """One server.

    Args:
        plan: The server's plan.
        node: State that all servers of the node share.

    Attributes:
        plan: As given.
        name: ``address:port``.
        ready: Whether its endpoint is to be listed.
        starts: How often it was started.
        failure: Why it is not restarted, with its last lines; or None.
    """

    def __init__(self, plan: ServerPlan, node: NodeState) -> None:
        self.plan, self._node = plan, node
        self.name = node.plan.server_address(plan)
        self.ready = False
        self.starts = 0
        self.failure: str | None = None
        self._restarts, self._was_ever_ready = 0, False

    async def run(self) -> None:
        """Keep it up until it is given up; if cancelled, end the process first.

        A server that fails before it was ever ready is given up at once: usually its command is
        wrong.
        """
        watching, most = self._node.plan.watching, self._node.plan.restarts
        retrying = AsyncRetrying(
            sleep=asyncio.sleep,
            retry=retry_if_result(lambda _: self._was_ever_ready),
            stop=stop_after_attempt(most + 1),
            wait=wait_exponential(watching.pause_s, _LONGEST_PAUSE_S),
            before_sleep=self._report_restart,
            retry_error_callback=_get_exit,
        )
        end: _ServerExit = await retrying(self._run_once)
        self._mark_failed(end)

    def _report_restart(self, state: RetryCallState) -> None:
        self._restarts = state.attempt_number
        most, end = self._node.plan.restarts, _get_exit(state)
        self._node.report(f"{self.name} {end.reason}; restart {self._restarts} of {most}")

    async def _run_once(self) -> _ServerExit:
        """Start it, and return when it is down again."""
        node, began = self._node, time.monotonic()
        if await self._is_port_in_use():
            taken = f"cannot be started: another process listens on port {self.plan.port}"
            return _ServerExit(taken, [])
        try:
            log = node_files(node.plan).server_log(self.plan.instance)
            process = await ServerProcess.start(self.plan, node.watchdog, log)
        except BackendError as error:
            return _ServerExit(f"cannot be started: {error.message}", [])
        self.starts += 1
        self._log_event("start", port=self.plan.port, pid=process.pid, restart=self._restarts)
        try:
            why = await self._wait_until_ready(process, began)
            if why is None:
                self._was_ever_ready = True
                why = await self._monitor(process, began)
        finally:
            self._mark_unready()
            await process.stop(node.plan.watching.stop_s, node.stop_waiting)
        return _ServerExit(why, await asyncio.to_thread(process.read_last_lines))

    async def _is_port_in_use(self) -> bool:
        port, wait_s = self.plan.port, self._node.plan.watching.answer_s
        for address in dict.fromkeys((_LOOPBACK, self._node.plan.address)):
            if await is_port_in_use(address, port, wait_s):
                return True
        return False

    async def _wait_until_ready(self, process: ServerProcess, began: float) -> str | None:
        """Wait until it is ready; return None, or why it will not be."""
        plan, reported = self._node.plan, ""
        ended = asyncio.ensure_future(process.wait_for_exit())

        async def probe_once() -> str | None:
            nonlocal reported
            problem = await self._probe()
            if problem and problem.startswith(_HTTP) and problem != reported:
                reported = problem
                self._node.report(f"{self.name} answers {plan.ready} with {problem}; still waiting")
            return problem

        async def wait(seconds: float) -> None:
            await asyncio.wait({ended}, timeout=seconds)

        retrying = AsyncRetrying(
            sleep=wait,
            retry=retry_if_result(lambda problem: problem is not None and not ended.done()),
            stop=stop_after_delay(began + plan.timeout_s - time.monotonic()),
            wait=wait_exponential(_FIRST_PROBE_S, plan.watching.every_s, _PROBE_GROWTH),
            retry_error_callback=_get_problem,
        )
        try:
            last: str | None = await retrying(probe_once)
            if ended.done():
                return f"{ended.result()} before it was ready"
            return last and (
                f"was not ready after {plan.timeout_s:g} s: {plan.ready}: {last} (does it "
                f"listen on {plan.address}?)"
            )
        finally:
            ended.cancel()

    async def _monitor(self, process: ServerProcess, began: float) -> str:
        """Monitor it while it is ready; return why it no longer is."""
        up, seconds = time.monotonic(), round(time.monotonic() - began, 3)
        self._log_event("ready", seconds=seconds)
        self._mark_ready(f"{self.name} is ready after {seconds:.1f} s")
        ended = asyncio.ensure_future(process.wait_for_exit())
        try:
            why = await self._probe_until_down(ended)
        finally:
            ended.cancel()
        self._log_event("down", why=why, seconds=round(time.monotonic() - up, 3))
        return why

    async def _probe_until_down(self, ended: asyncio.Future[str]) -> str:
        watching, silent_since = self._node.plan.watching, None
        while True:
            await asyncio.wait({ended}, timeout=watching.every_s)
            if ended.done():
                return ended.result()
            probed_at = time.monotonic()
            problem = await self._probe()
            if problem is None:
                silent_since = None
                if not self.ready:
                    self._log_event("back")
                    self._mark_ready(f"{self.name} answers again")
                continue
            silent_since = silent_since or probed_at
            silent = time.monotonic() - silent_since
            if silent >= watching.dead_s:
                return f"no longer answers ({problem})"
            if silent >= watching.out_s and self.ready:
                self._log_event("out", why=problem)
                self._node.report(
                    f"{self.name} does not answer ({problem}); removed from the endpoints"
                )
                self._mark_unready()

    async def _probe(self) -> str | None:
        plan = self._node.plan
        wait_s = plan.watching.answer_s
        return await probe(plan.address, self.plan.port, plan.ready, wait_s, plan.key)

    def _mark_ready(self, text: str) -> None:
        self.ready = True
        self._node.report(text)
        self._node.on_change()

    def _mark_unready(self) -> None:
        if self.ready:
            self.ready = False
            self._node.on_change()

    def _mark_failed(self, end: _ServerExit) -> None:
        times = f" after {self._restarts} restarts" if self._restarts else ""
        lines = [f"{self.name} {end.reason}; it is given up{times}"]
        if end.lines:
            log = node_files(self._node.plan).server_log(self.plan.instance)
            lines.append(f"  its last output, from {log}:")
            lines += [f"  | {line}" for line in end.lines]
        self.failure = "\n".join(lines)
        self._log_event("given_up", why=end.reason)

    def _log_event(self, event: str, **what: object) -> None:
        self._node.event_log.append(event, instance=self.plan.instance, **what)
