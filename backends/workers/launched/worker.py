"""Run a worker: connect to the coordinator, run its tasks, exit with the connection."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
from contextlib import suppress
from importlib import import_module
from typing import Any, Final

import orjson
from tenacity import AsyncRetrying, retry_if_exception, stop_after_delay, wait_random

from ...core.connection_errors import describe_connection_error
from ...core.errors import BackendError, ConfigurationError, RunStoppedError
from ...core.lazy_tls import aiohttp
from ...core.messages import own_version
from ...core.process import TemporaryFolder
from ...core.terminal import escape_controls
from ...core.types import Json
from ..executor import WorkShard, run_in_thread
from .protocol import (
    CLOSE_REFUSED,
    MAX_MESSAGE_BYTES,
    TOKEN_ENV,
    URL_ENV,
    decode_message,
    encode_message,
)

_CONNECT_S: Final = 60.0
"""Seconds to retry the connection: thousands of workers connect at once."""
_PAUSE_S: Final = 2.0
_HEARTBEAT_SHARE: Final = 2 / 3
_NOT_FOR_WORKERS: Final = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""A terminal or a scheduler sends these to all processes; only the coordinator handles them."""


class TaskRunner:
    """Run tasks in a thread, one at a time, so that the connection stays responsive.

    Args:
        work: The function that runs a task.
        socket: The connection to the coordinator.

    Attributes:
        leave_reason: Why this worker cannot go on, though others may; or None.
    """

    def __init__(self, work: WorkShard, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._work, self._socket = work, socket
        self._running: asyncio.Task[None] | None = None
        self._temporary: TemporaryFolder | None = None
        self.leave_reason: str | None = None

    @property
    def is_busy(self) -> bool:
        """Return True if a task is running."""
        return self._running is not None and not self._running.done()

    async def handle_message(self, message: dict[str, Any]) -> None:
        """Handle a message of the coordinator.

        Raises:
            BackendError: Its kind is unknown.
        """
        if message["kind"] == "task" and isinstance(message.get("task"), dict):
            task = message["task"]
            if task.get("stop_file") is None:  # no shared folder
                task["stop_file"] = str(self._stop_file())
            self._running = asyncio.create_task(self._run_task(message["id"], task))
        elif message["kind"] == "stop":
            self._stop_file().touch()
        else:
            raise BackendError(
                f"the coordinator sent {message['kind']!r}, which this version does not support"
            )

    def _stop_file(self) -> Any:
        if self._temporary is None:
            self._temporary = TemporaryFolder("worker")
        return self._temporary.path / "stop"

    async def _run_task(self, number: int, task: dict[str, Json]) -> None:
        found = list[bytes]()

        def work() -> None:
            result = self._work(task)
            self.leave_reason = _fatal_reason(result)
            found.append(orjson.dumps(result))

        try:
            await run_in_thread(work)
        except Exception as error:  # noqa: BLE001 - sent to the coordinator
            answer = encode_message("failed", id=number, **_error_fields(error))
        else:
            leaves = self.leave_reason is not None
            result = orjson.Fragment(found[0])
            answer = encode_message("result", id=number, result=result, leaves=leaves)
        with suppress(ConnectionError):  # the coordinator has gone; this worker ends as well
            await self._socket.send_bytes(answer)
        if self.leave_reason is not None:
            # else it would take shards from workers that can run them
            await self._socket.close()

    def remove_folder(self) -> None:
        """Remove the folder of the stop file."""
        if self._temporary is not None:
            self._temporary.remove()


def _fatal_reason(result: dict[str, Json]) -> str | None:
    """Return why a worker cannot run further tasks, e.g. that it has no servers; or None."""
    error = result.get("error")
    if isinstance(error, dict) and error.get("class") == RunStoppedError.__name__:
        return str(error.get("text"))
    return None


def _error_fields(error: Exception) -> dict[str, str]:
    return {"class": type(error).__name__, "text": str(error)[:2000]}


async def run_worker(url: str, token: str, work: WorkShard, silence_s: float) -> None:
    """Run tasks of a coordinator until it closes the connection.

    Args:
        url: URL of the coordinator.
        token: Token for it.
        work: The function that runs a task.
        silence_s: Seconds without a heartbeat of the coordinator after which it counts as lost.

    Raises:
        BackendError: The coordinator cannot be reached, or refuses the worker.
    """
    refuse = aiohttp.TraceConfig()
    refuse.on_request_redirect.append(_refuse_redirect)
    # uses no proxy from the environment, and sends its token to the coordinator only
    async with aiohttp.ClientSession(trace_configs=[refuse]) as session:
        connection = await _connect(session, url, token, silence_s * _HEARTBEAT_SHARE)
        runner = TaskRunner(work, connection)
        try:
            host, pid = socket.gethostname(), os.getpid()
            await connection.send_bytes(
                encode_message("hello", fanfold=own_version(), host=host, pid=pid)
            )
            async for message in connection:
                if message.type is aiohttp.WSMsgType.BINARY:
                    await runner.handle_message(decode_message(message.data))
            if runner.leave_reason is not None:
                why = escape_controls(runner.leave_reason)
                sys.stderr.write(f"{host} pid {pid}: this worker exits: {why}\n")
            elif runner.is_busy:
                os._exit(1)  # the coordinator has gone, and the task may hang
        finally:
            runner.remove_folder()
        if connection.close_code == CLOSE_REFUSED:
            raise BackendError(
                f"the coordinator at {url} refused this worker (fanfold {own_version()})"
            )


async def _refuse_redirect(
    _session: aiohttp.ClientSession, _context: object, params: aiohttp.TraceRequestRedirectParams
) -> None:
    msg = (
        f"the coordinator at {params.url} answers HTTP {params.response.status}, a redirect, which "
        "workers do not follow; set backend.host to the name by which they reach the coordinator's "
        "machine"
    )
    raise BackendError(msg)


async def _connect(
    session: aiohttp.ClientSession, url: str, token: str, heartbeat_s: float
) -> aiohttp.ClientWebSocketResponse:
    async def connect() -> aiohttp.ClientWebSocketResponse:
        return await session.ws_connect(
            url,
            headers={"Authorization": f"Bearer {token}"},
            heartbeat=heartbeat_s,
            max_msg_size=MAX_MESSAGE_BYTES,
            compress=0,
        )

    retrying = AsyncRetrying(
        sleep=asyncio.sleep,
        retry=retry_if_exception(_is_unreachable),
        stop=stop_after_delay(_CONNECT_S),
        wait=wait_random(0, _PAUSE_S),  # not all at once
        reraise=True,
    )
    try:
        connection: aiohttp.ClientWebSocketResponse = await retrying(connect)
    except aiohttp.WSServerHandshakeError as error:
        msg = f"the coordinator at {url} refused this worker: {error.status} {error.message}"
        raise BackendError(msg) from error
    except (aiohttp.ClientError, TimeoutError) as error:
        msg = (
            f"{socket.gethostname()}: the coordinator at {url} cannot be reached: "
            f"{describe_connection_error(error)}; set backend.host to the name by which workers "
            "reach its machine"
        )
        raise BackendError(msg) from error
    return connection


def _is_unreachable(error: BaseException) -> bool:
    """Return True if a connection was not made, rather than refused."""
    failed = isinstance(error, (aiohttp.ClientError, TimeoutError))
    return failed and not isinstance(error, aiohttp.WSServerHandshakeError)


def main() -> None:
    """Run a worker: ``WORK SILENCE_S``; the environment names the coordinator."""
    for number in _NOT_FOR_WORKERS:
        signal.signal(number, signal.SIG_IGN)
    try:
        url, token = os.environ.get(URL_ENV), os.environ.pop(TOKEN_ENV, None)
        if not url or not token:
            msg = (
                f"{socket.gethostname()}: {URL_ENV} and {TOKEN_ENV} are not in this worker's "
                "environment; "
                "have the launcher pass them on (OpenMPI: -x)"
            )
            raise ConfigurationError(msg)
        asyncio.run(run_worker(url, token, _import_work(sys.argv[1]), float(sys.argv[2])))
    except (BackendError, ConfigurationError) as error:
        sys.exit(error.message)


def _import_work(name: str) -> WorkShard:
    """Import the function ``module:attr``.

    Raises:
        ConfigurationError: It cannot be imported.
    """
    module, _, attribute = name.partition(":")
    try:
        work: WorkShard = getattr(import_module(module), attribute)
    except (ImportError, AttributeError) as error:
        msg = f"{socket.gethostname()}: {name} cannot be imported: {error}; install fanfold there"
        raise ConfigurationError(msg) from error
    return work
