"""Policies of a fleet, and the parameters that its requests share."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import orjson
from tenacity import wait_exponential, wait_fixed

from ..core.types import Json
from ..core.waits import ExtendedWait


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often and for how long a failed call is repeated.

    Attributes:
        attempts: Limit of failed calls of one item before the item fails. Refusals (429, 503) and
            connections that were never made do not count: the call waits and is repeated.
        backoff_s: Pause before the first repetition on the endpoint that just failed, in seconds;
            doubled at each further one.
        backoff_max_s: Longest such pause, in seconds.
        jitter: Fraction by which a pause is lengthened at random, so that callers spread.
        long_wait_s: If a Retry-After is longer than this, in seconds, the call moves to another
            endpoint or, if there is none, the run stops.
        refusal_pause_s: First pause of an endpoint that refuses without Retry-After; doubled while
            it keeps refusing, up to ``backoff_max_s``.
        long_pause_s: Pause without Retry-After of an endpoint that is cold, under maintenance, or
            whose quota is used up.
        patience_s: An item is not repeated later than so many seconds after its first failure, even
            if its calls were refused without counting.
        free_retries: So many repetitions that do not count follow each other without a pause
            (refusals for now), or are made at all (corrections of ``max_tokens``).
        poison_endpoints: The same server error on so many endpoints that answer others fails the
            item.
        refused_share: More than this share of the last 200 items refused by endpoints that answer
            others stop the run.
        hopeless_after: So many refusals of the request itself, before any success, stop the run.
        first_calls: Number of calls that show whether a run can succeed, and minimum for the retry
            budget.
        first_failed: More than this share of the first calls failing stops the run.
        budget: Limit of repetitions per call over the whole run (0.2 = one in five), or None; when
            it is used up the run stops. Waiting after a refusal is not a repetition.
    """

    attempts: int = 4
    backoff_s: float = 0.5
    backoff_max_s: float = 30.0
    jitter: float = 0.25
    long_wait_s: float = 120.0
    refusal_pause_s: float = 1.0
    long_pause_s: float = 60.0
    patience_s: float = 3600.0
    free_retries: int = 3
    poison_endpoints: int = 3
    refused_share: float = 0.05
    hopeless_after: int = 10
    first_calls: int = 50
    first_failed: float = 0.8
    budget: float | None = None

    @property
    def wait(self) -> ExtendedWait:
        """Return the pauses before repetitions on the endpoint that just failed."""
        return ExtendedWait(wait_exponential(self.backoff_s, self.backoff_max_s), self.jitter)

    @property
    def refusal_wait(self) -> ExtendedWait:
        """Return the pauses of an endpoint that refuses without Retry-After."""
        return ExtendedWait(wait_exponential(self.refusal_pause_s, self.backoff_max_s), self.jitter)

    def named_wait(self, seconds: float) -> ExtendedWait:
        """Return the pause for which a server asked, never shorter."""
        return ExtendedWait(wait_fixed(seconds), self.jitter)


@dataclass(frozen=True, slots=True)
class TimeoutPolicy:
    """Timeouts in seconds.

    Attributes:
        request_s: From sending a request to the answer's last byte.
        connect_s: For a TCP connection to an endpoint.
        keepalive_s: Time that an idle connection is kept; vLLM closes its side after 5 s, and equal
            values race.
        fleet_s: Time that the run waits before it stops, if no endpoint is alive.
        chunk_s: Longest silence inside a stream of tokens.
        silence_s: An endpoint that answers none of its requests in flight for so long is checked
            over a new connection: its server may have been replaced.
        recheck_s: Time between the two checks of a server that has no request to process.
    """

    request_s: float = 600.0
    connect_s: float = 10.0
    keepalive_s: float = 3.0
    fleet_s: float = 600.0
    chunk_s: float = 120.0
    silence_s: float = 30.0
    recheck_s: float = 5.0


@dataclass(frozen=True, slots=True)
class AdaptiveLimitPolicy:
    """How the limit of requests in flight of an endpoint adapts.

    Attributes:
        start: Initial limit of an unknown endpoint.
        ceiling: Upper bound of the limit, unless the endpoint has its own; no vLLM runs more by
            default.
        settle_s: A limit that is reached without a refusal is raised after so many seconds.
        widen: Factor until the first refusal or knee.
        step: Fraction by which it is raised after that (at least one request).
        shrink: Factor after an answer that did not come in time.
        samples: Answers per level before two levels are compared.
        knee: If a doubling of requests in flight multiplies the latency by more than this, it only
            lengthens the server's queue.
        explore_s: A knee is forgotten after so many seconds.
    """

    start: int = 8
    ceiling: int = 1024
    settle_s: float = 0.25
    widen: float = 2.0
    step: float = 0.125
    shrink: float = 0.75
    samples: int = 16
    knee: float = 1.6
    explore_s: float = 60.0


