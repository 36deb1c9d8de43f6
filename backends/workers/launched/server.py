"""Serve tasks to workers over WebSocket connections."""

from __future__ import annotations

import asyncio
import hmac
import logging
import secrets
import socket
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from typing import Any, Final

from aiohttp import WSMsgType, web

from ...core.errors import BackendError, ConfigurationError, FanfoldError, WorkerLostError
from ...core.types import Json
from .protocol import CLOSE_REFUSED, MAX_MESSAGE_BYTES, VERSION, decode_message, encode_message

_SEND_S: Final = 5.0
_CANNOT_LOAD: Final = ("ImportError", "ModuleNotFoundError", "AttributeError")


class OpenTask:
    """A task without a result: it waits for a worker, or runs.

    Args:
        task: The task.

    Attributes:
        answer: The worker's result, once there is one.
    """

    def __init__(self, task: dict[str, Json]) -> None:
        self.task = task
        self.answer: asyncio.Future[dict[str, Json]] = asyncio.get_running_loop().create_future()

    def fail(self, error: FanfoldError) -> None:
        """Raise an error in the caller that waits for the result."""
        if not self.answer.done():
            self.answer.set_exception(error)


class WorkerConnection:
    """A connected worker.

    Args:
        name: Host and process.
        socket: The connection to it.
    """

    def __init__(self, name: str, socket: web.WebSocketResponse) -> None:
        self.name = name
        self._socket = socket
        self._task: OpenTask | None = None
        self._number, self._is_leaving = 0, False

    @property
    def is_free(self) -> bool:
        """Return True if it is idle and accepts tasks."""
        return self._task is None and not self._is_leaving and not self._socket.closed

    def assign(self, pending: OpenTask) -> bytes:
        """Assign a task to the worker, and return the message to send."""
        self._task, self._number = pending, self._number + 1
        return encode_message("task", id=self._number, task=pending.task)

    async def send(self, message: bytes) -> None:
        """Send a message; close the connection if that fails."""
        try:
            await self._socket.send_bytes(message)
        except (ConnectionError, RuntimeError):  # RuntimeError: the connection is being closed
            await self._socket.close()

    async def stop(self) -> None:
        """Ask the worker to begin no further item; bounded."""
        sending = asyncio.ensure_future(self.send(encode_message("stop")))
        await asyncio.wait({sending}, timeout=_SEND_S)
        sending.cancel()

    def receive(self, message: dict[str, Any]) -> None:
        """Handle an answer.

        Raises:
            BackendError: It does not answer the worker's task.
        """
        pending, kind = self._task, message["kind"]
        if pending is None or message.get("id") != self._number:
            raise BackendError(f"{self.name}: sent {kind!r} for a task that it does not have")
        if kind == "result" and isinstance(message.get("result"), dict):
            self._task, self._is_leaving = None, message.get("leaves") is True
            if not pending.answer.done():
                pending.answer.set_result(message["result"])
        elif kind == "failed":
            self._task = None
            pending.fail(self._make_error(str(message.get("class")), str(message.get("text"))))
        else:
            raise BackendError(f"{self.name}: sent a message of the unknown kind {kind!r}")

    def _make_error(self, name: str, text: str) -> FanfoldError:
        if name in _CANNOT_LOAD:
            msg = f"{self.name}: cannot load fanfold: {text}; install it where workers run"
            return ConfigurationError(msg)
        return WorkerLostError(f"{self.name}: {name}: {text}")

    def mark_lost(self, reason: str) -> None:
        """Mark the worker as lost, with its task."""
        pending, self._task = self._task, None
        if pending is not None:
            pending.fail(WorkerLostError(f"{self.name}: {reason}"))

    async def close(self) -> None:
        """Close the connection, which ends the worker; bounded."""
        closing = asyncio.ensure_future(self._socket.close())
        await asyncio.wait({closing}, timeout=_SEND_S)
        closing.cancel()


logger = logging.getLogger(__name__)

_BACKLOG: Final = 4096
"""Workers of thousands of nodes connect within the same second."""
_ACCEPT_BACKLOG: Final = 64
"""asyncio accepts this many in a row, even without free file descriptors, and logs each failure."""
_HELLO_S: Final = 60.0
_CLOSE_S: Final = 5.0
_HEARTBEAT_SHARE: Final = 2 / 3
"""Share of ``silence_s``: aiohttp pings this often, and waits half as long for the answer."""


