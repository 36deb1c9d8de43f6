"""One aiohttp session for all endpoints: made in the loop that uses it, closed with the fleet.

The environment's proxies are passed with each request instead of aiohttp's ``trust_env``, which
would also read ``.netrc`` and let an entry there replace an endpoint's key. Redirects are never
followed: a key goes to the address that the settings name, and nowhere else.
"""

from __future__ import annotations

import asyncio
import io
from base64 import b64encode
from collections import deque
from collections.abc import Mapping
from typing import Any, Final
from urllib.request import getproxies, proxy_bypass

import aiohttp
from yarl import URL

from ..core.errors import ConfigurationError
from .answer import BodyTooLargeError, ProxyError, RawAnswer
from .policy import FleetPolicy

_LARGE: Final = 1 << 20
"""Bytes above which aiohttp warns of a body that is sent in one piece."""

_OK: Final = 200
_LARGEST_DOCUMENT: Final = 8 * 2**20
"""Bytes of a list of models, of metrics or of a registry's answer that are read."""
_LARGEST_ERROR: Final = 64 * 1024
"""Bytes of an error's body that are read; messages quote its beginning."""


class BodyReader:
    """Reads an answer's body and stops at a bound.

    Bytes count after decompression, so that a small compressed body cannot fill the memory.

    Args:
        response: The answer, its body unread.
        most: Most bytes that are read.

    Attributes:
        response: The answer.
    """

    def __init__(self, response: aiohttp.ClientResponse, most: int) -> None:
        self.response = response
        self._most = self._left = most
        self._lines = deque[bytes]()
        self._begun = list[bytes]()

    async def read(self) -> bytes:
        """Read the whole body, or the beginning of an error's body.

        Raises:
            BodyTooLargeError: It is larger than the bound; the connection is closed.
            aiohttp.ClientError: The connection broke.
        """
        response, length = self.response, self.response.content_length
        if length is not None and length <= self._left and _is_plain(response):
            return await response.read()
        blocks, size = list[bytes](), 0
        while block := await self._block():
            blocks.append(block)
            size += len(block)
            if response.status != _OK and size > _LARGEST_ERROR:
                response.close()
                break
        return b"".join(blocks)

    async def read_line(self) -> bytes:
        """Read up to the next line end, which is included; return ``b""`` at the body's end.

        Raises:
            BodyTooLargeError: The lines so far are larger than the bound; the connection is closed.
            aiohttp.ClientError: The connection broke.
        """
        while not self._lines:
            block = await self._block()
            if not block:
                last, self._begun = b"".join(self._begun), []
                return last
            *ended, rest = block.split(b"\n")
            for piece in ended:
                self._lines.append(b"".join((*self._begun, piece, b"\n")))
                self._begun.clear()
            if rest:
                self._begun.append(rest)
        return self._lines.popleft()

    async def _block(self) -> bytes:
        block = await self.response.content.readany()
        self._left -= len(block)
        if self._left < 0:
            self.response.close()
            raise BodyTooLargeError(self._most)
        return block


def _is_plain(response: aiohttp.ClientResponse) -> bool:
    return response.headers.get("Content-Encoding", "identity").lower() == "identity"