@dataclass(frozen=True, slots=True)
class BreakerPolicy:
    """When an endpoint is marked unhealthy, and when it is tried again.

    Attributes:
        failures: So many in a row open the breaker.
        open_s: Time until the endpoint is probed, in seconds.
        open_max_s: Longest such time; it doubles with each probe that fails.
        probe_s: Longest wait for a probe's answer, in seconds.
        request_probe_s: The same, if the probe asks the model for one token.
        outage_s: Longest time between two probes of an endpoint while none is alive, in seconds.
        outage_probes_per_s: Limit of probes per second over all endpoints, while none is alive; it
            lengthens ``outage_s`` for large fleets.
    """

    failures: int = 5
    open_s: float = 2.0
    open_max_s: float = 60.0
    probe_s: float = 5.0
    request_probe_s: float = 60.0
    outage_s: float = 5.0
    outage_probes_per_s: float = 20.0

    @property
    def wait(self) -> wait_exponential:
        """Return the times until the endpoint is probed."""
        return wait_exponential(self.open_s, self.open_max_s)


@dataclass(frozen=True, slots=True)
class RateLimitPolicy:
    """Limits of the whole process for services with a quota.

    Attributes:
        requests_per_s: Limit of requests per second, or None.
        tokens_per_min: Limit of tokens within any minute, prompt and answer, or None.
        share: Part of these limits, and of those of endpoints, that this process may use at first.
        shares_endpoints: Whether the share applies to the limits of endpoints, too: other processes
            use the same endpoints.
    """

    requests_per_s: float | None = None
    tokens_per_min: float | None = None
    share: float = 1.0
    shares_endpoints: bool = True


@dataclass(frozen=True, slots=True)
class HedgePolicy:
    """Second requests for stragglers, when no call waits for an endpoint any more.

    Attributes:
        quantile: Requests that run longer than this quantile of all answers are hedged.
        copies: Limit of further requests for one call; the second follows a median answer's time
            after the first.
        below: Hedging starts when requests in flight are less than this share of the peak.
        peak: Runs that never had so many requests in flight are not hedged.
        share: Limit of second requests, as a share of all answers.
        tick_s: Shortest time between two checks of the requests in flight, in seconds.
    """

    quantile: float = 0.9
    copies: int = 2
    below: float = 0.8
    peak: int = 8
    share: float = 0.05
    tick_s: float = 0.05


@dataclass(frozen=True, slots=True)
class AffinityPolicy:
    """Send items with equal prefixes to the same endpoint, whose prefix cache holds them.

    Attributes:
        prefix: Characters of the conversation's beginning that must be equal.
        keys: Limit of remembered prefixes.
        slack: The remembered endpoint is passed over if its expected time to an answer is more than
            this factor above the best one's.
    """

    prefix: int = 2048
    keys: int = 4096
    slack: float = 2.0


@dataclass(frozen=True, slots=True)
class LoadPolicy:
    """How the endpoints' own load is read.

    Attributes:
        source: ``metrics`` (vLLM's Prometheus gauges) or ``load`` (always 0 unless the server runs
            with ``--enable-server-load-tracking``).
        every_s: Seconds between two polls of one endpoint.
        timeout_s: Longest wait for one poll, in seconds.
        shared: Whether other clients use the endpoints too: their requests then count as load.
        look_ahead: Requests that may wait inside a server, as a share of those that it processes
            (2 at least); further ones wait in this process, where an endpoint that is free takes
            those that fit its cache. None: no such limit. It needs ``metrics``.
        polls_per_s: Limit of polls per second over all endpoints, if they are not shared.
    """

    source: Literal["metrics", "load"] = "metrics"
    every_s: float = 5.0
    timeout_s: float = 2.0
    shared: bool = True
    look_ahead: float | None = None
    polls_per_s: float = 10.0


_LOOK_AHEAD: Final = 0.25
"""Requests that wait inside a server, as a share of those that it processes: the next ones are
there when requests end, and the others may still go to the server whose cache they fit."""


def make_prefix_policies(prefix: int | None) -> dict[str, Any]:
    """Return the policies for items in an order by shared prefixes, as fields of a fleet's policy.

    Args:
        prefix: Characters of the conversation's beginning that are equal in a group, or None.
    """
    if prefix is None:
        return {}
    load = LoadPolicy(every_s=2.0, shared=False, look_ahead=_LOOK_AHEAD)
    return {"affinity": AffinityPolicy(prefix=prefix), "load": load}


@dataclass(frozen=True, slots=True)
class SessionPolicy:
    """A header by which a gateway assigns the requests of a session to one of its replicas.

    Attributes:
        header: The header's name.
        values: One value for each session; a conversation keeps its session.
    """

    header: str
    values: tuple[str, ...]

    def make_headers(self, messages: Sequence[Any]) -> dict[str, str]:
        """Return the header for a request with these messages."""
        number = 0
        if len(self.values) > 1:
            number = zlib.crc32(orjson.dumps(messages[:2])) % len(self.values)
        return {self.header: self.values[number]}