class WorkerServer:
    """A WebSocket server in the coordinator, with its own token.

    A task goes to an idle worker; a worker has one at a time.

    Args:
        host: Name or address by which workers reach this machine.
        silence_s: Seconds without a heartbeat after which a connection counts as ended.

    Attributes:
        token: The token that workers send.
        url: URL for workers; empty while the server is closed.
        any_worker: Set while a worker is connected.
        refusal: Done when a worker runs an incompatible version, with the error.
    """

    def __init__(self, host: str, silence_s: float) -> None:
        self.token, self.url = secrets.token_urlsafe(32), ""
        self.any_worker = asyncio.Event()
        self.refusal: asyncio.Future[ConfigurationError]
        self.refusal = asyncio.get_running_loop().create_future()
        self._host, self._silence_s = host, silence_s
        self._connections = dict[WorkerConnection, None]()  # in order of arrival
        self._pending = deque[OpenTask]()
        self._sending = set[asyncio.Task[None]]()
        self._runner: web.AppRunner | None = None

    @property
    def worker_count(self) -> int:
        """Return how many workers are connected."""
        return len(self._connections)

    @property
    def is_idle(self) -> bool:
        """Return True if workers are connected and all are idle."""
        return bool(self._connections) and all(worker.is_free for worker in self._connections)

    async def open(self) -> None:
        """Open the server on a free port.

        Raises:
            ConfigurationError: The host is not a name or address of this machine.
        """
        bound = await _bind_socket(self._host)
        app = web.Application()
        app.router.add_get("/", self._handle_worker)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSE_S)
        await self._runner.setup()
        await web.SockSite(self._runner, bound, backlog=_ACCEPT_BACKLOG).start()
        bound.listen(_BACKLOG)
        address, port = bound.getsockname()[:2]
        self.url = f"http://[{address}]:{port}/" if ":" in address else f"http://{address}:{port}/"

    async def _handle_worker(self, request: web.Request) -> web.WebSocketResponse:
        """Serve one worker until its connection ends."""
        header = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(header, f"Bearer {self.token}".encode()):
            raise web.HTTPUnauthorized(text="this server belongs to another run")
        heartbeat_s = self._silence_s * _HEARTBEAT_SHARE
        socket = web.WebSocketResponse(
            timeout=_CLOSE_S, heartbeat=heartbeat_s, max_msg_size=MAX_MESSAGE_BYTES, compress=False
        )
        await socket.prepare(request)
        worker = await self._accept_hello(socket)
        if worker is None:
            return socket
        self._connections[worker] = None
        self.any_worker.set()
        reason = "its connection ended"
        try:
            self._assign_tasks()
            async for message in socket:
                if message.type is WSMsgType.BINARY:
                    worker.receive(decode_message(message.data))
                    self._assign_tasks()
        except BackendError as error:
            reason = error.message
            logger.warning("%s: %s", worker.name, reason)
        finally:
            self._remove(worker, reason)
        await socket.close(code=CLOSE_REFUSED)  # no effect if it has ended
        return socket

    async def _accept_hello(self, socket: web.WebSocketResponse) -> WorkerConnection | None:
        """Wait for a worker's hello; None if it sends another message or runs another version."""
        try:
            hello = decode_message(await socket.receive_bytes(timeout=_HELLO_S))
        except (BackendError, TypeError, TimeoutError):  # TypeError: it disconnected, or sent text
            await socket.close(code=CLOSE_REFUSED, message=b"say hello first")
            return None
        name = f"{hello.get('host')}:{hello.get('pid')}"
        if hello["kind"] == "hello" and hello.get("v") == VERSION:
            return WorkerConnection(name, socket)
        msg = (
            f"{name}: this worker runs fanfold {hello.get('fanfold')}, which uses another "
            "version of the worker protocol; install the same version on both"
        )
        if not self.refusal.done():
            self.refusal.set_result(ConfigurationError(msg))
        await socket.close(code=CLOSE_REFUSED, message=b"another version of fanfold")
        return None

    def _remove(self, worker: WorkerConnection, reason: str) -> None:
        del self._connections[worker]
        worker.mark_lost(reason)
        if not self._connections:
            self.any_worker.clear()
            self._fail_pending(f"no worker is left; the last one was {worker.name}")

    def _fail_pending(self, reason: str) -> None:
        while self._pending:
            self._pending.popleft().fail(WorkerLostError(reason))

    def _assign_tasks(self) -> None:
        """Assign pending tasks to idle workers."""
        for worker in self._connections:
            while self._pending and self._pending[0].answer.done():
                self._pending.popleft()  # its caller was cancelled
            if not self._pending:
                return
            if worker.is_free:
                self._send_in_background(worker.send(worker.assign(self._pending.popleft())))

    def _send_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def run_task(self, task: dict[str, Json]) -> dict[str, Json]:
        """Run one task on an idle worker.

        Raises:
            WorkerLostError: The worker's connection ended, or the task raised an error.
            ConfigurationError: The worker cannot load fanfold.
            BackendError: No worker is connected.
        """
        if not self._connections:
            raise BackendError("no worker is connected")
        pending = OpenTask(task)
        self._pending.append(pending)
        self._assign_tasks()
        try:
            return await pending.answer
        finally:
            pending.answer.cancel()

    async def stop(self) -> None:
        """Ask all workers to begin no further item; bounded."""
        await asyncio.gather(*(worker.stop() for worker in self._connections))

    async def close(self) -> None:
        """Close all connections, which ends the workers; bounded."""
        runner, self._runner, self.url = self._runner, None, ""
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()  # accepts no more workers
        self._fail_pending("the coordinator is closing the connection")
        await asyncio.gather(*(worker.close() for worker in list(self._connections)))
        for task in list(self._sending):
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        await runner.cleanup()
        for worker in list(self._connections):  # its handler was cancelled
            with suppress(KeyError):
                self._remove(worker, "the coordinator closed the connection")


async def _bind_socket(host: str) -> socket.socket:
    """Return a socket on a free port of an address of this machine.

    Raises:
        ConfigurationError: The host is not a name or address of this machine.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host, 0, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.bind(address)
        except OSError:
            bound.close()
            raise
    except OSError as error:
        msg = (
            f"backend.host: {host!r} is not a name or an address of this machine: "
            f"{error.strerror}; set the one by which workers reach it (FANFOLD_COORDINATOR_HOST in "
            "a job)"
        )
        raise ConfigurationError(msg) from error
    return bound
