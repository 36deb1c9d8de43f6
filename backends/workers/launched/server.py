"""WebSocket server: connections of workers, tasks to them."""

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

_SAY_S: Final = 5.0
_CANNOT_LOAD: Final = ("ImportError", "ModuleNotFoundError", "AttributeError")


class PendingTask:
    """An order that waits for a worker, or is in work.

    Args:
        task: The order.

    Attributes:
        answer: The worker's summary, once there is one.
    """

    def __init__(self, order: dict[str, Json]) -> None:
        self.task = order
        self.answer: asyncio.Future[dict[str, Json]] = asyncio.get_running_loop().create_future()

    def fail(self, error: FanfoldError) -> None:
        """Let whoever waits know that no summary comes."""
        if not self.answer.done():
            self.answer.set_exception(error)


class WorkerConnection:
    """A worker that has come.

    Args:
        name: Host and process.
        line: The connection to it.
    """

    def __init__(self, name: str, line: web.WebSocketResponse) -> None:
        self.name = name
        self._socket = line
        self._task: PendingTask | None = None
        self._number, self._is_leaving = 0, False

    @property
    def is_free(self) -> bool:
        """Say whether it has nothing to do, and takes what there is."""
        return self._task is None and not self._is_leaving and not self._socket.closed

    def assign(self, errand: PendingTask) -> bytes:
        """Give it an order, and return what is to be sent; it is busy from now on."""
        self._task, self._number = errand, self._number + 1
        return encode_message("task", id=self._number, task=errand.task)

    async def send(self, message: bytes) -> None:
        """Send a message; a connection that does not carry it is closed."""
        try:
            await self._socket.send_bytes(message)
        except (ConnectionError, RuntimeError):  # RuntimeError: the line is being closed
            await self._socket.close()

    async def stop(self) -> None:
        """Ask it to begin no further item; bounded."""
        sending = asyncio.ensure_future(self.send(encode_message("stop")))
        await asyncio.wait({sending}, timeout=_SAY_S)
        sending.cancel()

    def receive(self, message: dict[str, Any]) -> None:
        """Take an answer.

        Raises:
            BackendError: It is none to what the worker was asked.
        """
        errand, kind = self._task, message["kind"]
        if errand is None or message.get("id") != self._number:
            raise BackendError(f"{self.name}: answers {kind!r} to what it was not asked")
        if kind == "result" and isinstance(message.get("result"), dict):
            self._task, self._is_leaving = None, message.get("leaves") is True
            if not errand.answer.done():
                errand.answer.set_result(message["result"])
        elif kind == "failed":
            self._task = None
            errand.fail(self._make_error(str(message.get("class")), str(message.get("text"))))
        else:
            raise BackendError(f"{self.name}: says {kind!r}, which nobody understands here")

    def _make_error(self, name: str, text: str) -> FanfoldError:
        if name in _CANNOT_LOAD:
            msg = f"{self.name}: cannot load fanfold: {text}; install it where workers run"
            return ConfigurationError(msg)
        return WorkerLostError(f"{self.name}: {name}: {text}")

    def mark_lost(self, reason: str) -> None:
        """Note that it has gone, with what it had in work."""
        errand, self._task = self._task, None
        if errand is not None:
            errand.fail(WorkerLostError(f"{self.name}: {reason}"))

    async def close(self) -> None:
        """End its connection, and with that the worker; bounded."""
        closing = asyncio.ensure_future(self._socket.close())
        await asyncio.wait({closing}, timeout=_SAY_S)
        closing.cancel()


logger = logging.getLogger(__name__)

_BACKLOG: Final = 4096
"""Workers of thousands of nodes come within the same second."""
_AT_ONCE: Final = 64
"""asyncio tries to accept so many in a row, also where open files have run out, and logs each."""
_HELLO_S: Final = 60.0
_CLOSE_S: Final = 5.0
_BEAT: Final = 2 / 3
"""Of the silence that is borne: aiohttp pings so often, and waits half as long for the answer."""