@dataclass(frozen=True, slots=True)
class FleetPolicy:
    """All settings of a fleet besides its endpoints.

    Attributes:
        streams: Limit of requests in flight over all endpoints.
        retry: When a call is repeated.
        timeout: How long to wait.
        limit: How many requests an endpoint gets at once.
        breaker: When an endpoint is marked unhealthy.
        rate_limit: Quotas of the whole process.
        hedge: Second requests at the end, or None.
        affinity: Whether items with equal prefixes go to the same endpoint, or None.
        load: Whether the endpoints' own load is read, or None.
        session: Header that keeps requests on the replicas of a gateway, or None.
        whole_answers: Whether the endpoints must not be asked for streams.
        trust_env: Whether proxy variables of the environment apply to all endpoints, and not only
            to those that ask for it (``EndpointSpec.proxied``).
        body_bytes: Limit of bytes of one answer, after decompression.
        own_fields: Whether each request chooses its fields itself, so that the refusal of a field
            is the fault of its item.
        file_hosts: Hosts from which files that requests name are fetched.
        optional_fields: Fields without which a request is sent to endpoints that refuse them.
    """

    streams: int = 256
    retry: RetryPolicy = field(default_factory=RetryPolicy)
    timeout: TimeoutPolicy = field(default_factory=TimeoutPolicy)
    limit: AdaptiveLimitPolicy = field(default_factory=AdaptiveLimitPolicy)
    breaker: BreakerPolicy = field(default_factory=BreakerPolicy)
    rate_limit: RateLimitPolicy = field(default_factory=RateLimitPolicy)
    hedge: HedgePolicy | None = field(default_factory=HedgePolicy)
    affinity: AffinityPolicy | None = None
    load: LoadPolicy | None = None
    session: SessionPolicy | None = None
    whole_answers: bool = False
    trust_env: bool = False
    body_bytes: int = 64 * 2**20
    own_fields: bool = False
    file_hosts: frozenset[str] = frozenset()
    optional_fields: frozenset[str] = frozenset()

    @classmethod
    def from_limits(
        cls,
        *,
        streams: int = 256,
        attempts: int = 4,
        request_timeout_s: float = 600.0,
        connect_timeout_s: float = 10.0,
        fleet_wait_s: float = 600.0,
    ) -> FleetPolicy:
        """Build a policy from a run's ``limits``."""
        return cls(
            streams=streams,
            retry=RetryPolicy(attempts=attempts),
            timeout=TimeoutPolicy(
                request_s=request_timeout_s, connect_s=connect_timeout_s, fleet_s=fleet_wait_s
            ),
        )


@dataclass(frozen=True, slots=True)
class ModelParams:
    """The constant part of a chat request.

    Attributes:
        name: The model's id, as the endpoints list it in ``/v1/models``.
        temperature: Sampling temperature, or None for the server's default.
        max_tokens: Limit of tokens of one answer, or None for all the remaining context (a server
            then may write until its context is full: always set one in bulk runs).
        max_tokens_field: Field of the request that carries ``max_tokens``.
        seed: Sampling seed, or None.
        extra_body: Further top-level fields of the request, e.g. vLLM's ``top_k``.
        schema: JSON Schema that constrains the answer, or None for free text.
        schema_name: Name sent along with the schema.
        strict: Whether to ask the server for strict adherence to the schema.
    """

    name: str
    temperature: float | None = None
    max_tokens: int | None = None
    seed: int | None = None
    extra_body: Mapping[str, Json] = field(default_factory=dict)
    schema: Mapping[str, Json] | None = None
    schema_name: str = "answer"
    strict: bool = True
    max_tokens_field: Literal["max_completion_tokens", "max_tokens"] = "max_completion_tokens"

    def response_format(self) -> dict[str, Json] | None:
        """Return the ``response_format`` field that asks for the schema, or None."""
        if self.schema is None:
            return None
        wanted = {"name": self.schema_name, "schema": dict(self.schema), "strict": self.strict}
        return {"type": "json_schema", "json_schema": wanted}

    def body(self) -> dict[str, Json]:
        """Return the request's fields except ``messages``.

        ``max_tokens`` is sent as ``max_completion_tokens``, as ChatOpenAI does, if not set
        otherwise, and ``extra_body`` overrides the named fields, as in the openai package.
        """
        fields: dict[str, Json] = {
            "model": self.name,
            "temperature": self.temperature,
            self.max_tokens_field: self.max_tokens,
            "seed": self.seed,
            "response_format": self.response_format(),
        }
        return {k: v for k, v in fields.items() if v is not None} | dict(self.extra_body)
