"""One endpoint: where it is, what it may be called with, and how it is doing."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Final, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from ..contract.errors import ConfigurationError

ApiKey: TypeAlias = str | Callable[[], str] | Callable[[], Awaitable[str]]
"""A key, or a function that fetches the current one."""

NO_KEY: Final = "EMPTY"
"""What servers without authentication are sent, as vLLM's documentation does."""

_SMOOTHING: Final = 0.1
"""Weight of the newest answer in the smoothed latency."""


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
    """

    url: str
    api_key: ApiKey = field(default=NO_KEY, repr=False)
    label: str | None = None
    model: str | None = None
    max_in_flight: int | None = None
    weight: float = 1.0
    requests_per_s: float | None = None


def base_url(url: str) -> str:
    """Return an endpoint's base URL in one spelling: no credentials, no slash, ending in /v1.

    Raises:
        ConfigurationError: No http(s) URL, or one without a host or with a bad port.
    """
    parts = urlsplit(url.strip())
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


class Endpoint:
    """A live member of a fleet.

    Args:
        spec: The endpoint as configured.

    Attributes:
        label: Name in results and messages, without credentials.
        url: Base URL.
        chat_url: URL of the chat completions.
        model: Its own id of the run's model, or None for the request's.
        outstanding: Requests in flight.
        latency_s: Smoothed time to an answer in seconds, 0 when none has come.
        max_model_len: Context length in tokens, or None when unknown.
        alive: Whether it is used at all.
        resting: Whether it asked for a pause that still lasts.
    """

    __slots__ = (
        "alive",
        "api_key",
        "chat_url",
        "label",
        "latency_s",
        "max_model_len",
        "model",
        "outstanding",
        "resting",
        "spec",
        "url",
    )

    def __init__(self, spec: EndpointSpec) -> None:
        self.spec = spec
        self.url = base_url(spec.url)
        self.label = spec.label or label_of(spec.url)
        self.chat_url = f"{self.url}/chat/completions"
        self.api_key = spec.api_key
        self.model = spec.model
        self.outstanding = 0
        self.latency_s = 0.0
        self.max_model_len: int | None = None
        self.alive = True
        self.resting = False

    @property
    def free(self) -> bool:
        """Whether it may be sent a request now."""
        most = self.spec.max_in_flight
        return self.alive and not self.resting and (most is None or self.outstanding < most)

    def observe(self, seconds: float) -> None:
        """Blend one answer's time into the smoothed latency."""
        self.latency_s += (seconds - self.latency_s) * (_SMOOTHING if self.latency_s else 1.0)

    async def key(self) -> str:
        """Return the key to send now, asking its source if there is one."""
        if isinstance(self.api_key, str):
            return self.api_key
        key = self.api_key()
        return key if isinstance(key, str) else await key

    def __repr__(self) -> str:
        """Show the label only: keys stay secret."""
        return f"Endpoint({self.label!r}, outstanding={self.outstanding})"
