"""One endpoint: address, circuit breaker, counts, state."""

from __future__ import annotations

import asyncio
import enum
import ipaddress
import logging
import re
import time
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Final, Protocol, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from ..core.errors import ConfigurationError
from ..core.protocols import CallLog
from ..core.request_urls import URL_FIELD, join_url
from ..core.waits import pause_after
from .adaptive_limit import AdaptiveLimit
from .policy import AdaptiveLimitPolicy, BreakerPolicy
from .rate_limit import Quota
from .stats import EndpointReport, EndpointStats, FlightTime

ApiKey: TypeAlias = str | Callable[[], str] | Callable[[], Awaitable[str]]
"""A key, or a function that fetches the current one."""

NO_KEY: Final = "EMPTY"
"""Key sent to servers without authentication, as in vLLM's documentation."""


class DeploymentState(enum.Enum):
    """State of a model behind a gateway."""

    RUNNING = "running"
    STARTING = "starting"
    QUEUED = "queued"
    COLD = "not running"


class DeploymentWatch(Protocol):
    """Tells whether a model behind a gateway runs; a request starts one that does not."""

    @property
    def poll_s(self) -> float:
        """Return the seconds between two reads."""
        ...

    @property
    def start_wait_s(self) -> float:
        """Return the longest wait for a start, in seconds."""
        ...

    @property
    def wake_again_s(self) -> float:
        """Return the seconds after which another request may start the model."""
        ...

    @property
    def starts_models(self) -> bool:
        """Return True if this process starts the model; False: another one does, for all."""
        ...

    async def report_stopped(self) -> None:
        """Tell the process that starts the model that a request has shown that it does not run."""
        ...

    async def read_state(self) -> DeploymentState | None:
        """Return the state now, or None if it is unknown.

        Raises:
            RunStoppedError: Nothing starts the model any more.
        """
        ...


@dataclass(frozen=True, slots=True)
class EndpointSpec:
    """An endpoint as configured.

    Attributes:
        url: Base URL with scheme; ``/v1`` is appended if the path does not end in it.
        api_key: Key or function returning it; never shown.
        label: Name in results and messages; None takes host, port and path from the URL.
        model: The id under which this endpoint serves the run's model, if it differs.
        max_in_flight: Limit of requests in flight to this endpoint, or None for the policy's.
        weight: Relative speed known beforehand; 2.0 is expected to be twice as fast.
        requests_per_s: Limit of requests per second to this endpoint, or None.
        tokens_per_min: Limit of tokens, prompt and answer, within any interval of ``window_s``, or
            None.
        window_s: Length in seconds of the windows in which it counts tokens.
        max_model_len: Context length in tokens, or None if unknown.
        proxied: Whether the environment's proxy variables apply: for gateways, never for nodes.
        spellings: How its list names the same endpoint once more, for a warning.
        probe_model: Model that a probe asks for one token, behind a gateway whose list of models
            does not show whether the server works; None: a probe asks for the list.
        state: State of its model behind a gateway, or None if unknown; one that does not run is
            on standby at first.
        watch: Tells the state later; None: the model always runs.
    """

    url: str
    api_key: ApiKey = field(default=NO_KEY, repr=False)
    label: str | None = None
    model: str | None = None
    max_in_flight: int | None = None
    weight: float = 1.0
    requests_per_s: float | None = None
    tokens_per_min: float | None = None
    window_s: float = 60.0
    max_model_len: int | None = field(default=None, compare=False)
    proxied: bool = False
    spellings: tuple[str, ...] = field(default=(), compare=False)
    probe_model: str | None = field(default=None, compare=False)
    state: DeploymentState | None = field(default=None, compare=False)
    watch: DeploymentWatch | None = field(default=None, compare=False, repr=False)


