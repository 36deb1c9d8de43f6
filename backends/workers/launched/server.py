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

from ...core.errors import ConfigurationError, FanfoldError, SiteError, WorkerLostError
from ...core.types import Json
from .protocol import MOST, REFUSED, VERSION, heard, said

_SAY_S: Final = 5.0
_CANNOT_LOAD: Final = ("ImportError", "ModuleNotFoundError", "AttributeError")


class Errand:
    """An order that waits for a worker, or is in work.

    Args:
        order: The order.

    Attributes:
        answer: The worker's summary, once there is one.
    """

    def __init__(self, order: dict[str, Json]) -> None:
        self.order = order
        self.answer: asyncio.Future[dict[str, Json]] = asyncio.get_running_loop().create_future()

    def fail(self, error: FanfoldError) -> None:
        """Let whoever waits know that no summary comes."""
        if not self.answer.done():
            self.answer.set_exception(error)


class Hand:
    """A worker that has come.

    Args:
        name: Host and process.
        line: The connection to it.
    """

    def __init__(self, name: str, line: web.WebSocketResponse) -> None:
        self.name = name
        self._line = line
        self._errand: Errand | None = None
        self._number, self._leaves = 0, False

    @property
    def free(self) -> bool:
        """Say whether it has nothing to do, and takes what there is."""
        return self._errand is None and not self._leaves and not self._line.closed

    def take(self, errand: Errand) -> bytes:
        """Give it an order, and return what is to be sent; it is busy from now on."""
        self._errand, self._number = errand, self._number + 1
        return said("order", id=self._number, order=errand.order)

    async def send(self, message: bytes) -> None:
        """Send a message; a connection that does not carry it is closed."""
        try:
            await self._line.send_bytes(message)
        except (ConnectionError, RuntimeError):  # RuntimeError: the line is being closed
            await self._line.close()

    async def stop(self) -> None:
        """Ask it to begin no further item; bounded."""
        sending = asyncio.ensure_future(self.send(said("stop")))
        await asyncio.wait({sending}, timeout=_SAY_S)
        sending.cancel()

    def heard(self, message: dict[str, Any]) -> None:
        """Take an answer.

        Raises:
            SiteError: It is none to what the worker was asked.
        """
        errand, kind = self._errand, message["kind"]
        if errand is None or message.get("id") != self._number:
            raise SiteError(f"{self.name}: answers {kind!r} to what it was not asked")
        if kind == "summary" and isinstance(message.get("summary"), dict):
            self._errand, self._leaves = None, message.get("leaves") is True
            if not errand.answer.done():
                errand.answer.set_result(message["summary"])
        elif kind == "failed":
            self._errand = None
            errand.fail(self._failure(str(message.get("class")), str(message.get("text"))))
        else:
            raise SiteError(f"{self.name}: says {kind!r}, which nobody understands here")

    def _failure(self, name: str, text: str) -> FanfoldError:
        if name in _CANNOT_LOAD:
            msg = f"{self.name}: cannot load fanfold: {text}; install it where workers run"
            return ConfigurationError(msg)
        return WorkerLostError(f"{self.name}: {name}: {text}")

    def lose(self, reason: str) -> None:
        """Note that it has gone, with what it had in work."""
        errand, self._errand = self._errand, None
        if errand is not None:
            errand.fail(WorkerLostError(f"{self.name}: {reason}"))

    async def dismiss(self) -> None:
        """End its connection, and with that the worker; bounded."""
        closing = asyncio.ensure_future(self._line.close())
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


