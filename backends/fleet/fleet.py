"""Fleet: many endpoints behind post(); FleetClient (ChatModel); statistics deltas."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Final, Protocol, Self, TypeVar

from ..core.aio import SyncPortal
from ..core.errors import ConfigurationError
from ..core.process import ensure_open_files
from ..core.protocols import CURRENT_CALLS, CallLog
from ..core.request_urls import URL_FIELD, get_kind
from ..core.types import CHAT_URL, Message, Reply, Usage
from .cache import RequestCache
from .endpoint import (
    Endpoint,
    EndpointSpec,
    describe_spellings,
    identify_endpoint,
    merge_spellings,
)
from .failures import Failure
from .files import FileLoader
from .health import HealthMonitor
from .memory import FleetMemory
from .policy import FleetPolicy, ModelParams
from .rate_limit import RateLimiter
from .request import RequestSender
from .retry import Hedger, Retrier, SendFunction
from .server_load import LoadPoller
from .stats import QUANTILES, EndpointReport, EndpointStats, FleetHealth
from .transport import OpenStream, Transport, make_reply

_LOG: Final = logging.getLogger(__name__)
_WARNED: Final = 5
"""Limit of endpoints that are named because they are listed more than once."""

T = TypeVar("T")


class RequestRoute(Protocol):
    """A way of requests to the model other than one HTTP request for each."""

    async def post(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], Endpoint]:
        """Return the answer to one chat request, and the endpoint that gave it."""
        ...


class Fleet:
    """A set of endpoints that serve one model, used as one.

    Use it as an async context manager, or call ``aclose``; it opens its connections with the first
    request, in the loop that sends it.

    Args:
        endpoints: The members; at least one.
        policy: Limits, retries and timeouts.
        simulated: Whether answers must come from a simulated fleet (True), must not (False), or may
            be either, as the first answer shows (None).
        limiter: Quotas that several fleets share, or None for the policy's own.
        cache: Answers that equal requests share, or None: each request is sent.
        transport: Sends the requests of this loop; None opens HTTP connections.
        memory: What earlier fleets have learned, or None; it has quotas and connections, too.
        model: The model that is asked, if ``memory`` keeps several models apart.

    Attributes:
        policy: Limits, retries and timeouts.
        endpoints: The members, present and past.
        limiter: All quotas of the process.
        portal: Runs calls of threads without a loop.
        route: The way of chat requests that are not streamed; None sends each of them at once.

    Raises:
        ConfigurationError: No endpoint, one with a malformed URL, or more streams than the system
            allows open files.
    """

    def __init__(  # noqa: PLR0913 - most are given by one kind of caller
        self,
        endpoints: Sequence[EndpointSpec],
        policy: FleetPolicy | None = None,
        *,
        simulated: bool | None = None,
        limiter: RateLimiter | None = None,
        cache: RequestCache | None = None,
        transport: Transport | None = None,
        memory: FleetMemory | None = None,
        model: str | None = None,
    ) -> None:
        if not endpoints:
            raise ConfigurationError("a fleet needs at least one endpoint: set endpoints")
        self.policy = policy or FleetPolicy()
        ensure_open_files(self.policy.streams)
        self._specs = tuple(merge_spellings(endpoints, by_model=False))
        self._memory, self._model = memory, model
        if memory is not None:
            limiter = memory.get_limiter(self.policy.rate_limit)
        self.limiter = limiter or RateLimiter(self.policy.rate_limit)
        self.endpoints = [self._remember(self._make_endpoint(spec)) for spec in self._specs]
        _warn_spellings(self._specs)
        self._keeps_transport = memory is not None and transport is None
        if memory is not None and transport is None:
            transport = memory.get_transport(self.policy)
        self._transport = transport or Transport(self.policy)
        self._monitor = HealthMonitor(
            self.endpoints, self.policy, self._transport, self.limiter.quota
        )
        self._sender = RequestSender(
            self._transport,
            self._monitor,
            simulated,
            self.policy.own_fields,
            self.policy.optional_fields,
        )
        balancer, hedge = self._monitor.balancer, self.policy.hedge
        self._hedger = Hedger(hedge, balancer, self._sender.send) if hedge else None
        self._send = self._hedger.send if self._hedger else self._sender.send
        self._retrier = Retrier(self.policy.retry, self._monitor, self.limiter)
        load = self.policy.load
        polled = (load, self.endpoints, self._transport, balancer.refresh) if load else None
        self._load = LoadPoller(*polled) if polled else None
        self._cache = cache
        self.route: RequestRoute | None = None
        self._loop_fleets: dict[asyncio.AbstractEventLoop, Fleet] = {}
        self.portal = SyncPortal(lambda: self.loop, self._disconnect)

    def __repr__(self) -> str:
        """Show size and load, no keys."""
        return f"Fleet({len(self.endpoints)} endpoints, {self.in_flight} in flight)"

    async def __aenter__(self) -> Self:
        """Return the fleet itself."""
        for endpoint in self.endpoints:
            self._monitor.resume(endpoint)
        return self

    async def __aexit__(self, *_: object) -> None:
        """Close all connections."""
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections of the running loop, and stop the private loop."""
        if self.portal.is_open:
            await asyncio.to_thread(self.portal.close)
        await self._disconnect()

    def close(self) -> None:
        """Close connections of synchronous calls; for callers without a loop."""
        self.portal.close()

    async def _disconnect(self) -> None:
        here = self.get_loop_fleet()
        if here is self:
            self._monitor.close()
            if self._load is not None:
                self._load.close()
            if self._hedger is not None:
                self._hedger.close()
            if not self._keeps_transport:
                await self._transport.aclose()
        else:
            await here.aclose()
            del self._loop_fleets[asyncio.get_running_loop()]

    def _make_endpoint(self, spec: EndpointSpec) -> Endpoint:
        quota = self.limiter.get_endpoint_quota(
            identify_endpoint(spec.url), spec.requests_per_s, spec.tokens_per_min, spec.window_s
        )
        return Endpoint(spec, self.policy.limit, self.policy.breaker, quota)

    def _remember(self, endpoint: Endpoint) -> Endpoint:
        """Let a new endpoint go on with what earlier fleets have learned about it."""
        if self._memory is not None:
            self._memory.take_over(endpoint, self.policy, self._model)
        return endpoint

    def update(self, specs: Sequence[EndpointSpec]) -> tuple[int, int]:
        """Add and remove endpoints during a run; the others keep their state and statistics.

        Requests in flight to removed endpoints run to their end. One that comes back continues its
        statistics, so that nodes may leave and join for days.

        Args:
            specs: The members from now on.

        Returns:
            How many were added, and how many removed.

        Raises:
            ConfigurationError: A URL is malformed, or the list is empty.
        """
        merged = merge_spellings(specs, by_model=False)
        wanted = {identify_endpoint(spec.url): spec for spec in merged}
        if not wanted:
            raise ConfigurationError("a fleet needs at least one endpoint: set endpoints")
        present = {identify_endpoint(e.url): e for e in self.endpoints if not e.retired}
        gone = {(e.url, e.label): e for e in self.endpoints if e.retired}
        joining = list[Endpoint]()
        for key, spec in wanted.items():
            if key in present:
                continue
            endpoint = self._make_endpoint(spec)
            if (earlier := gone.get((endpoint.url, endpoint.label))) is not None:
                earlier.rejoin(endpoint)
                endpoint = earlier
            else:
                self.endpoints.append(self._remember(endpoint))
            joining.append(endpoint)
        leaving = [endpoint for key, endpoint in present.items() if key not in wanted]
        _warn_spellings(e.spec for e in joining)
        for endpoint in leaving:
            endpoint.retired = True
        for endpoint in (*joining, *leaving):
            self._monitor.refresh(endpoint)
        for endpoint in joining:
            self._monitor.resume(endpoint)
        self._specs = tuple(wanted.values())
        return len(joining), len(leaving)

    def stop(self, why: str) -> None:
        """Send no further request, and fail those that wait: no endpoint will answer any more."""
        self._monitor.stop(why)

    async def wait_alive(self, url: str = CHAT_URL) -> None:
        """Wait until an endpoint can be used; start a model if none runs.

        Args:
            url: URL of the requests that it is for; the request that starts a model goes there.

        Raises:
            FanfoldError: None can be used any more.
        """
        self._monitor.probe_url = url
        await self._monitor.wait_alive()

    def report_stopped_model(self, endpoint: Endpoint) -> None:
        """Put an endpoint on standby: another process was told that its model does not run."""
        self._monitor.put_on_standby(endpoint, "a worker was told that its model does not run")

    @contextmanager
    def count_probes(self, count: Callable[[Usage], None]) -> Iterator[None]:
        """Call a function with the tokens of each probe, and of each start of a model.

        While several blocks run, the last one counts.
        """
        self._monitor.on_probe = count
        try:
            yield
        finally:
            if self._monitor.on_probe is count:
                self._monitor.on_probe = None

    @property
    def stop_reason(self) -> str | None:
        """Return why no further request is sent, or None."""
        return self._monitor.stop_reason

    def get_loop_fleet(self) -> Fleet:
        """Return the fleet of the running loop: this one, or a copy with its own connections.

        Connections belong to the loop that opened them. Limits apply per loop.
        """
        loop = asyncio.get_running_loop()
        home = self._transport.loop
        if home is loop or home is None or home.is_closed():
            return self
        if loop not in self._loop_fleets:
            self._loop_fleets = {k: v for k, v in self._loop_fleets.items() if not k.is_closed()}
            self._loop_fleets[loop] = Fleet(
                [replace(spec, spellings=()) for spec in self._specs],
                self.policy,
                simulated=self.simulated,
                limiter=self.limiter,
                cache=self._cache.copy_for_loop() if self._cache else None,
            )
        return self._loop_fleets[loop]

    @property
    def loop(self) -> asyncio.AbstractEventLoop | None:
        """Return the loop that the fleet's connections belong to, or None."""
        return self._transport.loop

    @property
    def simulated(self) -> bool | None:
        """Return True if a simulated fleet answers; None before the first answer."""
        return self._sender.simulated

    @property
    def in_flight(self) -> int:
        """Return the number of requests in flight over all endpoints."""
        return self._monitor.balancer.in_flight

    @property
    def nodes(self) -> tuple[int, int]:
        """Return the number of hosts of the fleet, and how many of them have requests in flight."""
        here = [e for e in self.endpoints if not e.retired]
        return len({e.host for e in here}), len({e.host for e in here if e.in_flight})

    def health(self) -> FleetHealth:
        """Return a summary of the fleet's state, for a live line."""
        monitor = self._monitor
        return FleetHealth(
            healthy=len(monitor.balancer.alive),
            total=sum(not e.retired for e in self.endpoints),
            in_flight=monitor.balancer.in_flight,
            waiting=monitor.balancer.waiting,
            refusals=monitor.refusals,
            paused=monitor.stop_reason or monitor.pause_reason,
        )

    def report(self) -> list[EndpointReport]:
        """Return statistics of each endpoint."""
        return [endpoint.report() for endpoint in self.endpoints]

    async def post(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], Endpoint | None]:
        """Send one request and return its answer.

        Args:
            body: The request as the endpoints accept it, ``messages`` included; ``URL_FIELD`` names
                the URL of one that does not ask for a chat completion.

        Returns:
            The decoded answer, which is a chat completion, and the endpoint that gave it; None if
                it is the answer to an earlier equal request.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: No item can succeed any more.
        """
        log = CURRENT_CALLS.get()
        body = _seed_sample(body, log)
        if log is not None:
            log.calls += 1
            log.loop = asyncio.get_running_loop()
        try:
            if self._cache is None or URL_FIELD in body:
                return await self._answer(body)
            found = await self._cache.find(body)
            if isinstance(found, dict):
                return found, None
            with found:
                document, endpoint = await self._answer(body)
                self._cache.store(found, document)
                return document, endpoint
        finally:
            if log is not None:
                log.calls -= 1

    def _answer(self, body: Mapping[str, Any]) -> Awaitable[tuple[dict[str, Any], Endpoint]]:
        return self.post_now(body) if self.route is None else self.route.post(body)

    def post_now(self, body: Mapping[str, Any]) -> Awaitable[tuple[dict[str, Any], Endpoint]]:
        """Send one chat request at once, whatever the route and the cache.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: No item can succeed any more.
        """
        return self._call(body, self._send, shorten=True)

    async def attach_file(self, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return a request with the content of the file that it names, if it names one.

        Raises:
            InvalidItemError: The URL is malformed or not allowed, or there is no such file.
            EndpointError: The file's host did not answer in several attempts.
        """
        kind = get_kind(body)
        if kind is None or kind.file is None:
            return body
        return await FileLoader(self._transport, self.policy.file_hosts).attach(body, kind)

    def check_simulated(
        self, result: dict[str, Any] | Failure, endpoint: Endpoint
    ) -> dict[str, Any] | Failure:
        """Reject an answer that would mix simulated and real ones."""
        return self._sender.check_simulated(result, endpoint)

    async def open_stream(self, body: Mapping[str, Any]) -> tuple[OpenStream, Endpoint]:
        """Send one chat request whose answer is read token by token.

        Until the first chunk has come the call may move to another endpoint like any other; from
        then on the caller handles failures.

        Args:
            body: The request; ``stream`` must be true in it.

        Raises:
            EndpointError: No endpoint started to answer within the attempts allowed.
            RunStoppedError: No item can succeed any more.
        """
        log = CURRENT_CALLS.get()
        body = _seed_sample(body, log)
        if log is not None:
            log.calls += 1
            log.loop = asyncio.get_running_loop()
        try:
            return await self._call(body, self._sender.open_stream)
        finally:
            if log is not None:
                log.calls -= 1

    def _call(
        self, body: Mapping[str, Any], send: SendFunction[T], *, shorten: bool = False
    ) -> Awaitable[tuple[T, Endpoint]]:
        if self._load is not None:
            self._load.start()
        return self._retrier.call(body, send, shorten=shorten)


def _seed_sample(body: Mapping[str, Any], log: CallLog | None) -> Mapping[str, Any]:
    """Return the request with the seed of its sample: the seeds of a row's samples are in order."""
    if log is None or not log.sample or body.get("seed") is None:
        return body
    return {**body, "seed": body["seed"] + log.sample}


def _warn_spellings(specs: Iterable[EndpointSpec]) -> None:
    """Warn about endpoints that their list names more than once."""
    lines = [line for spec in specs if (line := describe_spellings(spec)) is not None]
    for line in lines[:_WARNED]:
        _LOG.warning("endpoint %s; it is used once", line)
    if len(lines) > _WARNED:
        _LOG.warning("… and %d more endpoints are listed more than once", len(lines) - _WARNED)


class FleetClient:
    """Chat client of the fleet without LangChain, for low overhead.

    It sends the same bodies as ``ChatFleet.of(fleet, params)``.

    Args:
        fleet: The endpoints.
        params: The fields that all requests share.
    """

    def __init__(self, fleet: Fleet, params: ModelParams) -> None:
        self._fleet = fleet
        self._constant = params.body()

    async def ask(self, messages: Sequence[Message]) -> Reply:
        """Answer one conversation.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: No item can succeed any more.
        """
        return (await self._post({**self._constant, "messages": messages}))[1]

    async def complete(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], Reply]:
        """Send one request as it is, but for the model's name; return its answer.

        Raises:
            InvalidItemError: The file that it names cannot be loaded.
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: No item can succeed any more.
        """
        return await self._post(await self._fleet.attach_file({**body, "model": self.model}))

    @property
    def model(self) -> str:
        """Return the model's name."""
        return str(self._constant["model"])

    async def _post(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], Reply]:
        document, endpoint = await self._fleet.post(body)
        if endpoint is None:
            return document, replace(make_reply(document, ""), cached=True)
        return document, make_reply(document, endpoint.label)