_LOG: Final = logging.getLogger(__name__)
_CHAT_PATH: Final = "/chat/completions"
_VERSION: Final = re.compile(
    r"/v\d{1,3}(?:\.\d+)*(?:[._-]?(?:alpha|beta|rc|preview|p)\d*)*(?=/|$)", re.IGNORECASE
)
"""A version segment of a path: v1, v1beta, v2.1, v1alpha3."""


@lru_cache(maxsize=1024)
def _warn_of_chat_path(shown: str) -> None:
    """Warn, once for each URL."""
    _LOG.warning("endpoint %s: write the base URL, without %s", shown, _CHAT_PATH)


def normalize_base_url(url: str) -> str:
    """Return a normalized base URL: no credentials, no trailing slash, with a version.

    ``/v1`` is appended to a path without a version segment, such as ``/v1beta/openai`` has.

    Raises:
        ConfigurationError: Not an http(s) URL, or one without a host or with a bad port.
    """
    try:
        parts = urlsplit(url.strip())
    except ValueError as error:
        raise ConfigurationError(f"an endpoint is not a URL: {error}") from error
    shown = redact_url(url)
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
        raise ConfigurationError(f"endpoint {shown!r}: a URL must not contain blanks")
    if parts.query or parts.fragment:
        raise ConfigurationError(
            f"endpoint {shown!r}: a base URL must not have a query or fragment"
        )
    path = parts.path.rstrip("/")
    if path.endswith(_CHAT_PATH):
        _warn_of_chat_path(shown)
        path = path.removesuffix(_CHAT_PATH).rstrip("/")
    if not _VERSION.search(path):
        path += "/v1"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2].lower(), path, "", ""))


def redact_url(url: str) -> str:
    """Return a URL without user, password, query and fragment, suitable for messages."""
    parts = urlsplit(url.strip())
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def make_label(url: str) -> str:
    """Return the short name of a base URL: host, port and path without ``/v1``."""
    parts = urlsplit(normalize_base_url(url))
    return parts.netloc + re.sub(r"/v\d+$", "", parts.path)


_DEFAULT_PORTS: Final = {"http": 80, "https": 443}


@lru_cache(maxsize=4096)
def identify_endpoint(url: str) -> str:
    """Return the canonical form of a base URL, which is equal for all spellings of an endpoint.

    It is only compared: requests go to the URL as it is configured.

    Raises:
        ConfigurationError: The URL is malformed.
    """
    parts = urlsplit(normalize_base_url(url))
    host = (parts.hostname or "").rstrip(".")
    try:
        host = str(ipaddress.ip_address(host))
    except ValueError:
        host = "127.0.0.1" if host == "localhost" else host
    port = parts.port or _DEFAULT_PORTS[parts.scheme]
    return f"{parts.scheme}://{host} {port}{re.sub('/+', '/', parts.path)}"


def merge_spellings(specs: Iterable[EndpointSpec], *, by_model: bool = True) -> list[EndpointSpec]:
    """Return each endpoint of a list once, with its first spelling.

    A host without a domain is the same as the only host of the list that adds a domain to it.

    Args:
        specs: The list.
        by_model: Whether entries that name different models of one server are kept apart.

    Raises:
        ConfigurationError: A URL is malformed.
    """
    listed = [(identify_endpoint(spec.url), spec) for spec in specs]
    domains = dict[str, set[str]]()
    for key, _ in listed:
        short = _drop_domain(key)
        if short != key:
            domains.setdefault(short, set()).add(key)
    merged = dict[str, list[EndpointSpec]]()
    for key, spec in listed:
        same = domains.get(key, ())
        known = merged.setdefault(next(iter(same)) if len(same) == 1 else key, [])
        for n, first in enumerate(known):
            if not by_model or None in {first.model, spec.model} or first.model == spec.model:
                further = (*first.spellings, spec.label or redact_url(spec.url), *spec.spellings)
                known[n] = replace(first, spellings=further)
                break
        else:
            known.append(spec)
    return [spec for known in merged.values() for spec in known]


