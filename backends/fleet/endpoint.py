"""One endpoint: address, adaptive concurrency limit, circuit breaker, state."""

from __future__ import annotations

import enum
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Final, TypeAlias
from urllib.parse import urlsplit, urlunsplit

from ..core.errors import ConfigurationError
from ..core.protocols import CallLog
from .policy import AdaptiveLimitPolicy, BreakerPolicy, TokenBucket
from .stats import EndpointReport, EndpointStats

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


def normalize_base_url(url: str) -> str:
    """Return an endpoint's base URL in one spelling: no credentials, no slash, ending in /v1.

    Raises:
        ConfigurationError: No http(s) URL, or one without a host or with a bad port.
    """
    try:
        parts = urlsplit(url.strip())
    except ValueError as error:
        raise ConfigurationError(f"an endpoint is no URL: {error}") from error
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
        raise ConfigurationError(f"endpoint {shown!r}: a URL holds no blanks")
    if parts.query or parts.fragment:
        raise ConfigurationError(f"endpoint {shown!r}: a base URL has no query or fragment")
    path = parts.path.rstrip("/")
    if not re.search(r"/v\d+$", path):
        path += "/v1"
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2].lower(), path, "", ""))


def redact_url(url: str) -> str:
    """Return a URL without user, password, query and fragment, fit for messages."""
    parts = urlsplit(url.strip())
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path, "", ""))


def make_label(url: str) -> str:
    """Return the short name of a base URL: host, port and path without ``/v1``."""
    parts = urlsplit(normalize_base_url(url))
    return parts.netloc + re.sub(r"/v\d+$", "", parts.path)


class BreakerState(enum.Enum):
    """How much an endpoint is trusted."""

    CLOSED = "in use"
    OPEN = "left alone"
    HALF_OPEN = "tried with one request"


class Breaker:
    """Pure state; who owns it sets the timers.

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
        """Seconds to stay open now; doubled while the endpoint does not recover."""
        # The exponent is bounded, for 2.0**1024 overflows.
        doubled = self._policy.open_s * 2.0 ** min(max(self._pauses - 1, 0), 32)
        return min(self._policy.open_max_s, doubled)

    def record_failure(self, at_once: bool = False) -> bool:
        """Count a failure; return True when it opens the breaker.

        Calls that were in flight when it opened fail late; they open nothing again.
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
        """Stay open longer: a probe found nobody."""
        self._pauses += 1

    def half_open(self) -> None:
        """Let one request through: a probe was answered."""
        self.state = BreakerState.HALF_OPEN

    def record_success(self) -> bool:
        """Count a success; return True when it closes the breaker."""
        self._in_a_row = 0
        if self.state is not BreakerState.HALF_OPEN:
            # An answer that was under way when the breaker opened says nothing of now.
            return False
        self._pauses = 0
        self.state = BreakerState.CLOSED
        return True


