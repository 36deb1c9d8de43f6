"""Endpoint lists in files: Aegis' ``host:port`` lines, Aurora-Swarm's TAB columns, plain URLs.

The format is decided per line, for the files that the launchers write do not name theirs.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from ..core.errors import ConfigurationError, NoEndpointError
from ..core.permissions import untrusted_reason
from ..fleet.address import NO_KEY, ApiKey, EndpointSpec, base_url, display

_LOG: Final = logging.getLogger(__name__)
_HOST_PORT: Final = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[^:\s]+):(\d{1,5})")
_SWARM_PORT: Final = 8000
"""Aurora-Swarm's default, where a line names no port."""

_MAX_PORT: Final = 65535
_COMMENT: Final = "#"


def read_endpoints_file(path: Path, api_key: ApiKey = NO_KEY) -> list[EndpointSpec]:
    """Read an endpoints file.

    Raises:
        ConfigurationError: The file cannot be read, or a line of it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"endpoints file {path}: {error}") from error
    return parse_endpoints_file(text, str(path), api_key)


def trusted_key(path: Path, key: ApiKey) -> ApiKey:
    """Return the key for the endpoints that a file names: none where others can write the file.

    Args:
        path: The file.
        key: The key of the settings.

    Raises:
        OSError: The file cannot be looked at.
    """
    if key == NO_KEY or (reason := untrusted_reason(path)) is None:
        return key
    warn_untrusted(path, reason)
    return NO_KEY


def warn_untrusted(path: Path, reason: str) -> None:
    """Tell that the endpoints of a file get no key."""
    _LOG.warning("the endpoints in %s get no API key: %s", path, reason)


def parse_endpoints_file(text: str, name: str, api_key: ApiKey = NO_KEY) -> list[EndpointSpec]:
    """Read the endpoints of a file.

    Args:
        text: The file's text.
        name: The file's name, for messages.
        api_key: Key for all of them.

    Returns:
        One entry per endpoint, in the file's order, duplicates dropped.

    Raises:
        NoEndpointError: There is none.
        ConfigurationError: A line cannot be read; with the line's number.
    """
    specs: dict[str, EndpointSpec] = {}
    for number, raw in enumerate(text.removeprefix("\ufeff").splitlines(), start=1):
        line = raw.strip()
        if not line or line.startswith(_COMMENT):
            continue
        try:
            spec = _parse_line(line, api_key)
            specs.setdefault(base_url(spec.url), spec)
        except ConfigurationError as error:
            raise ConfigurationError(f"{name}, line {number}: {error.message}") from error
    if not specs:
        raise NoEndpointError(f"{name}: the file names no endpoint")
    return list(specs.values())


def _parse_line(line: str, api_key: ApiKey) -> EndpointSpec:
    first, *columns = line.split("\t")
    if " " in line and not columns:
        raise ConfigurationError(f"{line!r}: columns are separated by TAB, not by spaces")
    if "://" in first:
        return _spec(first, columns, api_key)
    if match := _HOST_PORT.fullmatch(first):
        if columns and columns[0].isdigit():
            raise ConfigurationError(f"{first!r} names a port, and column 2 another")
        return _spec(f"http://{match[1]}:{_port(match[2])}", columns, api_key)
    if ":" in first:
        raise ConfigurationError(
            f"{first!r} is neither host, host:port nor URL (IPv6 goes in brackets: [::1]:8000)"
        )
    port = _SWARM_PORT
    if columns and columns[0].isdigit():
        port = _port(columns.pop(0))
    return _spec(f"http://{first}:{port}", columns, api_key)


def _port(digits: str) -> int:
    port = int(digits)
    if not 0 < port <= _MAX_PORT:
        raise ConfigurationError(f"port {digits} is not in 1 to {_MAX_PORT}")
    return port


def _spec(url: str, columns: Iterable[str], api_key: ApiKey) -> EndpointSpec:
    tags = dict(c.strip().split("=", 1) for c in columns if "=" in c)
    try:
        most = int(tags["max_in_flight"]) if "max_in_flight" in tags else None
        weight = float(tags.get("weight", "1"))
    except ValueError as error:
        raise ConfigurationError(f"{display(url)}: tag is no number: {error}") from error
    if weight <= 0 or (most is not None and most < 1):
        raise ConfigurationError(f"{display(url)}: weight and max_in_flight must be positive")
    return EndpointSpec(url, api_key, model=tags.get("model"), max_in_flight=most, weight=weight)