def _drop_domain(key: str) -> str:
    """Return the canonical form of an endpoint without its host's domain; addresses have none."""
    host = key.partition("://")[2].partition(" ")[0]
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return key.replace(host, host.partition(".")[0], 1)
    return key


def describe_spellings(spec: EndpointSpec) -> str | None:
    """Return how a list names an endpoint more than once, or None if it does not."""
    if not spec.spellings:
        return None
    name = spec.label or redact_url(spec.url)
    others = ", ".join(one for one in dict.fromkeys(spec.spellings) if one != name)
    return f"{name} is also listed as {others}" if others else f"{name} is listed more than once"


class BreakerState(enum.Enum):
    """State of an endpoint's circuit breaker."""

    CLOSED = "in use"
    OPEN = "unhealthy"
    HALF_OPEN = "recovering"


class Breaker:
    """Circuit breaker as pure state; its owner sets the timers.

    Args:
        policy: When to open, and for how long.

    Attributes:
        state: Closed, open or half-open.
        times_opened: Times that it opened.
    """

    __slots__ = ("_in_a_row", "_pauses", "_policy", "state", "times_opened")

    def __init__(self, policy: BreakerPolicy) -> None:
        self._policy = policy
        self._in_a_row = 0
        self._pauses = 0
        self.state = BreakerState.CLOSED
        self.times_opened = 0

    @property
    def pause_s(self) -> float:
        """Return the seconds to stay open now; doubled while the endpoint does not recover."""
        return pause_after(self._policy.wait, max(self._pauses, 1))

    def record_failure(self, at_once: bool = False) -> bool:
        """Count a failure; return True if it opens the breaker.

        Calls that were in flight when it opened fail late; they do not open it again.
        """
        if self.state is BreakerState.OPEN:
            return False
        self._in_a_row += 1
        tried = self.state is BreakerState.HALF_OPEN
        if not (at_once or tried or self._in_a_row >= self._policy.failures):
            return False
        self.state = BreakerState.OPEN
        self._pauses += 1
        self.times_opened += not tried
        return True

    def record_missed_probe(self) -> None:
        """Stay open longer: a probe failed."""
        self._pauses += 1

    def half_open(self) -> None:
        """Allow one request: a probe was answered."""
        self.state = BreakerState.HALF_OPEN

    def record_success(self) -> bool:
        """Count a success; return True if it closes the breaker."""
        self._in_a_row = 0
        if self.state is not BreakerState.HALF_OPEN:
            # A request that was in flight when the breaker opened does not show recovery.
            return False
        self.close()
        return True

    def close(self) -> None:
        """Allow requests: the endpoint has recovered, or another server has its place."""
        self._in_a_row = self._pauses = 0
        self.state = BreakerState.CLOSED


_SMOOTHING: Final = 0.1
"""Weight of the newest answer in the smoothed latency."""
_LATELY_S: Final = 60.0
"""An endpoint that answered within so many seconds is considered healthy."""
_CORRECTIONS: Final = 64
"""Limit of unconfirmed answer lengths that are remembered."""


@dataclass(frozen=True, slots=True)
class RefusalMark:
    """Counts of an endpoint at the time it refused an item for now.

    Attributes:
        when: Monotonic time in seconds.
        accepted: Requests that it had accepted.
        throttled: Times that it had asked for a pause.
        alone: Whether it refused only this item, as far as was known then.
    """

    when: float
    accepted: int
    throttled: int
    alone: bool


_AcceptedRequest: TypeAlias = tuple[CallLog | None, Mapping[str, str], float]
"""An item, the headers of a request that was accepted, and when."""


