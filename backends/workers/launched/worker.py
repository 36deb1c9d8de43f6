"""The worker's side: it comes to the desk, works on what it is given, and goes with the desk."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sys
import time
from contextlib import suppress
from importlib import import_module
from typing import Any, Final

import orjson
from aiohttp import (
    ClientError,
    ClientSession,
    ClientWebSocketResponse,
    TraceConfig,
    TraceRequestRedirectParams,
    WSMsgType,
    WSServerHandshakeError,
)

from ...core.errors import BackendError, ConfigurationError, RunStoppedError
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
"""So long a desk is looked for: thousands of workers come at once."""
_PAUSE_S: Final = 2.0
_BEAT: Final = 2 / 3
_NOT_FOR_WORKERS: Final = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
"""A terminal or a scheduler sends these to everybody; the coordinator heeds them."""


class TaskRunner:
    """Works on orders in a thread of its own, one at a time, so that the connection is heard.

    Args:
        work: What works on an order.
        line: The connection to the desk.

    Attributes:
        leave_reason: Why nothing goes on at this worker, though others may go on; or None.
    """

    def __init__(self, work: WorkShard, line: ClientWebSocketResponse) -> None:
        self._work, self._socket = work, line
        self._running: asyncio.Task[None] | None = None
        self._scratch: TemporaryFolder | None = None
        self.leave_reason: str | None = None

    @property
    def is_busy(self) -> bool:
        """Say whether an order is in work."""
        return self._running is not None and not self._running.done()

    async def handle_message(self, message: dict[str, Any]) -> None:
        """Do what the desk says.

        Raises:
            BackendError: It cannot be understood.
        """
        if message["kind"] == "task" and isinstance(message.get("task"), dict):
            order = message["task"]
            if order.get("stop_file") is None:  # nobody shares a folder with us
                order["stop_file"] = str(self._stop_file())
            self._running = asyncio.create_task(self._run_task(message["id"], order))
        elif message["kind"] == "stop":
            self._stop_file().touch()
        else:
            raise BackendError(
                f"the desk says {message['kind']!r}, which this fanfold does not know"
            )

    def _stop_file(self) -> Any:
        if self._scratch is None:
            self._scratch = TemporaryFolder("worker")
        return self._scratch.path / "stop"

    async def _run_task(self, number: int, order: dict[str, Json]) -> None:
        found = list[bytes]()

        def work() -> None:
            summary = self._work(order)
            self.leave_reason = _fatal_reason(summary)
            found.append(orjson.dumps(summary))

        try:
            await run_in_thread(work)
        except Exception as error:  # noqa: BLE001 - whatever it is, the coordinator has to know
            answer = encode_message("failed", id=number, **_error_fields(error))
        else:
            leaves = self.leave_reason is not None
            summary = orjson.Fragment(found[0])
            answer = encode_message("result", id=number, result=summary, leaves=leaves)
        with suppress(ConnectionError):  # the desk has gone, and so do we
            await self._socket.send_bytes(answer)
        if self.leave_reason is not None:  # it would take shard after shard from those who can work
            await self._socket.close()

    def remove_folder(self) -> None:
        """Remove the folder of the stop file."""
        if self._scratch is not None:
            self._scratch.remove()


def _fatal_reason(summary: dict[str, Json]) -> str | None:
    """Return what a worker says when it is hopeless to ask on, e.g. that it has no servers."""
    error = summary.get("error")
    if isinstance(error, dict) and error.get("class") == RunStoppedError.__name__:
        return str(error.get("text"))
    return None


def _error_fields(error: Exception) -> dict[str, str]:
    return {"class": type(error).__name__, "text": str(error)[:2000]}


async def run_worker(url: str, token: str, work: WorkShard, silence_s: float) -> None:
    """Work for a desk until it ends the connection.

    Args:
        url: Where the desk is.
        token: What to show there.
        work: What works on an order.
        silence_s: Seconds without a sign of life of the desk after which it counts as gone.

    Raises:
        BackendError: The desk cannot be reached, or wants nobody.
    """
    refuse = TraceConfig()
    refuse.on_request_redirect.append(_refuse_redirect)
    # takes no proxy from the environment, and shows its token to the desk only
    async with ClientSession(trace_configs=[refuse]) as session:
        line = await _connect(session, url, token, silence_s * _BEAT)
        attendant = TaskRunner(work, line)
        try:
            host, pid = socket.gethostname(), os.getpid()
            await line.send_bytes(
                encode_message("hello", fanfold=own_version(), host=host, pid=pid)
            )
            async for message in line:
                if message.type is WSMsgType.BINARY:
                    await attendant.handle_message(decode_message(message.data))
            if attendant.leave_reason is not None:
                why = escape_controls(attendant.leave_reason)
                sys.stderr.write(f"{host} pid {pid}: this worker leaves: {why}\n")
            elif attendant.is_busy:
                os._exit(1)  # it has nobody to work for, and an order may hang
        finally:
            attendant.remove_folder()
        if line.close_code == CLOSE_REFUSED:
            raise BackendError(
                f"the desk at {url} does not want this worker (fanfold {own_version()})"
            )


async def _refuse_redirect(
    _session: ClientSession, _context: object, params: TraceRequestRedirectParams
) -> None:
    msg = (
        f"the desk at {params.url} answers HTTP {params.response.status}, a redirect, which "
        "workers do not follow; set backend.host to the name by which they reach the coordinator's "
        "machine"
    )
    raise BackendError(msg)


async def _connect(
    session: ClientSession, url: str, token: str, beat_s: float
) -> ClientWebSocketResponse:
    began = time.monotonic()
    shown = {"Authorization": f"Bearer {token}"}
    while True:
        try:
            return await session.ws_connect(
                url, headers=shown, heartbeat=beat_s, max_msg_size=MAX_MESSAGE_BYTES, compress=0
            )
        except WSServerHandshakeError as error:
            msg = f"the desk at {url} refused this worker: {error.status} {error.message}"
            raise BackendError(msg) from error
        except (ClientError, TimeoutError) as error:
            if time.monotonic() - began > _CONNECT_S:
                msg = (
                    f"{socket.gethostname()}: the coordinator's desk at {url} cannot be reached: "
                    f"{error}; set backend.host to the name by which workers reach its machine"
                )
                raise BackendError(msg) from error
        await asyncio.sleep(random.uniform(0, _PAUSE_S))  # not all at once


def main() -> None:
    """Be a worker: ``WORK SILENCE_S``, the desk being named by the environment."""
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
    """Return what ``module:attr`` names.

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
