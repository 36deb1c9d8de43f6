"""Open the exchange between coordinator and agents; pack messages."""

from __future__ import annotations

import asyncio
import base64
import hmac
import math
import secrets
import uuid
import zlib
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware

from ....configs.backend import ExchangeConfig
from ...core.errors import BackendError, ConfigurationError
from ...core.types import Json

if TYPE_CHECKING:
    from academy.exchange import ExchangeFactory
    from academy.exchange.client_config import ExchangeClientConfig
    from academy.identifier import EntityId


_MAX_HEARTBEAT_S: Final = 5.0
_HEARTBEATS: Final = 6
_SMALL: Final = 500_000
"""Bytes: HTTP exchanges carry messages of 512,000 bytes, their frame included."""
_CONNECTIONS: Final = 4096
_REDIS_KEYS: Final = ("active", "agent", "queue", "heartbeat", "completions", "outgoing")
"""Keys that Academy's Redis exchange keeps for a mailbox's id."""


@dataclass(frozen=True, slots=True)
class ExchangeSettings:
    """Settings of the exchange between coordinator and agents.

    Attributes:
        config: The section of the run's settings.
        silence_s: Seconds without a heartbeat until a participant counts as dead.
    """

    config: ExchangeConfig = field(default_factory=ExchangeConfig)
    silence_s: float = 120.0

    @property
    def password(self) -> str | None:
        """Return the password of a Redis."""
        secret = self.config.password
        return None if secret is None else secret.get_secret_value()

    @property
    def heartbeat_s(self) -> float:
        """Return the seconds between two heartbeats."""
        return min(_MAX_HEARTBEAT_S, self.silence_s / _HEARTBEATS)

    @property
    def max_message_bytes(self) -> int | None:
        """Return the most bytes of a packed message, or None if unlimited."""
        return _SMALL if self.config.kind in {"http", "globus"} else None

    @property
    def label(self) -> str:
        """Return its name in messages, without secrets."""
        config = self.config
        where = {
            "redis": f" at {config.host}:{config.port}",
            "http": f" at {config.url.rpartition('@')[2]}" if config.url else f" on {config.host}",
        }
        return f"the {config.kind} exchange{where.get(config.kind, '')}"


@asynccontextmanager
async def open_exchange(settings: ExchangeSettings) -> AsyncIterator[ExchangeFactory[Any]]:
    """Open the exchange if it belongs to the run, and return the factory of its clients.

    Raises:
        ConfigurationError: The Globus exchange needs a project.
    """
    from academy.exchange.client_config import ExchangeClientConfig  # noqa: PLC0415 - an extra

    missed = math.ceil(settings.silence_s / settings.heartbeat_s)
    config = ExchangeClientConfig(
        heartbeat_interval=settings.heartbeat_s, stale_heartbeat_threshold=missed
    )
    if settings.config.kind == "http" and settings.config.url is None:
        async with _serve_exchange(settings.config.host, config) as factory:
            yield factory
    else:
        yield await asyncio.to_thread(_factory, settings, config)  # a login may open a browser


def _factory(settings: ExchangeSettings, config: ExchangeClientConfig) -> ExchangeFactory[Any]:
    from academy import exchange  # noqa: PLC0415 - an extra

    given = settings.config
    if given.kind == "local":
        return exchange.LocalExchangeFactory(config=config)
    if given.kind == "redis":
        options: dict[str, Any] = {"max_connections": _CONNECTIONS, "socket_connect_timeout": 10}
        if settings.password is not None:
            options["password"] = settings.password
        return exchange.RedisExchangeFactory(given.host, given.port, config=config, **options)
    if given.kind == "http":
        return exchange.HttpExchangeFactory(str(given.url), config=config)
    try:
        project = uuid.UUID(given.project or "")
    except ValueError as error:
        msg = "backend.exchange.project: the globus exchange needs the UUID of a Globus project"
        raise ConfigurationError(msg) from error
    return exchange.GlobusExchangeFactory(project, config=config)


@asynccontextmanager
async def _serve_exchange(
    host: str, config: ExchangeClientConfig
) -> AsyncIterator[ExchangeFactory[Any]]:
    """Serve an HTTP exchange in this process, only to clients with its token."""
    from academy.exchange.cloud.app import create_app  # noqa: PLC0415 - an extra
    from academy.exchange.cloud.config import ExchangeServingConfig  # noqa: PLC0415 - an extra

    from .client import OwnExchangeFactory  # noqa: PLC0415 - needs the extra

    bearer = f"Bearer {secrets.token_urlsafe(32)}"
    app = create_app(ExchangeServingConfig(host=host))
    app.middlewares.insert(0, _require_token(bearer))
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await _listen(runner, host)
        where = f"http://{host}:{runner.addresses[0][1]}"
        headers = {"Authorization": bearer}
        yield OwnExchangeFactory(where, additional_headers=headers, config=config)
    finally:
        await runner.cleanup()


async def _listen(runner: web.AppRunner, host: str) -> None:
    try:
        await web.TCPSite(runner, host, 0).start()
    except OSError as error:
        raise ConfigurationError(f"backend.exchange.host: {host}: {error}") from error


def _require_token(bearer: str) -> Middleware:
    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        found = request.headers.get("Authorization", "")
        if not hmac.compare_digest(found.encode(), bearer.encode()):
            return web.Response(status=401, text="this exchange belongs to another run")
        return await handler(request)

    return guard


async def delete_mailboxes(settings: ExchangeSettings, mailboxes: list[EntityId]) -> None:
    """Delete the keys of mailboxes that Academy's Redis exchange would never delete.

    Raises:
        BackendError: The Redis does not answer.
    """
    if settings.config.kind != "redis" or not mailboxes:
        return
    from redis import asyncio as redis  # noqa: PLC0415 - comes with the extra
    from redis.exceptions import RedisError  # noqa: PLC0415 - comes with the extra

    keys = [f"{key}:{box.uid}" for box in mailboxes for key in _REDIS_KEYS]
    try:
        async with redis.Redis(
            host=settings.config.host, port=settings.config.port, password=settings.password
        ) as client:
            for box in mailboxes:
                keys += [key async for key in client.scan_iter(f"request:{box.uid}:*")]
            await client.delete(*keys)
    except RedisError as error:
        raise BackendError(f"{settings.label}: {type(error).__name__}: {error}") from error


MAX_UNPACKED_BYTES: Final = 64_000_000
"""Most bytes of an unpacked message."""


def pack(data: Mapping[str, Any]) -> str:
    """Return plain data as text that needs no JSON escapes; blocks.

    Academy wraps messages in JSON up to three times, and each time doubles every quotation mark and
    backslash.
    """
    return base64.b64encode(zlib.compress(orjson.dumps(data), 1)).decode("ascii")


def unpack(message: str) -> dict[str, Json]:
    """Unpack a message; blocks.

    Raises:
        BackendError: It is no packed message, or unpacks to more than :data:`MAX_UNPACKED_BYTES`
            bytes.
    """
    decompressor = zlib.decompressobj()
    try:
        raw = decompressor.decompress(base64.b64decode(message, validate=True), MAX_UNPACKED_BYTES)
        data = orjson.loads(raw) if decompressor.eof else None
    except (ValueError, zlib.error) as error:
        raise BackendError(f"a message between coordinator and agent is broken: {error}") from error
    if not isinstance(data, dict):
        msg = (
            f"a message between coordinator and agent is cut, above {MAX_UNPACKED_BYTES:,} "
            "bytes, or no object"
        )
        raise BackendError(msg)
    return data