class Transport:
    """Sends requests; knows nothing of balancing or retries.

    The pool is unlimited on purpose: the fleet bounds what is in flight, and a second bound
    below it would only hide where calls wait.

    Args:
        policy: Timeouts, the largest answer, and whether proxy variables count.
    """

    def __init__(self, policy: FleetPolicy) -> None:
        self._policy = policy
        self._session: aiohttp.ClientSession | None = None
        self._proxies: dict[str, dict[str, Any]] = {}
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
            aiohttp.ClientError: The connection failed or broke, or the answer is too large.
            TimeoutError: No answer in time.
        """
        async with self.session().post(
            url,
            data=_sent(body),
            allow_redirects=False,
            **self._routed(url, headers, proxied),
        ) as got:
            reader = BodyReader(got, self._policy.body_bytes)
            sent = got.request_info.headers
            return RawAnswer(got.status, got.headers, await reader.read(), sent)

    async def stream(
        self, url: str, body: bytes, headers: Mapping[str, str], proxied: bool = False
    ) -> BodyReader:
        """Post one body and return the reader of the answer; the caller closes the answer.

        The limit for the whole answer becomes one for the silence between two chunks.

        Raises:
            aiohttp.ClientError: The connection failed or broke.
            TimeoutError: No answer in time.
        """
        limits = self._policy.timeout
        timeout = aiohttp.ClientTimeout(sock_connect=limits.connect_s, sock_read=limits.request_s)
        response = await self.session().post(
            url,
            data=_sent(body),
            allow_redirects=False,
            timeout=timeout,
            **self._routed(url, headers, proxied),
        )
        return BodyReader(response, self._policy.body_bytes)

    async def get(
        self, url: str, headers: Mapping[str, str], timeout_s: float, proxied: bool = False
    ) -> RawAnswer:
        """Fetch a small document within ``timeout_s`` seconds.

        Raises:
            aiohttp.ClientError: The connection failed or broke, or the document is too large.
            TimeoutError: No answer in time.
        """
        async with self.session().get(
            url,
            allow_redirects=False,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
            **self._routed(url, headers, proxied),
        ) as got:
            body = await BodyReader(got, _LARGEST_DOCUMENT).read()
            return RawAnswer(got.status, got.headers, body, got.request_info.headers)

    def _routed(self, url: str, headers: Mapping[str, str], proxied: bool) -> dict[str, Any]:
        """Return a request's headers and its proxy, if the environment names one, for aiohttp."""
        if not (proxied or self._policy.trust_env):
            return {"headers": headers}
        if url not in self._proxies:
            self._proxies[url] = _proxy_of(URL(url))
        found = self._proxies[url]
        return found | {"headers": {**headers, **found.get("headers", {})}}

    def session(self) -> aiohttp.ClientSession:
        """Return the session of the running loop, opening it at the first call.

        Raises:
            ConfigurationError: The session belongs to another loop that still runs.
        """
        if self._session is not None and self.loop is asyncio.get_running_loop():
            return self._session
        return self._open()

    def _open(self) -> aiohttp.ClientSession:
        here = asyncio.get_running_loop()
        if self.loop is not here:
            if self.loop is not None and not self.loop.is_closed():
                raise ConfigurationError(
                    "a fleet was used from two event loops at once: build one Fleet per loop"
                )
            self.loop = here
        limits = self._policy.timeout
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=limits.keepalive_s),
            timeout=aiohttp.ClientTimeout(total=limits.request_s, sock_connect=limits.connect_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            trust_env=False,
        )
        return self._session

    async def aclose(self) -> None:
        """Close all connections; a later request opens new ones."""
        session, self._session, self.loop = self._session, None, None
        if session is not None:
            await session.close()


def _proxy_of(url: URL) -> dict[str, Any]:
    """Return aiohttp's arguments for the proxy that the environment names for a URL.

    User and password move from the proxy's URL to a header, since errors show the URL.

    Raises:
        ProxyError: The variable does not name an HTTP proxy.
    """
    text = getproxies().get(url.scheme)
    if not text or proxy_bypass(f"{url.host}:{url.port}"):
        return {}
    try:
        proxy = URL(text if "://" in text else f"http://{text}")
        usable = proxy.scheme == "http" and bool(proxy.host)
    except ValueError:
        usable = False
    if not usable:
        name = f"{url.scheme}_proxy"
        msg = (
            f"the environment variable {name} (or {name.upper()}) does not name an HTTP proxy such "
            "as http://proxy.example:3128; correct it, or add the host to no_proxy"
        )
        raise ProxyError(msg)
    if proxy.user is None and proxy.password is None:
        return {"proxy": proxy}
    pair = b64encode(f"{proxy.user or ''}:{proxy.password or ''}".encode()).decode()
    told = {"Proxy-Authorization": f"Basic {pair}"}
    bare = proxy.with_user(None)
    return {"proxy": bare, "proxy_headers" if url.scheme == "https" else "headers": told}


def _sent(body: bytes) -> bytes | io.BytesIO:
    """Return a body as aiohttp likes it: a large one is read in pieces, not to hold the loop up."""
    return io.BytesIO(body) if len(body) > _LARGE else body
