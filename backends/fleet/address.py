"""Where an endpoint is and what it is called with: spellings of URLs, labels, keys."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from ..core.errors import ConfigurationError

ApiKey: TypeAlias = str | Callable[[], str] | Callable[[], Awaitable[str]]
"""A key, or a function that fetches the current one."""

NO_KEY: Final = "EMPTY"
"""What servers without authentication are sent, as vLLM's documentation does."""


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """An endpoint as configured.

    Attributes:
        url: Base URL with scheme; ``/v1`` is appended when the path does not end in it.
        api_key: Key or function returning it; never shown.
        label: Name in results and messages; None takes host, port and path from the URL.
        model: The id under which this endpoint serves the run's model, when it differs.
        max_in_flight: Most requests in flight to this endpoint, or None for the policy's.
        weight: Relative speed known beforehand; 2.0 is expected to be twice as fast.
        requests_per_s: Most requests per second that this endpoint may be sent, or None.
        tokens_per_min: Most tokens per minute, prompt and answer, or None.
        max_model_len: Context length in tokens, or None when unknown.
        proxied: Whether the environment's proxy variables count: for gateways, never for nodes.
    """

    url: str
    api_key: ApiKey = field(default=NO_KEY, repr=False)
    label: str | None = None
    model: str | None = None
    max_in_flight: int | None = None
    weight: float = 1.0
    requests_per_s: float | None = None
    tokens_per_min: float | None = None
    max_model_len: int | None = field(default=None, compare=False)
    proxied: bool = False


def base_url(url: str) -> str:
    """Return an endpoint's base URL in one spelling: no credentials, no slash, ending in /v1.

    Raises:
        ConfigurationError: No http(s) URL, or one without a host or with a bad port.
    """
    try:
        parts = urlsplit(url.strip())
    except ValueError as error:
        raise ConfigurationError(f"an endpoint is no URL: {error}") from error
    shown = display(url)
    if parts.scheme not in {"http", "https"}:
        raise ConfigurationError(
            f"endpoint {shown!r}: write a full URL, such as http://host:8000/v1"
        )
    try:
        port = parts.port
    except ValueError as error:
        raise ConfigurationError(f"endpoint {shown!r}: the port must be 1 to 65535") from error
    if not parts.hostname or port == 0:
        raise ConfigurationError(f"endpoint {shown!r}: host or port is missing")
    if re.search(r"[\s\x00-\x1f\x7f]", parts.netloc + parts.path):
        raise ConfigurationError(f"endpoint {shown!r}: a URL holds no blanks")
    if parts.query or parts.fragment:
        raise ConfigurationError(f"endpoint {shown!r}: a base URL has no query or fragment")
    path = parts.path.rstrip("/")
    if not re.search(r"/v\d+$", path):
        path += "/v1"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2].lower(), path, "", ""))


def display(url: str) -> str:
    """Return a URL without user, password, query and fragment, fit for messages."""
    parts = urlsplit(url.strip())
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def label_of(url: str) -> str:
    """Return the short name of a base URL: host, port and path without ``/v1``."""
    parts = urlsplit(base_url(url))
    return parts.netloc + re.sub(r"/v\d+$", "", parts.path)
