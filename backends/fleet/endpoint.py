"""One live endpoint: its load, its health and what it has done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, TypeAlias
from urllib.parse import urlsplit

from ..core.protocols import CallLog
from .address import EndpointSpec, base_url, label_of
from .breaker import Breaker, State
from .lane import Lane
from .pacing import Bucket
from .policy import BreakerPolicy, LanePolicy
from .stats import EndpointReport, Stats

_SMOOTHING: Final = 0.1
"""Weight of the newest answer in the smoothed latency."""
_LATELY_S: Final = 60.0
"""An endpoint that answered so many seconds ago is taken to be in order."""
_CORRECTIONS: Final = 64
"""Longest answers that are remembered until they are confirmed."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What an endpoint had done when it refused an item for now.

    Attributes:
        when: Monotonic time in seconds.
        accepted: Requests that it had accepted.
        throttled: Times that it had asked for a pause.
    """

    when: float
    accepted: int
    throttled: int


_Accepted: TypeAlias = tuple[CallLog | None, Mapping[str, str], float]
"""An item, the headers of a request that was accepted, and when."""


class Endpoint:
    """A member of a fleet.

    Args:
        spec: The endpoint as configured.
        lane: How its share of requests in flight is found.
        breaker: When it is left alone.

    Attributes:
        label: Name in results and messages, without credentials.
        url: Base URL.
        host: Name or address of the machine.
        chat_url: URL of the chat completions.
        outstanding: Requests in flight.
        latency_s: Smoothed time to an answer in seconds, 0 when none has come.
        ejected: Whether it is used no more.
        refusals: Times in a row that it asked for a pause.
        retired: Whether it has left the fleet.
        resting: Whether it asked for a pause that still lasts.
        lane: How many requests it gets at once.
        breaker: Whether it is trusted.
        bucket: Its own quota of requests, or None.
        tokens: Its own quota of tokens, or None.
        foreign: Requests of others that it works on, as far as it is asked.
        most_tokens: Longest answer in tokens that it can be asked for, or None when unknown.
        longest: The longest answer in tokens that it was asked for by a request that it accepted.
        longest_asked: The field of the last such request from which that was taken.
        stats: What it did.
        streaming: Streams in flight that have begun.
        doubts: Items that it has refused since it last accepted another one.
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
        "bucket",
        "chat_url",
        "doubts",
        "ejected",
        "foreign",
        "host",
        "label",
        "lane",
        "latency_s",
        "longest",
        "longest_asked",
        "most_tokens",
        "outstanding",
        "refusals",
        "resting",
        "retired",
        "spec",
        "stats",
        "streaming",
        "throttled",
        "tokens",
        "url",
    )

    def __init__(
        self,
        spec: EndpointSpec,
        lane: LanePolicy | None = None,
        breaker: BreakerPolicy | None = None,
    ) -> None:
        self.spec = spec
        self.url = base_url(spec.url)
        self.host = urlsplit(self.url).hostname or ""
        self.label = spec.label or label_of(spec.url)
        self.chat_url = f"{self.url}/chat/completions"
        self.outstanding = 0
        self.latency_s = 0.0
        self.ejected = False
        self.retired = False
        self.resting = False
        self.lane = Lane(lane or LanePolicy(), spec.max_in_flight)
        self.breaker = Breaker(breaker or BreakerPolicy())
        self.bucket = Bucket(spec.requests_per_s) if spec.requests_per_s else None
        self.tokens = Bucket.per_minute(spec.tokens_per_min) if spec.tokens_per_min else None
        self.foreign = 0
        self.refusals = 0
        self.most_tokens = spec.max_model_len
        self.longest = 0
        self.longest_asked: object = None
        self._corrections: dict[int, int] = {}
        self._accepted: _Accepted = (None, {}, float("-inf"))
        self._accepted_before: _Accepted = (None, {}, float("-inf"))
        self.streaming = 0
        self.doubts: set[int] = set()
        self.accepted = 0
        self.throttled = 0
        self.stats = Stats()
        self._key: str | None = None
        self._headers: Mapping[str, str] = {}

    @property
    def alive(self) -> bool:
        """Whether it is used at all."""
        return not (self.ejected or self.retired) and self.breaker.state is not State.OPEN

    @property
    def width(self) -> int:
        """Requests in flight that it is allowed now."""
        return 1 if self.doubts or self.breaker.state is State.HALF_OPEN else self.lane.width

    @property
    def free(self) -> bool:
        """Whether it may be sent a request now."""
        return self.alive and not self.resting and self.outstanding < self.width

    @property
    def serves_others(self) -> bool:
        """Whether it has answered, and is trusted: a failure may be the item's fault."""
        return self.has_answered and self.breaker.state is State.CLOSED

    @property
    def has_answered(self) -> bool:
        """Whether it ever gave a good answer."""
        return self.stats.calls > self.stats.failures.total()

    def confirms(self, most_tokens: int, request: int) -> bool:
        """Note which longest answer it named, and say whether it did so for another request.

        Args:
            most_tokens: The longest answer that it named.
            request: What stands for the request.
        """
        if len(self._corrections) >= _CORRECTIONS:
            self._corrections.clear()
        return self._corrections.setdefault(most_tokens, request) != request

    def accept(self, item: CallLog | None, sent: Mapping[str, str], now: float) -> None:
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
        """Say whether it has lately accepted a request of another item with the same key."""
        who, headers, when = self._accepted
        if item is not None and who is item:
            _, headers, when = self._accepted_before
        return now - when <= _LATELY_S and headers == sent

    def proves(self, item: CallLog | None, now: float) -> bool:
        """Say whether it has lately accepted a request of another item with the present key."""
        return self.accepts_others(item, self._headers, now)

    def mark(self, now: float) -> Mark:
        """Return what to compare an item's next refusal with."""
        return Mark(now, self.accepted, self.throttled)

    def refuses_alone(self, item: CallLog | None, mark: Mark) -> bool:
        """Say whether since ``mark`` it has accepted others, and more than it has refused."""
        who, _, when = self._accepted
        if item is not None and who is item:
            _, _, when = self._accepted_before
        accepted = self.accepted - mark.accepted
        return when > mark.when and accepted > self.throttled - mark.throttled

    def observe(self, seconds: float) -> None:
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

    async def rekeyed(self, sent: Mapping[str, str]) -> bool:
        """Say whether there is another key than the one that was refused.

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
            in_flight=self.outstanding,
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
            opened=self.breaker.opened,
            hedges=stats.hedges,
        )

    def __repr__(self) -> str:
        """Show the label only: keys stay secret."""
        return f"Endpoint({self.label!r}, outstanding={self.outstanding})"
