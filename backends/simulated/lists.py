"""Endpoint lists of a fleet in the forms that other tools read: Aegis, Aurora-Swarm, URLs."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from ..core.errors import ConfigurationError


def write_urls(path: Path, urls: Sequence[str]) -> None:
    """Write one base URL per line.

    Args:
        path: The file; replaced as a whole.
        urls: Base URLs, ending in ``/v1``.
    """
    _replace(path, "".join(f"{url}\n" for url in urls))


def write_aegis(path: Path, urls: Sequence[str]) -> None:
    """Write an Aegis endpoints file: one ``host:port`` per line.

    Args:
        path: The file; replaced as a whole.
        urls: Base URLs of a fleet addressed by ``port`` or ``addr``.

    Raises:
        ConfigurationError: The URLs have paths, which the format cannot say.
    """
    _replace(path, "".join(f"{host}:{port}\n" for host, port in map(_place, urls)))


def write_hostfile(path: Path, urls: Sequence[str], tags: Mapping[str, str] | None = None) -> None:
    """Write an Aurora-Swarm hostfile: ``host<TAB>port<TAB>key=value`` per line.

    Args:
        path: The file; replaced as a whole.
        urls: Base URLs of a fleet addressed by ``port`` or ``addr``.
        tags: Put on every line.

    Raises:
        ConfigurationError: The URLs have paths, which the format cannot say.
    """
    columns = [f"{key}={value}" for key, value in (tags or {}).items()]
    lines = ["\t".join([host, str(port), *columns]) for host, port in map(_place, urls)]
    _replace(path, "".join(f"{line}\n" for line in lines))


def _place(url: str) -> tuple[str, int]:
    parts = urlsplit(url)
    if parts.path not in {"", "/", "/v1"} or parts.hostname is None or parts.port is None:
        raise ConfigurationError(
            f"{url} has a path, which host:port lists cannot say; "
            "start the fleet with addressing 'port' or 'addr'"
        )
    return parts.hostname, parts.port


def _replace(path: Path, text: str) -> None:
    """Write a file atomically: a reader sees the old one or the new one."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("x", encoding="utf-8") as file:
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
