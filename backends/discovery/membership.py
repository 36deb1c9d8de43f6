"""Lists of endpoints that change while a run goes on: a file, or Aegis' registry."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from stat import S_ISDIR
from typing import Any, Final, Protocol, TypeAlias

import aiohttp
import orjson

from ..core.errors import ConfigurationError, NoEndpointError, RunStoppedError
from ..core.permissions import untrusted_reason
from ..fleet.address import NO_KEY, ApiKey, EndpointSpec, base_url
from ..fleet.fleet import Fleet
from ..fleet.policy import FleetPolicy
from ..fleet.transport import Transport
from .folder import HostsFolder
from .sources import read_endpoints_file, warn_untrusted

_LOG: Final = logging.getLogger(__name__)
_OK: Final = 200
_MOST_PORT: Final = 65535

Admit: TypeAlias = Callable[[list[EndpointSpec]], Awaitable[Sequence[EndpointSpec]]]
"""Returns those of new endpoints that fit the run."""


class Source(Protocol):
    """A list of endpoints that may change."""

    async def look(self) -> list[EndpointSpec]:
        """Return the endpoints as they are listed now.

        Raises:
            ConfigurationError: The list cannot be read now.
            RunStoppedError: Nothing will be listed any more.
        """
        ...


class FileSource:
    """An endpoints file, or a folder with one per host; read only when they changed.

    Args:
        path: File or folder; a link is followed anew at each look.
        key: Key of all endpoints in it, as long as nobody else can write it.
    """

    def __init__(self, path: Path, key: ApiKey = NO_KEY) -> None:
        self._path = path
        self._key = key
        self._stamp: tuple[object, ...] | None = None
        self._specs = list[EndpointSpec]()
        self._folder = HostsFolder(path, key)

    async def look(self) -> list[EndpointSpec]:
        """Return the endpoints in the file, or in all files of the folder."""
        return await asyncio.to_thread(self._look)

    def _look(self) -> list[EndpointSpec]:
        try:
            status = self._path.stat()
            reason = None if self._key == NO_KEY else untrusted_reason(self._path)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            kind = NoEndpointError if missing else ConfigurationError
            raise kind(f"endpoints.file: {self._path}: {error.strerror}") from None
        if S_ISDIR(status.st_mode):
            return self._folder.read()
        stamp = status.st_mtime_ns, status.st_size, status.st_ino, reason
        if stamp != self._stamp:
            if reason is not None and (self._stamp is None or self._stamp[-1] != reason):
                warn_untrusted(self._path, reason)
            key = self._key if reason is None else NO_KEY
            self._specs = read_endpoints_file(self._path, key)
            self._stamp = stamp
        return self._specs


class RegistrySource:
    """Aegis' registry: a hint who is there; whether they work is seen by asking them.

    Its heartbeat lags behind its own freshness window, so that healthy servers come and go in
    its list. One that is missing is kept until it has been missing for a while.

    Args:
        url: The registry, e.g. ``http://head:8471``.
        key: Key of the endpoints.
        patience: Looks in a row that a server may be missing.
        timeout_s: Longest wait for the registry's answer, in seconds.

    Raises:
        ConfigurationError: The URL is none.
    """

    def __init__(
        self, url: str, key: ApiKey = NO_KEY, patience: int = 12, timeout_s: float = 5.0
    ) -> None:
        self._url = base_url(url).removesuffix("/v1")
        self._key = key
        self._patience = patience
        self._timeout_s = timeout_s
        self._known: dict[str, EndpointSpec] = {}
        self._missing = Counter[str]()

    async def look(self) -> list[EndpointSpec]:
        """Return the servers that the registry lists, or listed lately."""
        listed = {spec.url: spec for spec in self._specs(await self._services())}
        self._missing = Counter({u: self._missing[u] + 1 for u in self._known if u not in listed})
        kept = {u: s for u, s in self._known.items() if self._missing[u] < self._patience}
        self._known = kept | listed
        if not self._known:
            raise NoEndpointError(f"endpoints.aegis_registry: {self._url} lists no server")
        return list(self._known.values())

    async def _services(self) -> list[dict[str, Any]]:
        transport = Transport(FleetPolicy())
        try:
            answer = await transport.get(
                f"{self._url}/services?type=vllm", {}, timeout_s=self._timeout_s
            )
            document = orjson.loads(answer.body) if answer.status == _OK else None
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = str(error) or f"no answer within {self._timeout_s:g} s"
            raise NoEndpointError(
                f"endpoints.aegis_registry: {self._url} cannot be asked: {reason}"
            ) from None
        except orjson.JSONDecodeError:
            document = None
        finally:
            await transport.aclose()
        if not isinstance(document, list):
            raise ConfigurationError(
                f"endpoints.aegis_registry: {self._url} is no registry of Aegis: HTTP "
                f"{answer.status} without a list of services"
            )
        return [service for service in document if isinstance(service, dict)]

    def _specs(self, services: Iterable[dict[str, Any]]) -> list[EndpointSpec]:
        specs = []
        for service in services:
            host, port = service.get("host"), service.get("port")
            if not isinstance(host, str) or not host or not isinstance(port, int):
                continue
            if 0 < port <= _MOST_PORT:
                name = f"[{host}]" if ":" in host else host
                tag = (service.get("metadata") or {}).get("model")
                model = tag if isinstance(tag, str) else None
                specs.append(EndpointSpec(f"http://{name}:{port}", self._key, model=model))
        return specs


@asynccontextmanager
async def kept_up(
    fleet: Fleet, source: Source, listed: Sequence[EndpointSpec], admit: Admit, every_s: float
) -> AsyncIterator[None]:
    """Keep a fleet's members equal to a list that may change, while the block runs.

    A list that cannot be read changes nothing, and is reported once.

    Args:
        fleet: The fleet.
        source: The list.
        listed: What it held when the fleet was opened.
        admit: Says which of the endpoints that join fit the run.
        every_s: Seconds between two looks.
    """
    task = asyncio.create_task(_keep_up(fleet, source, listed, admit, every_s))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task  # whatever else ended it is raised here


async def _keep_up(
    fleet: Fleet, source: Source, listed: Sequence[EndpointSpec], admit: Admit, every_s: float
) -> None:
    members = {e.url: e.spec for e in fleet.endpoints if not e.retired}
    seen, trouble = {base_url(spec.url) for spec in listed}, ""
    while True:
        await asyncio.sleep(every_s)
        try:
            now = {base_url(spec.url): spec for spec in await source.look()}
            if now.keys() == seen:
                trouble = ""
                continue
            fresh = [spec for url, spec in now.items() if url not in seen]
            fitting = {base_url(spec.url): spec for spec in await admit(fresh)} if fresh else {}
            wanted = {u: s for u, s in (members | fitting).items() if u in now}
            joined, left = fleet.update(list(wanted.values()))
        except ConfigurationError as error:
            if error.message != trouble:
                _LOG.warning("the fleet's members stay as they are: %s", error.message)
            trouble = error.message
            continue
        except RunStoppedError as error:
            fleet.stop(error.message)
            return
        members, seen, trouble = wanted, set(now), ""
        _LOG.info("endpoints changed: %d joined, %d left, %d now", joined, left, len(wanted))
