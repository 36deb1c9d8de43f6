"""Lists of endpoints: files, folders, node lists, Aegis registry; following changes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import re
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from ipaddress import IPv6Address
from math import isfinite
from pathlib import Path
from stat import S_ISDIR
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

import orjson

from ...configs.endpoints import AEGIS_FILE, AEGIS_REGISTRY_FILE
from ..core.connection_errors import describe_connection_error
from ..core.errors import ConfigurationError, NoEndpointError, RunStoppedError
from ..core.lazy_tls import aiohttp
from ..core.permissions import find_file_risk, find_path_risk
from ..core.terminal import count_nouns
from ..fleet.endpoint import (
    NO_KEY,
    ApiKey,
    EndpointSpec,
    identify_endpoint,
    merge_spellings,
    normalize_base_url,
    redact_url,
)
from ..fleet.policy import FleetPolicy
from ..fleet.transport import Transport
from .probe import probe_models

if TYPE_CHECKING:
    from ..fleet.fleet import Fleet

_LOG: Final = logging.getLogger(__name__)
_HOST_PORT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\s]+):(\d{1,5})")
_SWARM_PORT: Final = 8000
"""Aurora-Swarm's default, used if a line has no port."""

_MAX_PORT: Final = 65535
_COMMENT: Final = "#"


def read_endpoints_file(path: Path, api_key: ApiKey = NO_KEY) -> list[EndpointSpec]:
    """Read an endpoints file.

    Raises:
        ConfigurationError: The file cannot be read, or one of its lines is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"endpoints file {path}: {error}") from error
    return parse_endpoints_file(text, str(path), api_key)


def get_trusted_key(path: Path, key: ApiKey) -> ApiKey:
    """Return the key for the endpoints in a file: no key if others can write the file.

    Args:
        path: The file.
        key: The key of the settings.

    Raises:
        OSError: The file's status cannot be read.
    """
    if key == NO_KEY or (reason := find_path_risk(path)) is None:
        return key
    warn_untrusted(path, reason)
    return NO_KEY


def warn_untrusted(path: Path, reason: str) -> None:
    """Warn that the endpoints in a file get no key."""
    _LOG.warning("the endpoints in %s get no API key: %s", path, reason)


def parse_endpoints_file(text: str, name: str, api_key: ApiKey = NO_KEY) -> list[EndpointSpec]:
    """Parse the text of an endpoints file.

    Args:
        text: The file's text.
        name: The file's name, for messages.
        api_key: Key for all of them.

    Returns:
        Each endpoint once, in the file's order.

    Raises:
        NoEndpointError: The file lists no endpoint.
        ConfigurationError: A line is malformed; with the line's number.
    """
    specs = list[EndpointSpec]()
    for number, raw in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith(_COMMENT):
            continue
        try:
            spec = _parse_line(line, api_key)
            identify_endpoint(spec.url)  # a malformed URL is reported with its line
            specs.append(spec)
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}, line {number}: {error.message}") from error
    if not specs:
        raise NoEndpointError(f"{name}: the file lists no endpoint")
    return merge_spellings(specs)


def _parse_line(line: str, api_key: ApiKey) -> EndpointSpec:
    first, *columns = line.split("\t")
    if " " in line and not columns:
        raise ConfigurationError(f"{line!r}: columns are separated by TAB, not by spaces")
    if "://" in first:
        return _spec(first, columns, api_key)
    if match := _HOST_PORT.fullmatch(first):
        if columns and columns[0].isdigit():
            raise ConfigurationError(f"{first!r} has a port, but column 2 is another port")
        return _spec(f"http://{match[1]}:{_port(match[2])}", columns, api_key)
    if ":" in first:
        raise ConfigurationError(
            f"{first!r} is not a host, host:port or URL (write IPv6 in brackets: [::1]:8000)"
        )
    port = _SWARM_PORT
    if columns and columns[0].isdigit():
        port = _port(columns.pop(0))
    return _spec(f"http://{first}:{port}", columns, api_key)


def _port(digits: str) -> int:
    port = int(digits)
    if not 0 < port <= _MAX_PORT:
        raise ConfigurationError(f"port {digits} is out of range (1 to {_MAX_PORT})")
    return port


def _spec(url: str, columns: Iterable[str], api_key: ApiKey) -> EndpointSpec:
    tags = dict(c.strip().split("=", 1) for c in columns if "=" in c)
    try:
        most = int(tags["max_in_flight"]) if "max_in_flight" in tags else None
        weight = float(tags.get("weight", "1"))
    except ValueError as error:
        raise ConfigurationError(f"{redact_url(url)}: a tag is not a number: {error}") from error
    if weight <= 0 or (most is not None and most < 1):
        raise ConfigurationError(f"{redact_url(url)}: weight and max_in_flight must be positive")
    return EndpointSpec(url, api_key, model=tags.get("model"), max_in_flight=most, weight=weight)


@dataclass(frozen=True, slots=True)
class _Host:
    """Content of a host's file when it was last read."""

    stamp: tuple[object, ...]
    specs: tuple[EndpointSpec, ...]


