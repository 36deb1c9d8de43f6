"""One worker, as its coordinator sees it."""

from __future__ import annotations

import asyncio
from typing import Any, Final

from aiohttp import web

from ...core.errors import ConfigurationError, FanfoldError, SiteError, WorkerLostError
from ...core.types import Json
from .protocol import said

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