class AdaptiveLimit:
    """The width of one endpoint's lane; pure, time is passed in.

    Args:
        policy: How to find it.
        ceiling: Most requests in flight to this endpoint, or None for the policy's.

    Attributes:
        width: Requests in flight allowed now.
    """

    __slots__ = (
        "_ceiling",
        "_changed",
        "_credit",
        "_done",
        "_doubling",
        "_held_until",
        "_knee",
        "_levels",
        "_policy",
        "width",
    )

    def __init__(self, policy: AdaptiveLimitPolicy, ceiling: int | None = None) -> None:
        self._policy = policy
        self._ceiling = ceiling or policy.ceiling
        self._knee = self._ceiling
        self._levels: dict[int, tuple[int, float]] = {}
        self._done = self._credit = 0
        self._doubling = True
        self._changed = self._held_until = float("-inf")
        self.width = min(policy.start, self._ceiling)

    def _most(self, now: float) -> int:
        return self._knee if now < self._held_until else self._ceiling

    def widen(self, now: float) -> bool:
        """Give more, after the lane was full for a while; return whether it did."""
        most = self._most(now)
        if self.width >= most or now - self._changed < self._policy.settle_s:
            return False
        step = max(1, int(self.width * self._policy.step))
        grown = int(self.width * self._policy.widen) if self._doubling else self.width + step
        self.width = min(most, grown)
        self._changed = now
        return True

    def record_answer(self, level: int, seconds: float, now: float) -> None:
        """Count an answer; as many as the lane is wide make up for one refusal.

        Args:
            level: Requests in flight, its own included, when it was sent.
            seconds: How long it took.
            now: Monotonic time in seconds.
        """
        key = level.bit_length()
        count, mean = self._levels.get(key, (0, 0.0))
        weight = 1.0 / min(count + 1, 4 * self._policy.samples)
        self._levels[key] = count + 1, mean + (seconds - mean) * weight
        self._done += 1
        if self._done % self._policy.samples == 0:
            self._find_knee(key, now)
        self._credit += not self._doubling
        if self._credit >= self.width:
            self._credit = 0
            self.width = min(self._most(now), self.width + 1)

    def _find_knee(self, key: int, now: float) -> None:
        count, mean = self._levels[key]
        before, base = self._levels.get(key - 1, (0, 0.0))
        if min(count, before) < self._policy.samples or mean <= base * self._policy.knee:
            return
        # The half below this level is what the server serves at once: the rest waits there.
        self._knee = min(self._ceiling, 1 << (key - 1))
        self._levels.clear()
        self._doubling = False
        self._held_until = now + self._policy.explore_s
        self.width = min(self.width, self._knee)

    def record_refusal(self, outstanding: int) -> None:
        """Take less: the endpoint had room for the others in flight, but not for this one.

        Args:
            outstanding: Requests in flight, the refused one included.
        """
        self._doubling = False
        self._credit = 0
        self.width = max(1, min(self.width, outstanding - 1))

    def shrink(self, now: float) -> None:
        """Take a good deal less: answers did not come in time. A burst counts once."""
        self._doubling = False
        if now - self._changed >= self._policy.settle_s:
            self.width = max(1, int(self.width * self._policy.shrink))
            self._changed = now

    def reset(self, now: float) -> None:
        """Start small again: the endpoint was away."""
        self._levels.clear()
        self._doubling = True
        self._changed = now
        self._held_until = float("-inf")
        self.width = min(self._policy.start, self._ceiling)


_SMOOTHING: Final = 0.1
"""Weight of the newest answer in the smoothed latency."""
_LATELY_S: Final = 60.0
"""An endpoint that answered so many seconds ago is taken to be in order."""
_CORRECTIONS: Final = 64
"""Longest answers that are remembered until they are confirmed."""


@dataclass(frozen=True, slots=True)
class RefusalMark:
    """What an endpoint had done when it refused an item for now.

    Attributes:
        when: Monotonic time in seconds.
        accepted: Requests that it had accepted.
        throttled: Times that it had asked for a pause.
    """

    when: float
    accepted: int
    throttled: int


_AcceptedRequest: TypeAlias = tuple[CallLog | None, Mapping[str, str], float]
"""An item, the headers of a request that was accepted, and when."""


