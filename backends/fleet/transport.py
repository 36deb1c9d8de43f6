"""One aiohttp session for all endpoints: made in the loop that uses it, closed with the fleet."""

from __future__ import annotations

import asyncio
import io
from collections.abc import Mapping
from typing import Final

import aiohttp

from ..contract.errors import ConfigurationError
from .answer import RawAnswer
from .policy import FleetPolicy

_LARGE: Final = 1 << 20
"""Bytes above which aiohttp warns of a body that is sent in one piece."""


class Transport:
    """Sends requests; knows nothing of balancing or retries.

    The pool is unlimited on purpose: the fleet bounds what is in flight, and a second bound
    below it would only hide where calls wait.

    Args:
        policy: Timeouts, and whether proxy variables count.
    """

    def __init__(self, policy: FleetPolicy) -> None:
        self._policy = policy
        self._sessions: dict[bool, aiohttp.ClientSession] = {}
        self.loop: asyncio.AbstractEventLoop | None = None

    @property
    def silence_s(self) -> float:
        """Longest silence inside a stream, in seconds."""
        return self._policy.timeout.chunk_s

    async def send(
        self, url: str, body: bytes, headers: Mapping[str, str], proxied: bool = False
    ) -> RawAnswer:
        """Post one body and read the whole answer.

        Args:
            url: Where to.
            body: What.
            headers: With which headers.
            proxied: Whether the environment's proxy variables count.

        Raises:
            aiohttp.ClientError: The connection failed or broke.
            TimeoutError: No answer in time.
        """
        session = self.session(proxied)
        async with session.post(
            url, data=_sent(body), headers=headers, allow_redirects=False
        ) as got:
            return RawAnswer(got.status, got.headers, await got.read())

    async def stream(
        self, url: str, body: bytes, headers: Mapping[str, str], proxied: bool = False
    ) -> aiohttp.ClientResponse:
        """Post one body and return the answer unread; the caller closes it.

        The limit for the whole answer becomes one for the silence between two chunks.

        Raises:
            aiohttp.ClientError: The connection failed or broke.
            TimeoutError: No answer in time.
        """
        limits = self._policy.timeout
        timeout = aiohttp.ClientTimeout(sock_connect=limits.connect_s, sock_read=limits.request_s)
        return await self.session(proxied).post(
            url, data=_sent(body), headers=headers, allow_redirects=False, timeout=timeout
        )

    async def get(
        self, url: str, headers: Mapping[str, str], timeout_s: float, proxied: bool = False
    ) -> RawAnswer:
        """Fetch a small document within ``timeout_s`` seconds.

        Raises:
            aiohttp.ClientError: The connection failed or broke.
            TimeoutError: No answer in time.
        """
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with self.session(proxied).get(
            url, headers=headers, allow_redirects=False, timeout=timeout
        ) as got:
            return RawAnswer(got.status, got.headers, await got.read())

    def session(self, proxied: bool = False) -> aiohttp.ClientSession:
        """Return the session of the running loop, opening it at the first call.

        Args:
            proxied: Whether the environment's proxy variables count.

        Raises:
            ConfigurationError: The session belongs to another loop that still runs.
        """
        session = self._sessions.get(proxied)
        if session is not None and self.loop is asyncio.get_running_loop():
            return session
        return self._open(proxied)

    def _open(self, proxied: bool) -> aiohttp.ClientSession:
        here = asyncio.get_running_loop()
        if self.loop is not here:
            if self.loop is not None and not self.loop.is_closed():
                raise ConfigurationError(
                    "a fleet was used from two event loops at once: build one Fleet per loop"
                )
            self._sessions.clear()
            self.loop = here
        limits = self._policy.timeout
        session = self._sessions[proxied] = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=limits.keepalive_s),
            timeout=aiohttp.ClientTimeout(total=limits.request_s, sock_connect=limits.connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=proxied or self._policy.trust_env,
        )
        return session

    async def aclose(self) -> None:
        """Close all connections; a later request opens new ones."""
        sessions, self._sessions, self.loop = self._sessions, {}, None
        for session in sessions.values():
            await session.close()


def _sent(body: bytes) -> bytes | io.BytesIO:
    """Return a body as aiohttp likes it: a large one in pieces, lest it hold up the loop."""
    return io.BytesIO(body) if len(body) > _LARGE else body
