"""A folder with an endpoints file per host, as ``fanfold serve`` writes them on each node."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..core.errors import ConfigurationError, NoEndpointError
from ..core.permissions import file_reason, untrusted_reason
from ..fleet.address import NO_KEY, ApiKey, EndpointSpec, base_url
from .sources import parse_endpoints_file, warn_untrusted

_LOG: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Host:
    """What a host's file held when it was last read."""

    stamp: tuple[object, ...]
    specs: tuple[EndpointSpec, ...]


class HostsFolder:
    """The endpoints of all hosts; files are read only when they changed.

    Hidden files and folders inside it are no hosts. A file that cannot be read leaves its host as
    it was, and is reported once.

    Args:
        path: The folder.
        key: Key of all endpoints, as long as nobody else can write the folder and the files.
    """

    def __init__(self, path: Path, key: ApiKey = NO_KEY) -> None:
        self._path, self._key = path, key
        self._hosts = dict[str, _Host]()
        self._trouble = dict[str, str]()
        self._warned = set[str]()

    def read(self) -> list[EndpointSpec]:
        """Return the endpoints that are there now, each once; blocks.

        Raises:
            NoEndpointError: None is there.
            ConfigurationError: The folder cannot be read.
        """
        try:
            with os.scandir(self._path) as entries:
                others = None if self._key == NO_KEY else untrusted_reason(self._path)
                files = sorted((e for e in entries if _is_host(e)), key=lambda e: e.name)
        except OSError as error:
            raise ConfigurationError(
                f"endpoints.file: {self._path}: cannot be read: {error.strerror}"
            ) from None
        now = {file.name: host for file in files if (host := self._host(file, others)) is not None}
        self._hosts = now
        specs = {base_url(s.url): s for host in now.values() for s in host.specs}
        if not specs:
            raise NoEndpointError(f"endpoints.file: {self._path}: no host has written its file yet")
        return list(specs.values())

    def _host(self, file: os.DirEntry[str], others: str | None) -> _Host | None:
        known = self._hosts.get(file.name)
        try:
            status = file.stat()
            if others is None and file.is_symlink() and self._key != NO_KEY:
                others = untrusted_reason(Path(file.path))
            reason = others or file_reason(Path(file.path), status)
            stamp = status.st_mtime_ns, status.st_size, status.st_ino, reason
            if known is not None and known.stamp == stamp:
                return known
            text = Path(file.path).read_text(encoding="utf-8-sig")
            return _Host(
                stamp, tuple(parse_endpoints_file(text, file.path, self._key_for(file, reason)))
            )
        except FileNotFoundError:
            return None  # it has left since the folder was listed
        except NoEndpointError:
            return _Host(stamp, ())
        except (OSError, UnicodeDecodeError, ConfigurationError) as error:
            text = f"{file.path}: {error}"
            if self._trouble.get(file.name) != text:
                _LOG.warning("endpoints of host %s stay as they are: %s", file.name, text)
            self._trouble[file.name] = text
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