class Endpoint:
    """A member of a fleet.

    Args:
        spec: The endpoint as configured.
        limit: How its share of requests in flight is found.
        breaker: When it is left alone.

    Attributes:
        label: Name in results and messages, without credentials.
        url: Base URL.
        host: Name or address of the machine.
        chat_url: URL of the chat completions.
        in_flight: Requests in flight.
        latency_s: Smoothed time to an answer in seconds, 0 when none has come.
        ejected: Whether it is used no more.
        refusals: Times in a row that it asked for a pause.
        retired: Whether it has left the fleet.
        resting: Whether it asked for a pause that still lasts.
        limit: How many requests it gets at once.
        breaker: Whether it is trusted.
        request_bucket: Its own quota of requests, or None.
        token_bucket: Its own quota of tokens, or None.
        foreign_load: Requests of others that it works on, as far as it is asked.
        max_answer_tokens: Longest answer in tokens that it can be asked for, or None when unknown.
        longest: The longest answer in tokens that it was asked for by a request that it accepted.
        longest_asked: The field of the last such request from which that was taken.
        stats: What it did.
        streaming: Streams in flight that have begun.
        refused_items: Items that it has refused since it last accepted another one.
        accepted: Requests that it has accepted.
        throttled: Times that it asked for a pause, other than for one item alone.
    """

    __slots__ = (
        "_accepted",
        "_accepted_before",
        "_corrections",
        "_headers",
        "_key",
        "accepted",
        "breaker",
        "chat_url",
        "ejected",
        "foreign_load",
        "host",
        "in_flight",
        "label",
        "latency_s",
        "limit",
        "longest",
        "longest_asked",
        "max_answer_tokens",
        "refusals",
        "refused_items",
        "request_bucket",
        "resting",
        "retired",
        "spec",
        "stats",
        "streaming",
        "throttled",
        "token_bucket",
        "url",
    )

    def __init__(
        self,
        spec: EndpointSpec,
        limit: AdaptiveLimitPolicy | None = None,
        breaker: BreakerPolicy | None = None,
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
        self.limit = AdaptiveLimit(limit or AdaptiveLimitPolicy(), spec.max_in_flight)
        self.breaker = Breaker(breaker or BreakerPolicy())
        self.request_bucket = TokenBucket(spec.requests_per_s) if spec.requests_per_s else None
        self.token_bucket = (
            TokenBucket.per_minute(spec.tokens_per_min) if spec.tokens_per_min else None
        )
        self.foreign_load = 0
        self.refusals = 0
        self.max_answer_tokens = spec.max_model_len
        self.longest = 0
        self.longest_asked: object = None
        self._corrections: dict[int, int] = {}
        self._accepted: _AcceptedRequest = (None, {}, float("-inf"))
        self._accepted_before: _AcceptedRequest = (None, {}, float("-inf"))
        self.streaming = 0
        self.refused_items: set[int] = set()
        self.accepted = 0
        self.throttled = 0
        self.stats = EndpointStats()
        self._key: str | None = None
        self._headers: Mapping[str, str] = {}

    @property
    def alive(self) -> bool:
        """Whether it is used at all."""
        return not (self.ejected or self.retired) and self.breaker.state is not BreakerState.OPEN

    @property
    def width(self) -> int:
        """Requests in flight that it is allowed now."""
        return (
            1
            if self.refused_items or self.breaker.state is BreakerState.HALF_OPEN
            else self.limit.width
        )

    @property
    def free(self) -> bool:
        """Whether it may be sent a request now."""
        return self.alive and not self.resting and self.in_flight < self.width

    @property
    def serves_others(self) -> bool:
        """Whether it has answered, and is trusted: a failure may be the item's fault."""
        return self.has_answered and self.breaker.state is BreakerState.CLOSED

    @property
    def has_answered(self) -> bool:
        """Whether it ever gave a good answer."""
        return self.stats.calls > self.stats.failures.total()

    def confirm_max_tokens(self, most_tokens: int, request: int) -> bool:
        """Note which longest answer it named, and say whether it did so for another request.

        Args:
            most_tokens: The longest answer that it named.
            request: What stands for the request.
        """
        if len(self._corrections) >= _CORRECTIONS:
            self._corrections.clear()
        return self._corrections.setdefault(most_tokens, request) != request

    def record_accepted(self, item: CallLog | None, sent: Mapping[str, str], now: float) -> None:
        """Note that it has accepted a request.

        Args:
            item: The item on whose behalf it was made, if any.
            sent: The request's headers.
            now: Monotonic time in seconds.
        """
        if item is None or item is not self._accepted[0]:
            self._accepted_before = self._accepted
        self._accepted = item, sent, now
        self.accepted += 1

    def accepts_others(self, item: CallLog | None, sent: Mapping[str, str], now: float) -> bool:
        """Return True if it has lately accepted a request of another item with the same key."""
        who, headers, when = self._accepted
        if item is not None and who is item:
            _, headers, when = self._accepted_before
        return now - when <= _LATELY_S and headers == sent

    def is_proven(self, item: CallLog | None, now: float) -> bool:
        """Return True if it has lately accepted a request of another item with the present key."""
        return self.accepts_others(item, self._headers, now)

    def mark(self, now: float) -> RefusalMark:
        """Return what to compare an item's next refusal with."""
        return RefusalMark(now, self.accepted, self.throttled)

    def refuses_alone(self, item: CallLog | None, mark: RefusalMark) -> bool:
        """Return True if since ``mark`` it has accepted others, and more than it has refused."""
        who, _, when = self._accepted
        if item is not None and who is item:
            _, _, when = self._accepted_before
        accepted = self.accepted - mark.accepted
        return when > mark.when and accepted > self.throttled - mark.throttled

    def record_latency(self, seconds: float) -> None:
        """Blend one answer's time into the smoothed latency."""
        self.latency_s += (seconds - self.latency_s) * (_SMOOTHING if self.latency_s else 1.0)

    async def headers(self) -> Mapping[str, str]:
        """Return the headers of a request, asking the key's source if there is one."""
        source = self.spec.api_key
        if isinstance(source, str):
            key = source
        else:
            got = source()
            key = got if isinstance(got, str) else await got
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
        """How it stands, in words."""
        if self.retired:
            return "left the fleet"
        if self.resting and self.alive:
            return "resting"
        return "ejected" if self.ejected else self.breaker.state.value

    def report(self) -> EndpointReport:
        """Return what a report shows of this endpoint."""
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
        """Show the label only: keys stay secret."""
        return f"Endpoint({self.label!r}, outstanding={self.in_flight})"