class WorkerServer:
    """A WebSocket server in the coordinator, with a token of its own.

    An order goes to a worker that has nothing to do; a worker has one at a time.

    Args:
        host: Name or address of this machine by which workers reach it.
        silence_s: Seconds without a sign of life after which a connection counts as ended.

    Attributes:
        token: What workers show.
        url: Where they come to; empty while it is closed.
        any_worker: Set while a worker is there.
        refusal: Done when a worker cannot be understood, with the error.
    """

    def __init__(self, host: str, silence_s: float) -> None:
        self.token, self.url = secrets.token_urlsafe(32), ""
        self.any_worker = asyncio.Event()
        self.refusal: asyncio.Future[ConfigurationError]
        self.refusal = asyncio.get_running_loop().create_future()
        self._host, self._silence_s = host, silence_s
        self._connections = dict[WorkerConnection, None]()  # in the order in which they came
        self._pending = deque[PendingTask]()
        self._sending = set[asyncio.Task[None]]()
        self._runner: web.AppRunner | None = None

    @property
    def worker_count(self) -> int:
        """Return how many workers are there."""
        return len(self._connections)

    @property
    def is_idle(self) -> bool:
        """Say whether workers are there, and all of them have nothing to do."""
        return bool(self._connections) and all(hand.is_free for hand in self._connections)

    async def open(self) -> None:
        """Open it on a free port.

        Raises:
            ConfigurationError: The host is none of this machine's.
        """
        bound = await _bind_socket(self._host)
        app = web.Application()
        app.router.add_get("/", self._handle_worker)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSE_S)
        await self._runner.setup()
        await web.SockSite(self._runner, bound, backlog=_AT_ONCE).start()
        bound.listen(_BACKLOG)
        address, port = bound.getsockname()[:2]
        self.url = f"http://[{address}]:{port}/" if ":" in address else f"http://{address}:{port}/"

    async def _handle_worker(self, request: web.Request) -> web.WebSocketResponse:
        """Attend to one worker until its connection ends."""
        shown = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(shown, f"Bearer {self.token}".encode()):
            raise web.HTTPUnauthorized(text="this desk is another run's")
        beat_s = self._silence_s * _BEAT
        line = web.WebSocketResponse(
            timeout=_CLOSE_S, heartbeat=beat_s, max_msg_size=MAX_MESSAGE_BYTES, compress=False
        )
        await line.prepare(request)
        hand = await self._accept_hello(line)
        if hand is None:
            return line
        self._connections[hand] = None
        self.any_worker.set()
        reason = "its connection ended"
        try:
            self._assign_tasks()
            async for message in line:
                if message.type is WSMsgType.BINARY:
                    hand.receive(decode_message(message.data))
                    self._assign_tasks()
        except BackendError as error:
            reason = error.message
            logger.warning("%s: %s", hand.name, reason)
        finally:
            self._remove(hand, reason)
        await line.close(code=CLOSE_REFUSED)  # nothing, if it has ended
        return line

    async def _accept_hello(self, line: web.WebSocketResponse) -> WorkerConnection | None:
        """Wait for a worker's first words; None if it is none, or not one that we understand."""
        try:
            hello = decode_message(await line.receive_bytes(timeout=_HELLO_S))
        except (BackendError, TypeError, TimeoutError):  # TypeError: it went, or sent a text
            await line.close(code=CLOSE_REFUSED, message=b"say hello first")
            return None
        name = f"{hello.get('host')}:{hello.get('pid')}"
        if hello["kind"] == "hello" and hello.get("v") == VERSION:
            return WorkerConnection(name, line)
        msg = (
            f"{name}: this worker runs fanfold {hello.get('fanfold')}, which speaks another "
            "version of the desk's language; install the same version on both"
        )
        if not self.refusal.done():
            self.refusal.set_result(ConfigurationError(msg))
        await line.close(code=CLOSE_REFUSED, message=b"another version of fanfold")
        return None

    def _remove(self, hand: WorkerConnection, reason: str) -> None:
        del self._connections[hand]
        hand.mark_lost(reason)
        if not self._connections:
            self.any_worker.clear()
            self._fail_pending(f"no worker is left; the last was {hand.name}")

    def _fail_pending(self, reason: str) -> None:
        while self._pending:
            self._pending.popleft().fail(WorkerLostError(reason))

    def _assign_tasks(self) -> None:
        """Give orders to workers that have nothing to do."""
        for hand in self._connections:
            while self._pending and self._pending[0].answer.done():
                self._pending.popleft()  # nobody waits for it any more
            if not self._pending:
                return
            if hand.is_free:
                self._send_in_background(hand.send(hand.assign(self._pending.popleft())))

    def _send_in_background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def run_task(self, order: dict[str, Json]) -> dict[str, Json]:
        """Have one order worked on by a worker that has nothing else to do.

        Raises:
            WorkerLostError: The worker's connection ended, or it broke on the order.
            ConfigurationError: It cannot load fanfold.
            BackendError: No worker is there.
        """
        if not self._connections:
            raise BackendError("no worker is there")
        errand = PendingTask(order)
        self._pending.append(errand)
        self._assign_tasks()
        try:
            return await errand.answer
        finally:
            errand.answer.cancel()

    async def stop(self) -> None:
        """Ask all workers to begin no further item; bounded."""
        await asyncio.gather(*(hand.stop() for hand in self._connections))

    async def close(self) -> None:
        """End all connections, and with them the workers; bounded."""
        runner, self._runner, self.url = self._runner, None, ""
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()  # nobody comes any more
        self._fail_pending("the desk is being closed")
        await asyncio.gather(*(hand.close() for hand in list(self._connections)))
        for task in list(self._sending):
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        await runner.cleanup()
        for hand in list(self._connections):  # its handler was broken off
            with suppress(KeyError):
                self._remove(hand, "the desk was closed")


async def _bind_socket(host: str) -> socket.socket:
    """Return a socket on a free port of an address of this machine.

    Raises:
        ConfigurationError: It is none.
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
            f"backend.host: {host!r} is no name or address of this machine: {error.strerror}; "
            "give the one by which workers reach it (FANFOLD_COORDINATOR_HOST in a job)"
        )
        raise ConfigurationError(msg) from error
    return bound