class Desk:
    """A WebSocket server in the coordinator, with a token of its own.

    An order goes to a worker that has nothing to do; a worker has one at a time.

    Args:
        host: Name or address of this machine by which workers reach it.
        silence_s: Seconds without a sign of life after which a connection counts as ended.

    Attributes:
        token: What workers show.
        url: Where they come to; empty while it is closed.
        somebody: Set while a worker is there.
        refused: Done when a worker cannot be understood, with the error.
    """

    def __init__(self, host: str, silence_s: float) -> None:
        self.token, self.url = secrets.token_urlsafe(32), ""
        self.somebody = asyncio.Event()
        self.refused: asyncio.Future[ConfigurationError]
        self.refused = asyncio.get_running_loop().create_future()
        self._host, self._silence_s = host, silence_s
        self._hands = dict[Hand, None]()  # in the order in which they came
        self._errands = deque[Errand]()
        self._sending = set[asyncio.Task[None]]()
        self._runner: web.AppRunner | None = None

    @property
    def workers(self) -> int:
        """Return how many workers are there."""
        return len(self._hands)

    @property
    def ready(self) -> bool:
        """Say whether workers are there, and all of them have nothing to do."""
        return bool(self._hands) and all(hand.free for hand in self._hands)

    async def open(self) -> None:
        """Open it on a free port.

        Raises:
            ConfigurationError: The host is none of this machine's.
        """
        bound = await _bound(self._host)
        app = web.Application()
        app.router.add_get("/", self._attend)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=_CLOSE_S)
        await self._runner.setup()
        await web.SockSite(self._runner, bound, backlog=_AT_ONCE).start()
        bound.listen(_BACKLOG)
        address, port = bound.getsockname()[:2]
        self.url = f"http://[{address}]:{port}/" if ":" in address else f"http://{address}:{port}/"

    async def _attend(self, request: web.Request) -> web.WebSocketResponse:
        """Attend to one worker until its connection ends."""
        shown = request.headers.get("Authorization", "").encode()
        if not hmac.compare_digest(shown, f"Bearer {self.token}".encode()):
            raise web.HTTPUnauthorized(text="this desk is another run's")
        beat_s = self._silence_s * _BEAT
        line = web.WebSocketResponse(
            timeout=_CLOSE_S, heartbeat=beat_s, max_msg_size=MOST, compress=False
        )
        await line.prepare(request)
        hand = await self._greeted(line)
        if hand is None:
            return line
        self._hands[hand] = None
        self.somebody.set()
        reason = "its connection ended"
        try:
            self._hand_out()
            async for message in line:
                if message.type is WSMsgType.BINARY:
                    hand.heard(heard(message.data))
                    self._hand_out()
        except SiteError as error:
            reason = error.message
            logger.warning("%s: %s", hand.name, reason)
        finally:
            self._gone(hand, reason)
        await line.close(code=REFUSED)  # nothing, if it has ended
        return line

    async def _greeted(self, line: web.WebSocketResponse) -> Hand | None:
        """Wait for a worker's first words; None if it is none, or not one that we understand."""
        try:
            hello = heard(await line.receive_bytes(timeout=_HELLO_S))
        except (SiteError, TypeError, TimeoutError):  # TypeError: it went, or sent a text
            await line.close(code=REFUSED, message=b"say hello first")
            return None
        name = f"{hello.get('host')}:{hello.get('pid')}"
        if hello["kind"] == "hello" and hello.get("v") == VERSION:
            return Hand(name, line)
        msg = (
            f"{name}: this worker runs fanfold {hello.get('fanfold')}, which speaks another "
            "version of the desk's language; install the same version on both"
        )
        if not self.refused.done():
            self.refused.set_result(ConfigurationError(msg))
        await line.close(code=REFUSED, message=b"another version of fanfold")
        return None

    def _gone(self, hand: Hand, reason: str) -> None:
        del self._hands[hand]
        hand.lose(reason)
        if not self._hands:
            self.somebody.clear()
            self._lose_all(f"no worker is left; the last was {hand.name}")

    def _lose_all(self, reason: str) -> None:
        while self._errands:
            self._errands.popleft().fail(WorkerLostError(reason))

    def _hand_out(self) -> None:
        """Give orders to workers that have nothing to do."""
        for hand in self._hands:
            while self._errands and self._errands[0].answer.done():
                self._errands.popleft()  # nobody waits for it any more
            if not self._errands:
                return
            if hand.free:
                self._aside(hand.send(hand.take(self._errands.popleft())))

    def _aside(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._sending.add(task)
        task.add_done_callback(self._sending.discard)

    async def work_on(self, order: dict[str, Json]) -> dict[str, Json]:
        """Have one order worked on by a worker that has nothing else to do.

        Raises:
            WorkerLostError: The worker's connection ended, or it broke on the order.
            ConfigurationError: It cannot load fanfold.
            SiteError: No worker is there.
        """
        if not self._hands:
            raise SiteError("no worker is there")
        errand = Errand(order)
        self._errands.append(errand)
        self._hand_out()
        try:
            return await errand.answer
        finally:
            errand.answer.cancel()

    async def stop(self) -> None:
        """Ask all workers to begin no further item; bounded."""
        await asyncio.gather(*(hand.stop() for hand in self._hands))

    async def close(self) -> None:
        """End all connections, and with them the workers; bounded."""
        runner, self._runner, self.url = self._runner, None, ""
        if runner is None:
            return
        for site in list(runner.sites):
            await site.stop()  # nobody comes any more
        self._lose_all("the desk is being closed")
        await asyncio.gather(*(hand.dismiss() for hand in list(self._hands)))
        for task in list(self._sending):
            task.cancel()
        await asyncio.gather(*self._sending, return_exceptions=True)
        await runner.cleanup()
        for hand in list(self._hands):  # its handler was broken off
            with suppress(KeyError):
                self._gone(hand, "the desk was closed")


async def _bound(host: str) -> socket.socket:
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
            "give the one by which workers reach it (FANFOLD_DESK_HOST in a job)"
        )
        raise ConfigurationError(msg) from error
    return bound
