"""Run one model server: process, log, readiness probe and restarts."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
import time
from asyncio import StreamReader
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tenacity import (
    AsyncRetrying,
    RetryCallState,
    retry_if_result,
    stop_after_attempt,
    stop_after_delay,
    wait_exponential,
)

from ..core.aio import wait_first
from ..core.errors import BackendError
from .events import EventLog
from .lock import WatchdogClient
from .plan import NodePlan, ServerPlan, node_files
from .watchdog import is_alive

_OK: Final = range(200, 300)
_LONGEST_LINE: Final = 16_384
_MAX_BYTES: Final = 8 * 1024 * 1024
"""Most bytes of an answer that are read; vLLM's metrics take some ten thousand."""


async def probe(
    address: str, port: int, path: str, timeout_s: float, key: str | None
) -> str | None:
    """Check whether a server is ready.

    Args:
        address: Host name or address.
        port: Port.
        path: Path of the request.
        timeout_s: Longest wait, in seconds.
        key: Key to send, or None.

    Returns:
        None if the server is ready; else the problem.
    """
    try:
        async with (
            asyncio.timeout(timeout_s),
            _open_response(address, port, path, key) as (status, _),
        ):
            pass
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        return f"no answer: {reason or error}"
    return None if status in _OK else f"HTTP {status}"


async def fetch(
    address: str, port: int, path: str, timeout_s: float, key: str | None
) -> tuple[int, bytes] | None:
    """Fetch a text from a server.

    Args:
        address: Host name or address.
        port: Port.
        path: Path of the request.
        timeout_s: Longest wait, in seconds.
        key: Key to send, or None.

    Returns:
        The status and the body; None if there is no complete answer.
    """
    try:
        async with (
            asyncio.timeout(timeout_s),
            _open_response(address, port, path, key) as (status, reader),
        ):
            return status, await _body(reader)
    except (OSError, ValueError, EOFError):  # TimeoutError is an OSError
        return None


@asynccontextmanager
async def _open_response(
    address: str, port: int, path: str, key: str | None
) -> AsyncIterator[tuple[int, StreamReader]]:
    """Send a request, and yield the status and the reader after the first line."""
    reader, writer = await asyncio.open_connection(address, port, limit=_LONGEST_LINE)
    try:
        name = f"[{address}]" if ":" in address else address
        lines = [f"GET {path} HTTP/1.1", f"Host: {name}:{port}", "Connection: close"]
        lines += [f"Authorization: Bearer {key}"] if key else []
        writer.write("\r\n".join([*lines, "", ""]).encode())
        first = await reader.readline()
        words = first.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/"):  # noqa: PLR2004 - HTTP/1.1 200
            raise ValueError("no HTTP server listens there")
        yield int(words[1]), reader
    finally:
        writer.close()
        with suppress(OSError):
            await writer.wait_closed()


async def _body(reader: StreamReader) -> bytes:
    """Return the body of an answer: of a given length, in chunks, or until its end.

    Raises:
        ValueError: It is not HTTP, or too long.
        IncompleteReadError: It is cut off.
    """
    headers = dict[bytes, bytes]()
    while line := (await reader.readline()).strip():
        name, _, value = line.partition(b":")
        headers[name.lower()] = value.strip().lower()
    if headers.get(b"transfer-encoding") == b"chunked":
        return await _chunks(reader)
    length = headers.get(b"content-length")
    return await _read(
        reader, _MAX_BYTES if length is None else int(length), whole=length is not None
    )


async def _chunks(reader: StreamReader) -> bytes:
    parts, left = list[bytes](), _MAX_BYTES
    while size := int((await reader.readline()).partition(b";")[0], 16):
        parts.append(await _read(reader, size, whole=True, most=left))
        left -= size
        await reader.readline()
    return b"".join(parts)