class HostsFolder:
    """The endpoints of all hosts; files are read only after they changed.

    Hidden files and folders inside it are ignored. If a file cannot be read, its host keeps its
    endpoints, and the error is logged once.

    Args:
        path: The folder.
        key: Key of all endpoints, as long as no other user can write the folder and the files.
    """

    def __init__(self, path: Path, key: ApiKey = NO_KEY) -> None:
        self._path, self._key = path, key
        self._hosts = dict[str, _Host]()
        self._errors = dict[str, str]()
        self._warned = set[str]()

    def read(self) -> list[EndpointSpec]:
        """Return the endpoints that are listed now, each once; blocks.

        Raises:
            NoEndpointError: No endpoint is listed.
            ConfigurationError: The folder cannot be read.
        """
        try:
            with os.scandir(self._path) as entries:
                others = None if self._key == NO_KEY else find_path_risk(self._path)
                files = sorted((e for e in entries if _is_host(e)), key=lambda e: e.name)
        except OSError as error:
            raise ConfigurationError(
                f"endpoints.file: {self._path}: cannot be read: {error.strerror}"
            ) from None
        now = {file.name: host for file in files if (host := self._host(file, others)) is not None}
        self._hosts = now
        specs = merge_spellings(s for host in now.values() for s in host.specs)
        if not specs:
            raise NoEndpointError(f"endpoints.file: {self._path}: no host has written its file yet")
        return specs

    def _host(self, file: os.DirEntry[str], others: str | None) -> _Host | None:
        known = self._hosts.get(file.name)
        try:
            status = file.stat()
            if others is None and file.is_symlink() and self._key != NO_KEY:
                others = find_path_risk(Path(file.path))
            reason = others or find_file_risk(Path(file.path), status)
            stamp = status.st_mtime_ns, status.st_size, status.st_ino, reason
            if known is not None and known.stamp == stamp:
                return known
            text = Path(file.path).read_text(encoding="utf-8-sig")
            return _Host(
                stamp, tuple(parse_endpoints_file(text, file.path, self._key_for(file, reason)))
            )
        except FileNotFoundError:
            return None  # it was removed since the folder was listed
        except NoEndpointError:
            return _Host(stamp, ())
        except (OSError, UnicodeDecodeError, ConfigurationError) as error:
            text = f"{file.path}: {error}"
            if self._errors.get(file.name) != text:
                _LOG.warning("endpoints of host %s are unchanged: %s", file.name, text)
            self._errors[file.name] = text
            return known

    def _key_for(self, file: os.DirEntry[str], reason: str | None) -> ApiKey:
        if reason is None or self._key == NO_KEY:
            return self._key
        if reason not in self._warned:
            self._warned.add(reason)
            warn_untrusted(Path(file.path), reason)
        return NO_KEY


