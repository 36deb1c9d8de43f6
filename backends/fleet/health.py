"""Health monitor: breakers, probes, pauses, refused items, ejection and widening limits."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence, Set
from typing import Any, Final, TypeVar

import orjson

from ..core.errors import (
    ConfigurationError,
    EndpointError,
    EndpointLostError,
    FanfoldError,
    PromptTooLongError,
    RunStoppedError,
)
from ..core.lazy_tls import aiohttp
from ..core.parsing import parse_load_metrics
from ..core.protocols import CallLog
from ..core.request_urls import REQUEST_KINDS, URL_FIELD
from ..core.types import CHAT_URL, Usage
from ..core.waits import pause_after
from .balancer import Affinity, LoadBalancer
from .endpoint import BreakerState, DeploymentState, DeploymentWatch, Endpoint
from .failures import (
    BreakerEffect,
    Failure,
    RetryAction,
    classify_exception,
    classify_stopped,
    make_refused_item_error,
    may_have_used,
)
from .policy import FleetPolicy
from .rate_limit import Quota
from .transport import Transport, read_answer, read_usage

_LOG: Final = logging.getLogger(__name__)
_UNREACHABLE_STATUSES: Final = frozenset({502, 503, 504})
"""Statuses of a proxy or a starting server; any other answer shows that the server is up."""
_UNREACHABLE_ACTIONS: Final = frozenset({RetryAction.OTHER, RetryAction.WAIT})
"""What follows the failure of a probe by a server that does not work now; others refuse it."""
_RECENT: Final = 200
"""Number of recent items for the share of items that are refused because of their content."""
_REFUSED_ITEMS: Final = 2
"""An endpoint that refuses so many items, and accepts none between them, is itself at fault."""
_OK: Final = 200
_PROBE: Final = Usage(128, 1)
"""Tokens of a probe at most: a short text, and what a chat template adds."""
_NOTHING: Final = Usage(0, 0)
_MESSAGE: Final = {"role": "user", "content": "1"}
_PROBES: Final[Mapping[str, Mapping[str, Any]]] = {
    CHAT_URL: {"messages": [_MESSAGE], "max_tokens": 1, "stream": False},
    "/v1/completions": {"prompt": "1", "max_tokens": 1, "stream": False},
    "/v1/embeddings": {"input": "1"},
}
"""Requests of a probe, by the URLs of a gateway."""
_QUOTA_S: Final = 0.5
"""Longest pause in seconds between two looks at a quota that does not cover a probe."""
_WAKE_S: Final = 320.0
"""Shortest wait for the answer of a model that starts; the gateway itself waits 300 s."""
T = TypeVar("T")
_LOOKS: Final = 6
"""Checks for silent endpoints within the time of silence."""
_POLL_S: Final = 0.1
_QUIET_POLLS: Final = 2
"""So many polls of a fleet without any request show that no other item comes."""


class HealthMonitor:
    """Monitors the health of a fleet's endpoints: breakers, pauses, ejections, and stops.

    Args:
        endpoints: All members.
        policy: Thresholds and timings.
        transport: For probes.
        quota: The quota of the whole process, or None.

    Attributes:
        balancer: Assigns the endpoints.
        stop_reason: Why no further request is sent, or None.
        pause_reason: Why no request can be sent at the moment, or None.
        answers: Good answers so far.
        refusals: Times that an endpoint refused for now (429, 503).
        lost: Tasks that were cancelled because their request is lost, and how it failed.
        on_probe: Called with the most tokens that a probe or the start of a model may have used;
            None if nobody counts them.
        probe_url: URL of a recent request: a model may serve no other one.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        policy: FleetPolicy,
        transport: Transport,
        quota: Quota | None = None,
    ) -> None:
        self._endpoints = endpoints
        self._policy = policy
        self._transport = transport
        self._timers: set[asyncio.TimerHandle] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._sweeping = False
        self._deadline: asyncio.TimerHandle | None = None
        self._outage: asyncio.Task[None] | None = None
        self._probe_timers: dict[Endpoint, asyncio.TimerHandle] = {}
        self._probes: dict[Endpoint, asyncio.Task[None]] = {}
        self._refused = 0
        self._ended: deque[bool] = deque(maxlen=_RECENT)
        self._changed = asyncio.Event()
        affinity = Affinity(policy.affinity) if policy.affinity else None
        self._wakes: dict[Endpoint, asyncio.TimerHandle] = {}
        self.balancer = LoadBalancer(
            endpoints, policy.streams, self._await_quota, self._raise_limits_soon, affinity
        )
        self.balancer.quota = quota
        self._quota_timer: asyncio.TimerHandle | None = None
        self.stop_reason: str | None = None
        self._stop_class: type[FanfoldError] = RunStoppedError
        self._last_failure = ""
        self.pause_reason: str | None = None
        self.answers = 0
        self.refusals = 0
        self.lost: dict[asyncio.Task[Any], Failure] = {}
        self.on_probe: Callable[[Usage], None] | None = None
        self.probe_url = CHAT_URL
        self._watches = False
        self._checked_at: dict[Endpoint, float] = {}
        self._standby_task: asyncio.Task[None] | None = None
        self._needed = asyncio.Event()
        self._has_standby = any(endpoint.standby for endpoint in endpoints)

    def close(self) -> None:
        """Cancel all timers and probes, so that nothing is left on the loop."""
        for handle in self._timers:
            handle.cancel()
        for task in self._tasks:
            task.cancel()
        self._timers.clear()
        self._wakes.clear()
        self._probe_timers.clear()
        self._probes.clear()
        self._outage = None
        self._standby_task = None
        self._watches = False
        self._sweeping = False
        self._quota_timer = None
        self._deadline = None
        self.balancer.long_resting.clear()
        for endpoint in self._endpoints:
            endpoint.resting = False

    def resume(self, endpoint: Endpoint) -> None:
        """Go on where an earlier fleet left an endpoint: unhealthy, or in a pause."""
        if endpoint.breaker.state is BreakerState.OPEN:
            self._schedule_probe(endpoint)
            self.refresh(endpoint)
        if (left_s := endpoint.rests_until - time.monotonic()) > 0.0:
            self.pause_endpoint(endpoint, left_s)

    def record_success(self, endpoint: Endpoint, level: int, seconds: float) -> None:
        """Record a good answer, sent as one of ``level`` requests in flight."""
        now = time.monotonic()
        self.answers += 1
        endpoint.refusals = 0
        endpoint.limit.record_answer(level, seconds, now)
        if endpoint.breaker.record_success():
            endpoint.limit.reset(now)
            _LOG.info("endpoint %s recovered", endpoint.label)
            self.refresh(endpoint)

    def clear_refusals(self, endpoint: Endpoint, item: CallLog | None) -> None:
        """Trust an endpoint again that accepted another item than those that it refused."""
        if id(item) not in endpoint.refused_items:
            endpoint.refused_items.clear()
            self.refresh(endpoint)
            self._notify_changed()

    def count_answered(self, item: CallLog | None) -> None:
        """Count an item that was answered, once."""
        if item is None:
            self._ended.append(False)
        elif not item.counted:
            item.counted = True
            self._ended.append(False)

    def count_refused(self, failure: Failure, endpoints: int) -> EndpointError:
        """Count an item that is itself at fault, and return its error.

        Raises:
            RunStoppedError: So many items fail this way that it looks like an outage.
        """
        error, share = make_refused_item_error(failure, endpoints), self._policy.retry.refused_share
        self._ended.append(True)
        count = sum(self._ended)
        if count <= share * _RECENT:
            return error
        self.stop(
            f"{count} of the last {len(self._ended)} items were refused by endpoints that answered "
            f"other items; more than {share:.0%} of {_RECENT} look like an outage: check the key "
            f"and the items, then resume the run; the last answer: {failure.error.message}"
        )
        raise RunStoppedError(self.stop_reason or "") from error

    async def resolve_fault(
        self, refusers: Mapping[Endpoint, Failure], item: CallLog | None
    ) -> bool:
        """Wait until it is known whether an item or the endpoints that refuse it are at fault.

        Endpoints that accept another item meanwhile are healthy. Those that refuse another one too,
        or for which no other item is available, are ejected. Streams of the item that wait for this
        call do not block other items.

        Args:
            refusers: Endpoints that have refused the item, and how.
            item: The item.

        Returns:
            Whether the item is at fault.
        """
        if item is None:
            return await self._settled(refusers, item)
        item.queued += 1
        item.queue = self.balancer
        try:
            return await self._settled(refusers, item)
        finally:
            item.queued -= 1

    async def _settled(self, refusers: Mapping[Endpoint, Failure], item: CallLog | None) -> bool:
        quiet = 0
        while not any(e.is_proven(item, time.monotonic()) for e in refusers):
            if self.stop_reason is not None or all(e.ejected or e.retired for e in refusers):
                return False
            quiet = quiet + 1 if self.balancer.is_idle else 0
            if quiet > _QUIET_POLLS:
                for endpoint, failure in refusers.items():
                    self._eject(endpoint, failure.error)
                    self.refresh(endpoint)
                continue
            if item is not None and item.idle_streams and self.balancer.is_deadlocked:
                self.balancer.lend()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_POLL_S):
                    await self._changed.wait()
        return True

    def eject_refusers(self, refusers: Mapping[Endpoint, Failure]) -> None:
        """Eject endpoints that accepted nothing, and refused a request that another one answered.

        Those with other requests in flight are judged by the outcome of these requests.
        """
        for endpoint, failure in refusers.items():
            if endpoint.refused_items and endpoint.in_flight <= endpoint.streaming:
                self._eject(endpoint, failure.error)
                self.refresh(endpoint)

    def _notify_changed(self) -> None:
        """Wake tasks that wait for changes of the endpoints."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _is_undecided(self, endpoint: Endpoint, failure: Failure, item: CallLog | None) -> bool:
        """Return True if a refusal does not show an endpoint's fault: the item may be at fault."""
        if failure.accepts_others:
            return True
        if not failure.is_clear:
            return False
        refused = failure if item is None else item
        endpoint.refused_items[id(refused)] = refused
        undecided = endpoint.in_flight - endpoint.streaming > 1
        return undecided or len(endpoint.refused_items) < _REFUSED_ITEMS

    def record_failure(
        self, endpoint: Endpoint, failure: Failure, item: CallLog | None = None
    ) -> None:
        """Apply a failure's rule to the endpoint; it may stop the run."""
        if failure.is_refusal and self._is_undecided(endpoint, failure, item):
            self.refresh(endpoint)
            return
        rule, error = failure.rule, failure.error
        if rule.cold and endpoint.spec.watch is not None:
            self.put_on_standby(endpoint, error.message)
            return
        if rule.action is RetryAction.WAIT and failure.accepts_others:
            # It refuses this item and answers others: only the item waits.
            self.refusals += 1
            self.refresh(endpoint)
            return
        if rule.action is RetryAction.STOP:
            self.stop(error.message)
        if rule.action in {RetryAction.EJECT, RetryAction.REKEY}:
            self._eject(endpoint, error)
        if rule.action is RetryAction.FAIL and not isinstance(error, PromptTooLongError):
            self._count_hopeless(endpoint, failure)
        if rule.shrink:
            endpoint.limit.shrink(time.monotonic())
        if rule.breaker_effect is not BreakerEffect.NO and endpoint.breaker.record_failure(
            rule.breaker_effect is BreakerEffect.OPEN
        ):
            self._open(endpoint, error)
        if rule.action is RetryAction.WAIT:
            self._record_refusal(endpoint, failure, item)
        self.refresh(endpoint)

    def _count_hopeless(self, endpoint: Endpoint, failure: Failure) -> None:
        """Stop a run if no endpoint accepts a request; eject one that alone accepts none."""
        self._refused += 1
        most = self._policy.retry.hopeless_after
        if not self.answers and failure.rule.constant:
            self.stop(f"no request is accepted: {failure.error.message}", ConfigurationError)
        elif not self.answers and self._refused >= most:
            self.stop(f"no request was accepted; the last answer: {failure.error.message}")
        elif self.answers and not endpoint.has_answered and endpoint.calls >= most:
            self._eject(endpoint, failure.error)

    def _record_refusal(self, endpoint: Endpoint, failure: Failure, item: CallLog | None) -> None:
        """Pause an endpoint for as long as it asked; all of its host if the quota is shared."""
        self.refusals += 1
        endpoint.throttled += 1
        retry, rule = self._policy.retry, failure.rule
        if rule.too_fast:
            for quota in (endpoint.quota, self.balancer.quota):
                if quota is not None:
                    quota.slow_down()
        seconds = failure.error.retry_after or rule.rest_s
        if seconds is None and rule.window:
            self._pause_for_window(endpoint, failure.error)
            return
        if seconds is None and rule.long:
            # An endpoint that answers other items is retried soon: the item may be at fault.
            first = endpoint.refusals == 0 and endpoint.is_proven(item, time.monotonic())
            seconds = retry.refusal_pause_s if first else retry.long_pause_s
        if not rule.too_fast:
            endpoint.limit.record_refusal(endpoint.in_flight)
        if seconds is None and endpoint.in_flight > 1:
            # It processes its other requests: the lower limit is sufficient.
            return
        endpoint.refusals += 1
        wait = retry.named_wait(seconds) if seconds else retry.refusal_wait
        pause = pause_after(wait, endpoint.refusals)
        host = endpoint.url.split("/")[2]
        for other in self._endpoints:
            if other is endpoint or (rule.shared and other.url.split("/")[2] == host):
                self.pause_endpoint(other, pause)
        self._check_pause(failure.error)

    def _pause_for_window(self, endpoint: Endpoint, error: EndpointError) -> None:
        """Pause an endpoint until the window ends in which its tokens are used up."""
        quota, seconds = endpoint.quota, self._policy.retry.long_pause_s
        if quota is not None and quota.counts_tokens:
            seconds = quota.get_window_left()
        if not endpoint.resting:
            text = "%s; requests to it wait %.0f s, until its window ends"
            _LOG.info(text, error.message, seconds)
        self.pause_endpoint(endpoint, seconds)

    def _check_pause(self, error: EndpointError) -> None:
        seconds = error.retry_after or 0.0
        if seconds > max(self._policy.timeout.fleet_s, self._policy.retry.long_wait_s) and all(
            e.resting for e in self.balancer.alive
        ):
            self.stop(f"{error.message}; resume the run in {seconds:.0f} s")

    def pause_endpoint(self, endpoint: Endpoint, seconds: float) -> None:
        """Send no requests to an endpoint for a while; the later end of two pauses applies."""
        pending = self._wakes.get(endpoint)
        if pending is not None:
            if pending.when() >= asyncio.get_running_loop().time() + seconds:
                return
            pending.cancel()
            self._timers.discard(pending)
        endpoint.resting, endpoint.rests_until = True, time.monotonic() + seconds
        if seconds > self._policy.retry.long_wait_s:
            self.balancer.long_resting.add(endpoint)
        self._wakes[endpoint] = self._later(seconds, lambda: self._resume_endpoint(endpoint))

    def _resume_endpoint(self, endpoint: Endpoint) -> None:
        self._wakes.pop(endpoint, None)
        endpoint.resting = False
        self.balancer.long_resting.discard(endpoint)
        self.refresh(endpoint)

    def _eject(self, endpoint: Endpoint, error: EndpointError) -> None:
        if endpoint.ejected:
            return
        endpoint.ejected = True
        self._notify_changed()
        _LOG.warning(
            "endpoint %s ejected for the rest of the run: %s", endpoint.label, error.message
        )
        if all(e.ejected or e.retired for e in self._endpoints):
            self.stop(f"no endpoint is left; the last answer: {error.message}")

    def _open(self, endpoint: Endpoint, error: EndpointError) -> None:
        pause_s, self._last_failure = endpoint.breaker.pause_s, error.message
        _LOG.warning(
            "endpoint %s marked unhealthy: %s (retry in %g s)",
            endpoint.label,
            error.message,
            pause_s,
        )
        self._schedule_probe(endpoint)

    def _schedule_probe(self, endpoint: Endpoint) -> None:
        """Probe an unhealthy endpoint after its pause; an outage has its own times."""
        if endpoint.retired:
            return
        if self._deadline is None and endpoint not in self._probe_timers:
            self._probe_timers[endpoint] = self._later(
                endpoint.breaker.pause_s, lambda: self._start_probe(endpoint)
            )

    def _start_probe(self, endpoint: Endpoint) -> asyncio.Task[None]:
        """Probe an unhealthy endpoint now; return the probe that runs."""
        self._probe_timers.pop(endpoint, None)
        probe = self._probes.get(endpoint)
        if probe is None:
            probe = self._probes[endpoint] = self._spawn(self._probe(endpoint))
        return probe

    async def _probe(self, endpoint: Endpoint) -> None:
        try:
            reachable = await self._answers_probe(endpoint)
        finally:
            del self._probes[endpoint]
        if endpoint.breaker.state is not BreakerState.OPEN:
            self.refresh(endpoint)  # it has come back, or another fleet has found it alive
            return
        if reachable:
            endpoint.breaker.half_open()
            self.refresh(endpoint)
        else:
            endpoint.breaker.record_missed_probe()
            self._schedule_probe(endpoint)

    async def find_unreachable(self, endpoints: Set[Endpoint]) -> set[Endpoint]:
        """Probe endpoints now; return those that do not answer, marked unhealthy."""
        async with asyncio.TaskGroup() as group:
            probes = {
                endpoint: group.create_task(self._answers_probe(endpoint))
                for endpoint in self._endpoints
                if endpoint in endpoints
            }
        down = set[Endpoint]()
        for endpoint, probe in probes.items():
            if probe.result():
                continue
            down.add(endpoint)
            if endpoint.breaker.record_failure(at_once=True):
                text = f"{endpoint.label}: a probe after lost requests was not answered"
                self._open(endpoint, EndpointLostError(text, endpoint.label))
                self.refresh(endpoint)
        return down

    async def _answers_probe(self, endpoint: Endpoint) -> bool:
        """Return True if an endpoint answers a probe; one whose key cannot be fetched does not."""
        try:
            return await self._is_reachable(endpoint)
        except FanfoldError as error:
            _LOG.warning("endpoint %s cannot be probed: %s", endpoint.label, error.message)
            return False

    async def _is_reachable(self, endpoint: Endpoint) -> bool:
        """Return True if an endpoint answers a probe.

        Raises:
            FanfoldError: Its key cannot be fetched.
        """
        if endpoint.spec.probe_model is not None:
            failure = await self._ask_token(endpoint, self._policy.breaker.request_probe_s)
            if failure is not None and failure.rule.action in _UNREACHABLE_ACTIONS:
                self._last_failure = failure.error.message
                return False
            return True
        try:
            answer = await self._transport.get(
                f"{endpoint.url}/models",
                await endpoint.headers(),
                self._policy.breaker.probe_s,
                endpoint.spec.proxied,
            )
        except (aiohttp.ClientError, TimeoutError):
            return False
        return answer.status not in _UNREACHABLE_STATUSES

    async def _ask_token(self, endpoint: Endpoint, timeout_s: float) -> Failure | None:
        """Ask the model behind an endpoint for one token; return why that failed, or None.

        Raises:
            FanfoldError: The endpoint's key cannot be fetched.
        """
        quotas = [q for q in (self.balancer.quota, endpoint.quota) if q is not None]
        headers = await endpoint.headers()
        await _reserve_all(quotas, _PROBE.tokens)
        used = _PROBE
        try:
            result = await self._send_probe(endpoint, headers, timeout_s)
            if isinstance(result, Failure):
                used = _PROBE if may_have_used(result) else _NOTHING
                return result
            read = read_usage(result)
            used = _PROBE if read.prompt is None else read
            return None
        finally:  # also if it is cancelled
            for quota in quotas:
                quota.settle(_PROBE.tokens, used.tokens)
            endpoint.stats.add_lost(used)
            if self.on_probe is not None:
                self.on_probe(used)

    async def _send_probe(
        self, endpoint: Endpoint, headers: Mapping[str, str], timeout_s: float
    ) -> dict[str, Any] | Failure:
        session = self._policy.session
        url = self.probe_url if self.probe_url in _PROBES else CHAT_URL
        kind = REQUEST_KINDS.get(url)
        body = {"model": endpoint.spec.probe_model, **_PROBES[url]}
        try:
            async with asyncio.timeout(timeout_s):
                answer = await self._transport.send(
                    endpoint.get_request_url(body if kind is None else {URL_FIELD: url}),
                    orjson.dumps(body),
                    headers if session is None else {**headers, **session.make_headers([_MESSAGE])},
                    endpoint.spec.proxied,
                )
        except (aiohttp.ClientError, TimeoutError) as error:
            return classify_exception(error, endpoint.label, headers)
        return read_answer(answer, endpoint.label, url)

    @property
    def _unhealthy(self) -> list[Endpoint]:
        """Return the endpoints that are used again as soon as they answer a probe."""
        return [
            endpoint
            for endpoint in self._endpoints
            if endpoint.breaker.state is BreakerState.OPEN
            and not (endpoint.ejected or endpoint.retired)
        ]

    async def _probe_repeatedly(self) -> None:
        """Probe all endpoints repeatedly while none is alive: any of them ends the outage."""
        policy = self._policy.breaker
        while unhealthy := self._unhealthy:
            pause = min(policy.outage_s, *(e.breaker.pause_s for e in unhealthy))
            await asyncio.sleep(max(0.0, pause - len(unhealthy) / policy.outage_probes_per_s))
            await self._probe_all()
            self._refresh_returned()
        self._refresh_returned()

    def _refresh_returned(self) -> None:
        """Rank endpoints that another fleet has found alive, with which they share a breaker."""
        for endpoint in self._endpoints:
            if endpoint.alive and endpoint not in self.balancer.alive:
                self.refresh(endpoint)

    async def _probe_all(self) -> list[asyncio.Task[None]]:
        """Start a probe of each unhealthy endpoint, at a limited rate."""
        probes = []
        for endpoint in self._unhealthy:
            probes.append(self._start_probe(endpoint))
            await asyncio.sleep(1 / self._policy.breaker.outage_probes_per_s)
        return probes

    def watch_silence(self) -> None:
        """Look for silent endpoints as long as requests are in flight."""
        if self._has_standby:
            self._has_standby = False
            self._start_standby()
        if not self._watches:
            self._watches = True
            self._later(self._policy.timeout.silence_s / _LOOKS, self._look_for_silence)

    def _look_for_silence(self) -> None:
        """Check endpoints that have answered before and are silent, with requests in flight.

        An open stream that is read shows by itself whether its server is there.
        """
        self._watches = False
        now, silence_s = time.monotonic(), self._policy.timeout.silence_s
        for endpoint in self._endpoints:
            if endpoint.unanswered and endpoint.has_answered and not endpoint.streaming:
                oldest = next(iter(endpoint.unanswered.values()))
                checked = self._checked_at.get(endpoint, 0.0)
                if now - max(oldest, endpoint.heard_at, checked) >= silence_s:
                    self._checked_at[endpoint] = float("inf")
                    self._spawn(self._check_silent(endpoint))
        if self.balancer.in_flight:
            self.watch_silence()

    async def _check_silent(self, endpoint: Endpoint) -> None:
        """Cancel the requests of a silent endpoint if its server has lost them.

        They are sent again like those of any other broken connection.
        """
        heard_at, unanswered = endpoint.heard_at, dict(endpoint.unanswered)
        fresh = Transport(self._policy)  # an idle connection may lead to the stopped server
        try:
            failure = await self._find_stop(endpoint, fresh)
        finally:
            self._checked_at[endpoint] = time.monotonic()
            await fresh.aclose()
        if failure is None or endpoint.heard_at != heard_at:
            return
        lost = [t for t, sent_at in unanswered.items() if endpoint.unanswered.get(t) == sent_at]
        _LOG.warning("%d requests are sent again: %s", len(lost), failure.error.message)
        for task in lost:
            self.lost[task] = failure
            task.cancel()

    async def _find_stop(self, endpoint: Endpoint, fresh: Transport) -> Failure | None:
        """Return how the requests of a silent endpoint failed, or None if they may be running."""
        root, proxied = endpoint.url.rpartition("/")[0], endpoint.spec.proxied
        try:
            headers = await endpoint.headers()
            await fresh.get(f"{root}/health", headers, self._policy.breaker.probe_s, proxied)
            # the metrics of a gateway are not those of the server behind it
            if (
                proxied
                or self._policy.whole_answers
                or not await self._is_idle(root, headers, fresh)
            ):
                return None
            await asyncio.sleep(self._policy.timeout.recheck_s)
            idle = await self._is_idle(root, headers, fresh)
            return classify_stopped(endpoint.label, refuses=False) if idle else None
        except aiohttp.ClientConnectorError as error:
            own = not isinstance(error, aiohttp.ClientProxyConnectionError)
            refuses = own and error.errno == errno.ECONNREFUSED
            return classify_stopped(endpoint.label, refuses=True) if refuses else None
        except (aiohttp.ClientError, TimeoutError, FanfoldError):  # the latter from fetching a key
            return None

    async def _is_idle(self, root: str, headers: Mapping[str, str], fresh: Transport) -> bool:
        """Return True if a server reports that it has no request, running or waiting."""
        answer = await fresh.get(f"{root}/metrics", headers, self._policy.breaker.probe_s)
        load = parse_load_metrics(answer.body) if answer.status == _OK else None
        return load is not None and load.running == 0 and not load.waiting

    def _await_quota(self, seconds: float) -> None:
        """Serve calls that wait for a quota after so many seconds."""
        timer = self._quota_timer
        if timer is not None:
            if timer.when() <= asyncio.get_running_loop().time() + seconds:
                return
            timer.cancel()
            self._timers.discard(timer)
        self._quota_timer = self._later(seconds, self._retry_quotas)

    def _retry_quotas(self) -> None:
        self._quota_timer = None
        self.balancer.retry_quotas()

    def _schedule_widening(self) -> None:
        """Check for full limits soon: calls wait, or others do more than their share."""
        if not self._sweeping:
            self._sweeping = True
            self._later(self._policy.limit.settle_s, self._widen_limits)

    def _widen_limits(self) -> None:
        """Raise the limits of full endpoints, and repeat while calls wait."""
        self._sweeping = False
        now, balancer = time.monotonic(), self.balancer
        for endpoint in list(balancer.alive):
            full = endpoint.in_flight >= endpoint.width
            wanted = full and (balancer.is_starved or balancer.is_behind(endpoint))
            closed = endpoint.breaker.state is BreakerState.CLOSED
            if wanted and closed and endpoint.limit.widen(now):
                self.refresh(endpoint)
        if self.balancer.is_starved:
            self._schedule_widening()

    def refresh(self, endpoint: Endpoint) -> None:
        """Rank an endpoint again, and check whether any is alive."""
        self.balancer.refresh(endpoint)
        if self.balancer.alive:
            self.pause_reason = None
            if self._deadline is not None:
                self._end_outage()
                _LOG.warning("an endpoint recovered; the run continues")
                for other in self._unhealthy:
                    self._schedule_probe(other)
        elif self._deadline is None and self.stop_reason is None and not self._start_standby():
            seconds = self._policy.timeout.fleet_s
            last = f"; the last failure: {self._last_failure}" if self._last_failure else ""
            self.pause_reason = (
                f"no endpoint is alive; waiting up to {seconds:g} s for one to return{last}"
            )
            _LOG.warning("%s", self.pause_reason)
            self._deadline = self._later(seconds, lambda: self._spawn(self._give_up()))
            for timer in self._probe_timers.values():
                timer.cancel()
            self._probe_timers.clear()
            self._outage = self._spawn(self._probe_repeatedly())

    def _raise_limits_soon(self) -> None:
        """Raise limits that hold requests back; start a model if none runs."""
        if not self.balancer.alive:
            self._start_standby()
        self._schedule_widening()

    async def wait_alive(self) -> None:
        """Wait until an endpoint can be used; start a model if none runs.

        Raises:
            FanfoldError: None can be used any more.
        """
        self._start_standby()
        while not self.balancer.alive and self.stop_reason is None:  # noqa: ASYNC110 - many events
            await asyncio.sleep(_POLL_S)
        if self.stop_reason is not None:
            raise self.make_stop_error()

    def put_on_standby(self, endpoint: Endpoint, reason: str) -> None:
        """Send no requests to an endpoint until its model runs."""
        endpoint.standby_at = time.monotonic()
        if not endpoint.standby:
            endpoint.standby = True
            _LOG.info("endpoint %s on standby: %s", endpoint.label, reason)
        self.refresh(endpoint)
        self._start_standby()

    @property
    def _standby(self) -> list[tuple[Endpoint, DeploymentWatch]]:
        """Return the endpoints whose models do not run; the first is started if none is alive."""
        return [
            (e, e.spec.watch)
            for e in self._endpoints
            if e.standby and e.spec.watch is not None and not (e.ejected or e.retired)
        ]

    def _start_standby(self) -> bool:
        """Follow the endpoints on standby, if there are any; return whether there are."""
        if self.stop_reason is not None or not self._standby:
            return False
        self._needed.set()
        if self._standby_task is None or self._standby_task.done():
            self._standby_task = self._spawn(self._follow_standby())
        return True

    async def _follow_standby(self) -> None:
        """Use endpoints on standby when their models run; start one if no endpoint is alive."""
        wake: tuple[Endpoint, asyncio.Task[Failure | None]] | None = None
        woken, since = dict[Endpoint, float](), dict[Endpoint, float]()
        reported = dict[Endpoint, float]()
        try:
            while standby := self._standby:
                self._needed.clear()
                if wake is not None and wake[1].done():
                    woken[wake[0]] += self._end_wake(*wake)
                    wake = None
                    continue
                for endpoint, watch in standby:
                    if endpoint.standby_at > reported.get(endpoint, float("-inf")):
                        reported[endpoint] = endpoint.standby_at
                        await watch.report_stopped()
                try:
                    states = {e: await watch.read_state() for e, watch in standby}
                except RunStoppedError as error:
                    self.stop(error.message)
                    return
                now = time.monotonic()
                for endpoint, watch in standby:
                    # An older list of jobs does not know yet that the model has stopped.
                    is_new = now - endpoint.standby_at >= watch.poll_s
                    if states[endpoint] is DeploymentState.RUNNING and is_new:
                        self._end_standby(endpoint)
                first = next(((e, w) for e, w in standby if e.standby), None)
                if first is not None and not self.balancer.alive:
                    endpoint, watch = first
                    started = since.setdefault(endpoint, now)
                    self._report_start(endpoint, states[endpoint], now - started)
                    if now - started > watch.start_wait_s:
                        self._stop_start(endpoint, watch)
                        return
                    idle = states[endpoint] in {None, DeploymentState.COLD}
                    due = watch.starts_models and now >= woken.get(endpoint, 0.0)
                    if wake is None and idle and due:
                        woken[endpoint] = now + watch.wake_again_s
                        wake_s = max(self._policy.timeout.request_s, _WAKE_S)
                        wake = endpoint, self._spawn(self._ask_token(endpoint, wake_s))
                await self._wait_standby(min(w.poll_s for _, w in standby), wake)
        finally:
            if wake is not None:
                wake[1].cancel()

    async def _wait_standby(
        self, seconds: float, wake: tuple[Endpoint, asyncio.Task[Failure | None]] | None
    ) -> None:
        """Wait for the next poll, the answer of a model that starts, or the last endpoint's end."""
        needed = asyncio.ensure_future(self._needed.wait())
        try:
            waits = {needed} if wake is None else {needed, wake[1]}
            await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        finally:
            needed.cancel()

    def _end_wake(self, endpoint: Endpoint, asked: asyncio.Task[Failure | None]) -> float:
        """Use an endpoint whose model has answered; treat any other failure than a start's.

        Returns:
            By how many seconds the next request that wakes it comes sooner or later.
        """
        error = asked.exception()
        if isinstance(error, FanfoldError):
            self.stop(error.message)  # its key cannot be fetched
            return 0.0
        failure = asked.result()
        if failure is None:
            self._end_standby(endpoint)
            return 0.0
        self._last_failure = failure.error.message
        rule = failure.rule
        if rule.cold or rule.shrink:
            return 0.0  # it may be starting
        if rule.action is RetryAction.WAIT and rule.breaker_effect is BreakerEffect.NO:
            watch = endpoint.spec.watch
            return watch.poll_s - watch.wake_again_s if watch is not None else 0.0
        endpoint.standby = False
        self.record_failure(endpoint, failure)
        return 0.0

    def _end_standby(self, endpoint: Endpoint) -> None:
        """Send requests to an endpoint again: one at first, which shows whether it works."""
        endpoint.standby = False
        endpoint.breaker.half_open()
        _LOG.info("endpoint %s: its model runs", endpoint.label)
        self.refresh(endpoint)

    def _report_start(
        self, endpoint: Endpoint, state: DeploymentState | None, waited_s: float
    ) -> None:
        """Say what is waited for and since when; log it when it changes."""
        model, shown = endpoint.spec.probe_model, "unknown" if state is None else state.value
        began = time.strftime("%H:%M:%S", time.localtime(time.time() - waited_s))
        reason = f"waiting since {began} for {model} on {endpoint.label} to start ({shown})"
        if reason != self.pause_reason:
            self.pause_reason = reason
            _LOG.warning("%s", reason)

    def _stop_start(self, endpoint: Endpoint, watch: DeploymentWatch) -> None:
        last = f"; the last failure: {self._last_failure}" if self._last_failure else ""
        self.stop(
            f"{endpoint.spec.probe_model} on {endpoint.label} did not start within "
            f"{watch.start_wait_s:g} s (endpoints.first.start_wait_s): resume the run later{last}"
        )

    def _end_outage(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None
        if self._outage is not None:
            self._outage.cancel()
            self._outage = None

    async def _give_up(self) -> None:
        """Probe all endpoints once more, and stop the run if none answers."""
        deadline = self._deadline
        if self._outage is not None:
            self._outage.cancel()
        if probes := await self._probe_all():
            await asyncio.wait(probes)
        if deadline is not self._deadline:
            return  # an endpoint recovered meanwhile
        seconds = self._policy.timeout.fleet_s
        last = f"; the last failure: {self._last_failure}" if self._last_failure else ""
        self.stop(
            f"no endpoint recovered within {seconds:g} s (limits.fleet_wait_s): restart the "
            f"servers and resume the run{last}"
        )

    def make_stop_error(self) -> FanfoldError:
        """Return the error of a call after a stop."""
        return self._stop_class(self.stop_reason or "")

    def stop(self, message: str, error: type[FanfoldError] = RunStoppedError) -> None:
        """Stop the run: no further request is sent, and waiting calls fail with the error."""
        if self.stop_reason is None:
            self.stop_reason, self._stop_class = message, error
            self._notify_changed()
            self._end_outage()
            _LOG.error("%s", message)
        self.balancer.fail_all(self.make_stop_error)

    def _later(self, seconds: float, call: Callable[[], object]) -> asyncio.TimerHandle:
        def run() -> None:
            self._timers.discard(handle)
            call()

        handle = asyncio.get_running_loop().call_later(seconds, run)
        self._timers.add(handle)
        return handle

    def _spawn(self, coroutine: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


async def _reserve_all(quotas: Sequence[Quota], tokens: int) -> None:
    """Reserve a request with all quotas, as soon as they cover it."""
    while True:
        wait = 0.0
        for taken, quota in enumerate(quotas):
            wait = quota.reserve(tokens)
            if wait > 0.0:
                for one in quotas[:taken]:
                    one.cancel(tokens)
                break
        if wait <= 0.0:
            return
        await asyncio.sleep(min(wait, _QUOTA_S))