class Endpoint:
    """A member of a fleet.

    Args:
        spec: The endpoint as configured.
        limit: How its limit of requests in flight adapts.
        breaker: When it is marked unhealthy.
        quota: Its own quota, or None.

    Attributes:
        label: Name in results and messages, without credentials.
        url: Base URL.
        host: Name or address of the machine.
        chat_url: URL of the chat completions.
        in_flight: Requests in flight.
        latency_s: Smoothed time to an answer in seconds, 0 if none has come.
        ejected: Whether it is excluded for the rest of the run.
        refusals: Times in a row that it asked for a pause.
        retired: Whether it has left the fleet.
        resting: Whether it asked for a pause that still lasts.
        rests_until: Monotonic time in seconds of the end of its last pause.
        standby: Whether its model does not run, so that it gets no requests.
        standby_at: Monotonic time in seconds since which that is known from a failed request.
        limit: Its adaptive limit of requests in flight.
        breaker: Its circuit breaker.
        quota: Its own quota of requests and tokens, or None.
        over_quota: Whether the next request must wait for this quota.
        foreign_load: Requests of other clients that it processes, as far as it is polled.
        queue_width: Limit of requests in flight above which they would wait inside the server, or
            None if unknown.
        max_answer_tokens: Longest answer in tokens that may be requested, or None if unknown.
        refused_fields: Optional fields of requests that it has refused.
        longest: Longest answer in tokens among accepted requests.
        longest_asked: The field of the last such request from which that was taken.
        stats: Its statistics.
        flight: The time that requests to it are in flight, lines of batches included.
        streaming: Streams in flight that have begun.
        refused_items: By id, the items that it has refused since it last accepted another one; they
            are kept alive, for an id may be used again.
        accepted: Requests that it has accepted.
        throttled: Times that it asked for a pause, other than for one item alone.
        unanswered: The tasks whose requests it has not answered yet, and when they were sent, in
            monotonic seconds; the oldest first.
        heard_at: Monotonic time in seconds of its last answer, of any status.
    """

    __slots__ = (
        "_accepted",
        "_accepted_before",
        "_corrections",
        "_headers",
        "_key",
        "_left_with",
        "accepted",
        "breaker",
        "chat_url",
        "ejected",
        "flight",
        "foreign_load",
        "heard_at",
        "host",
        "in_flight",
        "label",
        "latency_s",
        "limit",
        "longest",
        "longest_asked",
        "max_answer_tokens",
        "over_quota",
        "queue_width",
        "quota",
        "refusals",
        "refused_fields",
        "refused_items",
        "resting",
        "rests_until",
        "retired",
        "spec",
        "standby",
        "standby_at",
        "stats",
        "streaming",
        "throttled",
        "unanswered",
        "url",
    )

    def __init__(
        self,
        spec: EndpointSpec,
        limit: AdaptiveLimitPolicy | None = None,
        breaker: BreakerPolicy | None = None,
        quota: Quota | None = None,
    ) -> None:
        self.spec = spec
        self.url = normalize_base_url(spec.url)
        self.host = urlsplit(self.url).hostname or ""
        self.label = spec.label or make_label(spec.url)
        self.chat_url = f"{self.url}/chat/completions"
        self.in_flight = 0
        self.latency_s = 0.0
        self.ejected = False
        self.retired = False
        self.resting = False
        self.rests_until = float("-inf")
        self.standby = spec.watch is not None and spec.state not in {None, DeploymentState.RUNNING}
        self.standby_at = float("-inf")
        self.limit = AdaptiveLimit(limit or AdaptiveLimitPolicy(), spec.max_in_flight)
        self.breaker = Breaker(breaker or BreakerPolicy())
        self.quota = quota
        self.over_quota = False
        self.foreign_load = 0
        self.queue_width: int | None = None
        self.refusals = 0
        self.max_answer_tokens = spec.max_model_len
        self.refused_fields: frozenset[str] = frozenset()
        self.longest = 0
        self.longest_asked: object = None
        self._corrections: dict[int, int] = {}
        self._accepted: _AcceptedRequest = (None, {}, float("-inf"))
        self._accepted_before: _AcceptedRequest = (None, {}, float("-inf"))
        self.streaming = 0
        self.refused_items: dict[int, object] = {}
        self.accepted = 0
        self.throttled = 0
        self.unanswered: dict[asyncio.Task[Any], float] = {}
        self.heard_at = 0.0
        self.stats = EndpointStats()
        self._left_with = (0, 0)
        self.flight = FlightTime()
        self._key: str | None = None
        self._headers: Mapping[str, str] = {}

    def rejoin(self, fresh: Endpoint) -> None:
        """Take part again after it left the fleet.

        Statistics and requests in flight are kept; what was learnt of the server is forgotten.

        Args:
            fresh: The endpoint as it is listed now, unused.
        """
        self.spec, self.quota, self.limit = fresh.spec, fresh.quota, fresh.limit
        self.standby, self.standby_at = fresh.standby, fresh.standby_at
        self.max_answer_tokens = fresh.max_answer_tokens
        self.refused_fields = fresh.refused_fields
        self.breaker.close()
        self.retired = self.ejected = self.over_quota = False
        self.latency_s, self.foreign_load, self.queue_width = 0.0, 0, None
        self.refusals = self.longest = 0
        self.longest_asked = None
        self.refused_items.clear()
        self._corrections.clear()
        self._accepted = self._accepted_before = (None, {}, float("-inf"))
        self._left_with = self.stats.calls, self.stats.failures.total()

    def take_over(self, earlier: Endpoint) -> None:
        """Go on with the limit, the health, the pause and the speed that an earlier fleet found."""
        self.limit, self.breaker = earlier.limit, earlier.breaker
        self.limit.forget_latencies()
        self.breaker.times_opened = 0
        self.latency_s = earlier.latency_s
        self.refusals, self.rests_until = earlier.refusals, earlier.rests_until

    def get_request_url(self, body: Mapping[str, Any]) -> str:
        """Return the address to which a request is sent."""
        url = body.get(URL_FIELD)
        return self.chat_url if url is None else join_url(self.url, url)

    @property
    def alive(self) -> bool:
        """Return True if it is in use."""
        out = self.ejected or self.retired or self.standby
        return not out and self.breaker.state is not BreakerState.OPEN

    @property
    def width(self) -> int:
        """Return the limit of requests in flight that applies now."""
        if self.refused_items or self.breaker.state is BreakerState.HALF_OPEN:
            return 1
        width, most = self.limit.width, self.queue_width
        return width if most is None or width <= most else most

    @property
    def free(self) -> bool:
        """Return True if it may be sent a request now."""
        waits = self.resting or self.over_quota
        return self.alive and not waits and self.in_flight < self.width

    @property
    def serves_others(self) -> bool:
        """Return True if it has answered and is healthy: a failure may be the item's fault."""
        return self.has_answered and self.breaker.state is BreakerState.CLOSED

    @property
    def calls(self) -> int:
        """Return the number of calls since it joined, or joined again."""
        return self.stats.calls - self._left_with[0]

    @property
    def has_answered(self) -> bool:
        """Return True if it has given a good answer since it joined."""
        return self.calls > self.stats.failures.total() - self._left_with[1]

    def confirm_max_tokens(self, most_tokens: int, request: int) -> bool:
        """Record the longest answer that it allows; return True if another request confirms it.

        Args:
            most_tokens: The longest answer that it reported.
            request: A hash of the request.
        """
        if len(self._corrections) >= _CORRECTIONS:
            self._corrections.clear()
        return self._corrections.setdefault(most_tokens, request) != request

    def record_accepted(self, item: CallLog | None, sent: Mapping[str, str], now: float) -> None:
        """Record that it has accepted a request.

        Args:
            item: The item that the request belongs to, if any.
            sent: The request's headers.
            now: Monotonic time in seconds.
        """
        if item is None or item is not self._accepted[0]:
            self._accepted_before = self._accepted
        self._accepted = item, sent, now
        self.accepted += 1

    def accepts_others(self, item: CallLog | None, sent: Mapping[str, str], now: float) -> bool:
        """Return True if it has recently accepted a request of another item with the same key."""
        last_item, headers, when = self._accepted
        if item is not None and last_item is item:
            _, headers, when = self._accepted_before
        return now - when <= _LATELY_S and headers == sent

    def is_proven(self, item: CallLog | None, now: float) -> bool:
        """Return True if it has recently accepted another item's request with the current key."""
        return self.accepts_others(item, self._headers, now)

    def mark(self, now: float, alone: bool) -> RefusalMark:
        """Return counts to compare an item's next refusal with."""
        return RefusalMark(now, self.accepted, self.throttled, alone)

    def refuses_alone(self, item: CallLog | None, mark: RefusalMark, now: float) -> bool:
        """Return True if since ``mark`` it has accepted more requests of others than it refused.

        If it did neither, what was known at the mark holds for a while: a repetition that comes
        before any other request shows nothing new.
        """
        accepted, throttled = self.accepted - mark.accepted, self.throttled - mark.throttled
        if not (accepted or throttled):
            return mark.alone and now - mark.when <= _LATELY_S
        last_item, _, when = self._accepted
        if item is not None and last_item is item:
            _, _, when = self._accepted_before
        return when > mark.when and accepted > throttled

    def record_latency(self, seconds: float) -> None:
        """Blend one answer's time into the smoothed latency."""
        self.latency_s += (seconds - self.latency_s) * (_SMOOTHING if self.latency_s else 1.0)

    def record_heard(self, task: asyncio.Task[Any]) -> None:
        """Record that it has answered a task's request."""
        del self.unanswered[task]
        self.heard_at = time.monotonic()

    async def headers(self) -> Mapping[str, str]:
        """Return the headers of a request, with the current key."""
        source = self.spec.api_key
        if isinstance(source, str):
            key = source
        else:
            fetched = source()
            key = fetched if isinstance(fetched, str) else await fetched
        if key != self._key:
            self._key = key
            self._headers = {
                "Authorization": f"Bearer {key}",
                "Content-Type": "application/json",
            }
        return self._headers

    async def renew_key(self, sent: Mapping[str, str]) -> bool:
        """Return True if there is another key than the one that was refused.

        Args:
            sent: The headers of the request that was refused.
        """
        if (renew := getattr(self.spec.api_key, "renew", None)) is not None:
            await renew(sent["Authorization"].removeprefix("Bearer "))
        return await self.headers() != sent

    @property
    def state(self) -> str:
        """Return the state in words."""
        if self.retired:
            return "left the fleet"
        if self.resting and self.alive:
            return "resting"
        if self.standby and not self.ejected:
            return "standby"
        return "ejected" if self.ejected else self.breaker.state.value

    def report(self) -> EndpointReport:
        """Return the endpoint's row in a report."""
        stats = self.stats
        return EndpointReport(
            endpoint=self.label,
            state=self.state,
            in_flight=self.in_flight,
            width=self.width,
            calls=stats.calls,
            failures=dict(stats.failures),
            prompt_tokens=stats.prompt_tokens,
            completion_tokens=stats.completion_tokens,
            cached_tokens=stats.cached_tokens,
            lost_prompt_tokens=stats.lost_prompt_tokens,
            lost_completion_tokens=stats.lost_completion_tokens,
            useful_tokens=stats.useful_tokens,
            latency_p50_s=stats.latency_s(0.5),
            latency_p90_s=stats.latency_s(0.9),
            latency_p99_s=stats.latency_s(0.99),
            opened=self.breaker.times_opened,
            hedges=stats.hedges,
        )

    def __repr__(self) -> str:
        """Show only the label: keys stay secret."""
        return f"Endpoint({self.label!r}, outstanding={self.in_flight})"
