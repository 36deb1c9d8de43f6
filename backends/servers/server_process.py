"""One model server: its process and log, and the requests that ask whether it is ready."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import signal
from asyncio import StreamReader
from asyncio.subprocess import PIPE, STDOUT, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Final

from ..core.aio import wait_first
from ..core.errors import BackendError
from .lock import WatchdogClient
from .plan import ServerPlan
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