class StatsReporter:
    """Reports statistics of a fleet's endpoints since its last report; each call counts once.

    Args:
        endpoints: Returns the fleet's members, present and past.
    """

    def __init__(self, endpoints: Callable[[], Sequence[Endpoint]]) -> None:
        self._endpoints = endpoints
        self._reported: dict[Endpoint, tuple[EndpointStats, int]] = {}

    def delta(self) -> list[dict[str, Any]]:
        """Return new statistics as plain data, for each endpoint that has any."""
        return [new for endpoint in self._endpoints() if (new := self._endpoint_delta(endpoint))]

    def _endpoint_delta(self, endpoint: Endpoint) -> dict[str, Any] | None:
        before, opened = self._reported.get(endpoint, (EndpointStats(), 0))
        fresh, reopened = endpoint.stats - before, endpoint.breaker.times_opened - opened
        if not (fresh.calls or fresh.hedges or fresh.useful_tokens or reopened):
            return None
        self._reported[endpoint] = before + fresh, endpoint.breaker.times_opened
        about = {"endpoint": endpoint.label, "state": endpoint.state, "opened": reopened}
        return about | fresh.to_json()


class StatsCollector:
    """Statistics of endpoints, summed over all workers."""

    def __init__(self) -> None:
        self._stats: dict[str, EndpointStats] = {}
        self._about: dict[str, dict[str, Any]] = {}

    def add(self, deltas: Iterable[Mapping[str, Any]]) -> None:
        """Add a worker's statistics; for an endpoint's state the last one is kept."""
        for delta in deltas:
            name = delta["endpoint"]
            self._stats.setdefault(name, EndpointStats()).merge(EndpointStats.from_json(delta))
            opened = self._about.get(name, {"opened": 0})["opened"] + delta["opened"]
            self._about[name] = {"endpoint": name, "state": delta["state"], "opened": opened}

    def reports(self) -> list[dict[str, Any]]:
        """Return one row per endpoint, as for the run folder's table."""
        return [self._about[name] | _row(stats) for name, stats in self._stats.items()]


def _row(stats: EndpointStats) -> dict[str, Any]:
    return stats.to_json() | {name: stats.latency_s(q) for name, q in QUANTILES.items()}