def _is_host(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith(".") and entry.is_file()


_OK: Final = 200

AdmitEndpoints: TypeAlias = Callable[[list[EndpointSpec]], Awaitable[Sequence[EndpointSpec]]]
"""Returns those of the new endpoints that fit the run."""


class EndpointSource(Protocol):
    """A list of endpoints that may change."""

    async def list_endpoints(self) -> list[EndpointSpec]:
        """Return the endpoints as they are listed now.

        Raises:
            ConfigurationError: The list cannot be read now.
            RunStoppedError: No endpoint will be listed any more.
        """
        ...


_LONGEST_URL: Final = 2048


def locate_file(path: Path) -> Path:
    """Return the endpoints file that a path means: in a folder of Aegis its own file; blocks."""
    names = (AEGIS_FILE, AEGIS_REGISTRY_FILE)
    try:
        is_aegis = path.is_dir() and any((path / name).exists() for name in names)
    except OSError:  # who reads it reports it
        return path
    return path / AEGIS_FILE if is_aegis else path


def find_registry_file(path: Path) -> Path | None:
    """Return the file with the address of Aegis' registry that replaces an endpoints file; blocks.

    It replaces it while the endpoints file does not exist or is empty. A path without a suffix is a
    folder, to which nodes may still write.

    Args:
        path: The endpoints file, or the folder that Aegis writes to.
    """
    path = locate_file(path)
    try:
        status = path.stat()
        is_written = S_ISDIR(status.st_mode) or status.st_size > 0
    except FileNotFoundError:
        is_written = not path.suffix
    except OSError:
        return None  # who reads it reports it
    if is_written:
        return None
    return _find_beside(path)


def _find_beside(path: Path) -> Path | None:
    """Return the file with the address of Aegis' registry beside an endpoints file; blocks."""
    try:
        beside = dict.fromkeys((path.resolve().parent, path.parent))  # a link to the newest run
        return next((f for d in beside if (f := d / AEGIS_REGISTRY_FILE).is_file()), None)
    except OSError:
        return None


def find_later_registry(path: Path) -> Path | None:
    """Return the file with the address of the registry that complements an Aegis file; blocks.

    Aegis does not change its endpoints file any more when a server starts later. Files with another
    name may belong to other servers than those of the registry.
    """
    path = locate_file(path)
    try:
        is_own = AEGIS_FILE in (path.name, path.resolve().name)
    except OSError:  # who reads it reports it
        return None
    return _find_beside(path) if is_own else None


def read_registry_file(path: Path, key: ApiKey = NO_KEY) -> RegistrySource:
    """Return the registry whose address a file of Aegis contains; blocks.

    Args:
        path: The file.
        key: Key of the endpoints, as long as no other user can write the file.

    Raises:
        ConfigurationError: The file cannot be read, or contains no URL.
    """
    try:
        with path.open("rb") as file:
            data = file.read(_LONGEST_URL + 1)
        text = data.decode("utf-8-sig")
        trusted = get_trusted_key(path, key)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise ConfigurationError(f"{path}: cannot be read: {reason}") from None
    url = text.strip().partition("\n")[0].strip()
    if len(data) > _LONGEST_URL:
        raise ConfigurationError(f"{path}: is not a file of Aegis: it is longer than a URL")
    try:
        if "@" in url.partition("//")[2].partition("/")[0]:
            raise ConfigurationError("the URL contains a user or a password")
        return RegistrySource(url, trusted, where=str(path))
    except ConfigurationError as error:
        raise ConfigurationError(f"{path}: {error.message}") from None


class FileSource:
    """An endpoints file, or a folder with one file per host; read only after it changed.

    Aegis writes its file when all servers are up. Until then its registry, whose address is in a
    file beside it, is the list; it stays the list once it was used. To a file of Aegis that is
    there at first, the servers are added that only the registry has: they start later. Its servers
    stay members while they are in the file.

    Args:
        path: File or folder; a link is resolved again at each poll.
        key: Key of all endpoints in it, as long as no other user can write it.

    Attributes:
        registry: The registry in use, or None.
    """

    def __init__(self, path: Path, key: ApiKey = NO_KEY) -> None:
        self.registry: RegistrySource | None = None
        self._path = path
        self._key = key
        self._stamp: tuple[object, ...] | None = None
        self._specs = list[EndpointSpec]()
        self._folder = HostsFolder(path, key)
        self._later: RegistrySource | None = None
        self._problem = ""

    async def list_endpoints(self) -> list[EndpointSpec]:
        """Return the endpoints in the file, in all files of the folder, or in the registry."""
        if self.registry is None:
            file = await asyncio.to_thread(find_registry_file, self._path)
            if file is None:
                return await self._add_later(await asyncio.to_thread(self._read))
            self.registry = await asyncio.to_thread(read_registry_file, file, self._key)
        return await self.registry.list_endpoints()

    async def _add_later(self, listed: list[EndpointSpec]) -> list[EndpointSpec]:
        """Return the endpoints in the file, and those that only Aegis' registry lists."""
        file = await asyncio.to_thread(find_later_registry, self._path)
        if file is None:
            return listed
        try:
            found = await asyncio.to_thread(read_registry_file, file, self._key)
            if self._later is None or self._later.url != found.url:
                self._later = found
            later = await self._later.list_endpoints()
        except ConfigurationError as error:  # its job may have ended; the file is the list
            if error.message != self._problem:
                _LOG.info("only the servers in %s are known: %s", self._path, error.message)
            self._problem = error.message
            return listed
        known = {identify_endpoint(spec.url) for spec in listed}
        return [*listed, *(spec for spec in later if identify_endpoint(spec.url) not in known)]

    def _read(self) -> list[EndpointSpec]:
        path = locate_file(self._path)
        try:
            status = path.stat()
            reason = None if self._key == NO_KEY else find_path_risk(path)
        except OSError as error:
            missing = isinstance(error, FileNotFoundError)
            kind = NoEndpointError if missing else ConfigurationError
            raise kind(f"endpoints.file: {path}: {error.strerror}") from None
        if S_ISDIR(status.st_mode):
            return self._folder.read()
        stamp = status.st_mtime_ns, status.st_size, status.st_ino, reason
        if stamp != self._stamp:
            if reason is not None and (self._stamp is None or self._stamp[-1] != reason):
                warn_untrusted(path, reason)
            key = self._key if reason is None else NO_KEY
            self._specs = read_endpoints_file(path, key)
            self._stamp = stamp
        return self._specs


_BEAT_S: Final = 35.0
_DEAD_S: Final = 10.0
"""Aegis' registry visits its servers one after the other, with a pause of 30 s after all; a server
that does not answer takes it 10 s."""
_HEALTHY: Final = "healthy"
_NOT_UP: Final = frozenset({"starting", "stopping"})
_HOST: Final = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?\.?")


@dataclass(frozen=True, slots=True)
class _Service:
    """One server as the registry lists it."""

    spec: EndpointSpec
    status: str
    last_seen: float | None


class RegistrySource:
    """Aegis' registry: it hints at which servers exist; only probing shows whether they work.

    The registry lists healthy servers as unhealthy while its own heartbeat is slow. So a server
    that the registry saw recently (``last_seen``) joins when it answers, and a server leaves only
    if the registry has not seen it for long and it does not answer either.

    Args:
        url: The registry, e.g. ``http://head:8471``.
        key: Key of the endpoints.
        patience: Polls in a row for which a server may be missing before it is probed.
        timeout_s: Longest wait for the registry's answer, in seconds.
        where: The setting or the file that the URL comes from, for messages.

    Raises:
        ConfigurationError: The URL is malformed.
    """

    def __init__(
        self,
        url: str,
        key: ApiKey = NO_KEY,
        patience: int = 12,
        timeout_s: float = 5.0,
        where: str = "endpoints.aegis_registry",
    ) -> None:
        self.url = normalize_base_url(url).removesuffix("/v1")
        self._where = where
        self._key = key
        self._patience = patience
        self._timeout_s = timeout_s
        self._known: dict[str, EndpointSpec] = {}
        self._missing = Counter[str]()

    async def list_endpoints(self) -> list[EndpointSpec]:
        """Return the servers that are up, as the registry or the servers themselves show it."""
        services = [
            service for one in await self._services() if (service := self._read(one)) is not None
        ]
        seen = _select_recent([one for one in services if one.status not in _NOT_UP])
        doubtful = [
            one.spec for one in seen if one.status != _HEALTHY and one.spec.url not in self._known
        ]
        answering = await _select_answering(doubtful, self._timeout_s)
        listed = {
            one.spec.url: one.spec
            for one in seen
            if one.status == _HEALTHY or one.spec.url in self._known or one.spec.url in answering
        }
        self._missing = Counter({u: self._missing[u] + 1 for u in self._known if u not in listed})
        lost = [s for u, s in self._known.items() if self._missing[u] >= self._patience]
        for url in await _select_answering(lost, self._timeout_s):
            self._missing[url] = 0
        kept = {u: s for u, s in self._known.items() if self._missing[u] < self._patience}
        self._known = kept | listed
        if not self._known:
            found = (
                f"{count_nouns(len(services), 'server')}, none healthy yet"
                if services
                else "no server yet"
            )
            raise NoEndpointError(
                f"{self._where}: {self.url} lists {found} (endpoints.wait_s waits for one)"
            )
        return merge_spellings(self._known.values())

    async def _services(self) -> list[dict[str, Any]]:
        transport = Transport(FleetPolicy())
        try:
            answer = await transport.get(
                f"{self.url}/services?type=vllm", {}, timeout_s=self._timeout_s
            )
            document = orjson.loads(answer.body) if answer.status == _OK else None
        except (aiohttp.ClientError, TimeoutError) as error:
            reason = describe_connection_error(error)
            raise NoEndpointError(f"{self._where}: cannot query {self.url}: {reason}") from None
        except orjson.JSONDecodeError:
            document = None
        finally:
            await transport.aclose()
        if not isinstance(document, list):
            raise ConfigurationError(
                f"{self._where}: {self.url} is not an Aegis registry: HTTP "
                f"{answer.status} without a list of services"
            )
        return [service for service in document if isinstance(service, dict)]

    def _read(self, service: dict[str, Any]) -> _Service | None:
        """Return one entry of the registry, or None if it names no server."""
        host, port = service.get("host"), service.get("port")
        if not isinstance(host, str) or not isinstance(port, int) or isinstance(port, bool):
            return None
        if not 0 < port <= _MAX_PORT or not (_HOST.fullmatch(host) or _is_ipv6(host)):
            return None
        name = f"[{host}]" if ":" in host else host
        about = service.get("metadata")
        model = about.get("model") if isinstance(about, dict) else None
        status, seen = service.get("status", _HEALTHY), service.get("last_seen")
        return _Service(
            EndpointSpec(
                f"http://{name}:{port}",
                self._key,
                model=model if isinstance(model, str) and model else None,
            ),
            status if isinstance(status, str) else "unknown",
            float(seen) if isinstance(seen, int | float) and isfinite(seen) else None,
        )


def _is_ipv6(host: str) -> bool:
    try:
        IPv6Address(host)
    except ValueError:
        return False
    return "%" not in host


def _select_recent(services: Sequence[_Service]) -> list[_Service]:
    """Return the servers that the registry has seen on its last rounds, by its own clock.

    Each server that may be dead prolongs a round.
    """
    newest = max((one.last_seen for one in services if one.last_seen is not None), default=0.0)
    doubtful = sum(one.status != _HEALTHY for one in services)
    since = newest - 2 * (_BEAT_S + _DEAD_S * doubtful)
    return [one for one in services if one.last_seen is None or one.last_seen >= since]


async def _select_answering(specs: Sequence[EndpointSpec], timeout_s: float) -> set[str]:
    """Return the URLs of the servers that answer a probe."""
    found = await probe_models(specs, timeout_s) if specs else []
    return {one.spec.url for one in found if one.reachable or one.unlisted}


@asynccontextmanager
async def follow_source(
    fleet: Fleet,
    source: EndpointSource,
    listed: Sequence[EndpointSpec],
    admit: AdmitEndpoints,
    every_s: float,
) -> AsyncIterator[None]:
    """Keep a fleet's members equal to a list that may change, while the block runs.

    If the list cannot be read, the fleet is unchanged, and the error is logged once.

    Args:
        fleet: The fleet.
        source: The list.
        listed: Content of the list when the fleet was opened.
        admit: Returns which of the new endpoints fit the run.
        every_s: Seconds between two polls.
    """
    task = asyncio.create_task(_follow_changes(fleet, source, listed, admit, every_s))
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task  # raises any other error that ended it


async def _follow_changes(
    fleet: Fleet,
    source: EndpointSource,
    listed: Sequence[EndpointSpec],
    admit: AdmitEndpoints,
    every_s: float,
) -> None:
    members = {identify_endpoint(e.url): e.spec for e in fleet.endpoints if not e.retired}
    seen, last_error = {identify_endpoint(spec.url) for spec in listed}, ""
    while True:
        await asyncio.sleep(every_s)
        try:
            now = {identify_endpoint(spec.url): spec for spec in await source.list_endpoints()}
            if now.keys() == seen:
                last_error = ""
                continue
            fresh = [spec for url, spec in now.items() if url not in seen]
            fitting = (
                {identify_endpoint(spec.url): spec for spec in await admit(fresh)} if fresh else {}
            )
            wanted = {u: s for u, s in (members | fitting).items() if u in now}
            joined, left = fleet.update(list(wanted.values()))
        except ConfigurationError as error:
            if error.message != last_error:
                _LOG.warning("the list of endpoints is unchanged: %s", error.message)
            last_error = error.message
            continue
        except RunStoppedError as error:
            fleet.stop(error.message)
            return
        members, seen, last_error = wanted, set(now), ""
        _LOG.info("endpoints changed: %d joined, %d left, %d now", joined, left, len(wanted))


_LIST: Final = re.compile(r"(?:[^,\[\]]|\[[^\[\]]*\])+")
_PART: Final = re.compile(r"\[([^\[\]]*)\]|([^\[\]]+)")
_RANGE: Final = re.compile(r"(\d+)(?:-(\d+))?")
_MOST: Final = 100_000
"""Limit of hosts in one list: a typing error must not fill the memory."""


def parse_pbs(text: str) -> list[str]:
    """Parse ``$PBS_NODEFILE``: one host a line, repeated per slot on some systems.

    Returns:
        The hosts in the file's order, each once.
    """
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def expand_slurm(text: str) -> list[str]:
    """Expand ``$SLURM_JOB_NODELIST``, such as ``nid[001-003,010],gpu-[a,b]7,login1``.

    Numbers keep the width of the range's lower bound; several brackets in a name give every
    combination, as ``scontrol show hostnames`` does.

    Raises:
        ConfigurationError: Unbalanced brackets, an empty or a backward range, or too many hosts.
    """
    names = _LIST.findall(text.strip())
    if not names or ",".join(names) != text.strip():
        raise ConfigurationError(f"node list {text!r}: misplaced brackets or commas")
    return list(dict.fromkeys(host for name in names for host in _expand(name)))


def _expand(name: str) -> list[str]:
    parts = [
        _members(inside, name) if bracket else [plain]
        for bracket, inside, plain in (
            (m[0].startswith("["), m[1] or "", m[2] or "") for m in _PART.finditer(name)
        )
    ]
    count = 1
    for part in parts:
        count *= len(part)
    if count > _MOST:
        raise ConfigurationError(f"node list: {name!r} has {count} hosts; the limit is {_MOST}")
    return ["".join(combination) for combination in itertools.product(*parts)]


def _members(inside: str, name: str) -> list[str]:
    members: list[str] = []
    for piece in inside.split(","):
        if not piece:
            raise ConfigurationError(f"node list: {name!r} has an empty member in its brackets")
        match = _RANGE.fullmatch(piece)
        if match is None:
            members.append(piece)
            continue
        low, high = match[1], match[2] or match[1]
        if int(high) < int(low) or int(high) - int(low) >= _MOST:
            raise ConfigurationError(f"node list: {name!r} has an invalid range: {piece!r}")
        members += [str(n).zfill(len(low)) for n in range(int(low), int(high) + 1)]
    return members


def hosts_to_specs(
    hosts: list[str],
    port: int,
    *,
    per_host: int = 1,
    suffix: str | None = None,
    api_key: ApiKey = NO_KEY,
) -> list[EndpointSpec]:
    """Turn host names into endpoints.

    Args:
        hosts: Names as the scheduler gave them.
        port: Port of the first server on each host; the others use the next ports.
        per_host: Servers on each host.
        suffix: Domain of the fast network, appended to the short name (``.hsn.cm.example``), or
            None to use the names as they are.
        api_key: Key for all of them.
    """
    names = [h if suffix is None else h.split(".")[0] + suffix for h in hosts]
    return [
        EndpointSpec(f"http://{name}:{port + rank}", api_key)
        for name in names
        for rank in range(per_host)
    ]