async def _read(reader: StreamReader, size: int, *, whole: bool, most: int = _MAX_BYTES) -> bytes:
    if size > most:
        raise ValueError("the answer is too long")
    if whole:
        return await reader.readexactly(size)
    parts = list[bytes]()
    while size > 0 and (part := await reader.read(size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


async def is_port_in_use(address: str, port: int, timeout_s: float) -> bool:
    """Return True if a process listens on a port."""
    try:
        async with asyncio.timeout(timeout_s):
            _, writer = await asyncio.open_connection(address, port)
    except (OSError, TimeoutError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True


_WAIT_SCRIPT: Final = 'trap "" USR1 USR2; read -r _ && exec "$@" </dev/null'
"""Waits for a line, then becomes the server.

If this process is killed before the watchdog has registered the server, none starts. Signals that
ask a run to drain are not for servers.
"""

_COLOUR: Final = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
_TAIL_BYTES: Final = 16_384
_TAIL_LINES: Final = 20
_TICK_S: Final = 0.1
_KILLED_S: Final = 10.0


class ServerProcess:
    """A running server.

    Args:
        process: Its process, the leader of its own process group.
        watchdog: Ends it if this process is killed.
        log: Log of its output.
        begin: Offset in the log where this start begins, in bytes.
    """

    def __init__(self, process: Process, watchdog: WatchdogClient, log: Path, begin: int) -> None:
        self._process, self._watchdog = process, watchdog
        self._log, self._begin = log, begin
        self.pid = process.pid

    @classmethod
    async def start(cls, plan: ServerPlan, watchdog: WatchdogClient, log: Path) -> ServerProcess:
        """Start a server.

        Raises:
            BackendError: The program does not exist, or the log cannot be written.
        """
        environment = os.environ | plan.env
        program = await asyncio.to_thread(
            shutil.which, plan.command[0], path=environment.get("PATH")
        )
        if program is None:
            msg = f"node.serve: there is no program {plan.command[0]!r} on this node's PATH"
            raise BackendError(msg)
        handle, begin = await asyncio.to_thread(_open_log, log)
        try:
            process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", _WAIT_SCRIPT, "sh", program, *plan.command[1:]),
                stdin=PIPE,
                stdout=handle,
                stderr=STDOUT,
                env=environment,
                start_new_session=True,
            )
        except OSError as error:
            raise BackendError(f"node.serve: cannot be started: {error.strerror}") from None
        finally:
            os.close(handle)
        await cls._release_process(process, watchdog)
        return cls(process, watchdog, log, begin)

    @staticmethod
    async def _release_process(process: Process, watchdog: WatchdogClient) -> None:
        """Let a process become the server, once the watchdog has registered it."""
        assert process.stdin is not None, "it was opened as a pipe"
        try:
            await watchdog.add(process.pid)
            with suppress(ConnectionError):  # it was killed, which wait_for_exit reports
                process.stdin.write(b"\n")
                await process.stdin.drain()
        except BaseException:
            process.kill()
            await process.wait()
            raise
        finally:
            process.stdin.close()

    async def wait_for_exit(self) -> str:
        """Wait for its exit, and return how it ended."""
        code = await self._process.wait()
        if code >= 0:
            return f"ended with exit code {code}"
        try:
            return f"was ended by {signal.Signals(-code).name}"
        except ValueError:
            return f"was ended by signal {-code}"

    async def stop(self, grace_s: float, stop_waiting: asyncio.Event) -> None:
        """End the process group within ``grace_s``; kill it at once if ``stop_waiting`` is set."""
        self._send(signal.SIGTERM)
        ended = asyncio.ensure_future(self._wait_group_end())
        try:
            await wait_first(ended, stop_waiting.wait(), timeout_s=grace_s)
        finally:
            self._send(signal.SIGKILL)
            # its child processes may hold ports and memory a moment longer
            await asyncio.wait({ended}, timeout=_KILLED_S)
            ended.cancel()
            await self._watchdog.remove(self.pid)

    async def _wait_group_end(self) -> None:
        """Wait until its process group has no member left."""
        await self._process.wait()
        while await asyncio.to_thread(is_alive, self.pid):  # noqa: ASYNC110 - there is no event for it
            await asyncio.sleep(_TICK_S)

    def _send(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.pid, number)

    def read_last_lines(self) -> list[str]:
        """Return the last output lines since this start; blocks."""
        try:
            with self._log.open("rb") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(self._begin, end - _TAIL_BYTES))
                text = file.read().decode(errors="replace")
        except OSError as error:
            return [f"(its log {self._log} cannot be read: {error.strerror})"]
        return [_plain(line) for line in text.splitlines() if line.strip()][-_TAIL_LINES:]


def _plain(line: str) -> str:
    """Return a line without colours and other control characters."""
    line = _COLOUR.sub("", line)
    return "".join(c if c.isprintable() or c == "\t" else " " for c in line).rstrip()


def _open_log(log: Path) -> tuple[int, int]:
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    except OSError as error:
        raise BackendError(f"{log}: cannot be written: {error.strerror}") from None
    return handle, os.fstat(handle).st_size


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
