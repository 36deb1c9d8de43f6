"""Retries across endpoints and hedged requests."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

from tenacity import RetryCallState, stop_after_delay
from tenacity.stop import stop_base

from ..core.errors import EndpointError, PromptTooLongError, RequestRefusedError, RunStoppedError
from ..core.protocols import CURRENT_CALLS, CallLog
from ..core.request_urls import URL_FIELD
from ..core.types import CHAT_URL
from ..core.waits import NO_LOOP, pause_after
from . import request, transport
from .balancer import LoadBalancer
from .endpoint import Endpoint, RefusalMark
from .failures import Failure, RetryAction
from .health import HealthMonitor
from .policy import HedgePolicy, RetryPolicy
from .rate_limit import RateLimiter, TokenNeed
from .request import LostRequests, RequestCharge
from .transport import OpenStream

_OTHERS: Final = 8
"""So many requests of others must be accepted in between; fewer could be chance."""
_PUT_OFF: Final = 2
"""After so many refusals for now by others, endpoints that failed the item are used again."""
_EMPTY_TRIES: Final = 2
"""An empty answer is retried on the same endpoint, then on another, if attempts are left."""
_REFUSED_ALONE: Final = 2
"""So many refusals for now of a call alone, after the first, show that its item is at fault."""


class AttemptLog(RetryCallState):
    """Failures of one call, as tenacity's policies read them.

    It is created at the first failure, so that a successful call costs nothing.

    Args:
        policy: How often and for how long to repeat.
        prefer: The endpoint that the request should be sent to, or None.

    Attributes:
        prefer: The same for the next request.
        excluded: Endpoints that the next request should pass over.
        avoid: Endpoints that failed this item, or are too small for it.
        unfit: Those of them that are too small for it.
        refusers: Endpoints that refused it for a reason that may be in the item, and how.
        marks: Endpoints that refused it for now, with their counts at that time.
        trusted: Endpoints that had recently answered another item when they refused this one.
        full: Endpoints that repeatedly had no capacity for it: their answer is not awaited.
        failed: Endpoints that failed it.
        answers: Good answers of the fleet when it last failed.
        is_final: Whether the last failure cannot or must not be repeated.
    """

    def __init__(self, policy: RetryPolicy, prefer: Endpoint | None = None) -> None:
        super().__init__(NO_LOOP, None, (), {})
        self.attempt_number = 0
        self._policy = policy
        self._counted = 0
        self._limited = 0
        self._corrections = 0
        self._alone = 0
        self._waits = 0
        self._put_off: Counter[Endpoint] = Counter()
        self._refusals = 0
        self._most: dict[Endpoint, int] = {}
        self._server_errors: dict[tuple[int | None, str | None], set[Endpoint]] = {}
        self.failed: set[Endpoint] = set()
        self.answers = -1
        self._empty: list[Endpoint] = []
        self.prefer = prefer
        self.excluded: Set[Endpoint] = frozenset()
        self.avoid: set[Endpoint] = set()
        self.unfit: set[Endpoint] = set()
        self.refusers: dict[Endpoint, Failure] = {}
        self.trusted: set[Endpoint] = set()
        self.full: set[Endpoint] = set()
        self.marks: dict[Endpoint, RefusalMark] = {}
        self.is_final = False
        self._began_again = False

    def exclude(self, unfit: Set[Endpoint]) -> None:
        """Exclude endpoints whose context is too short for the request."""
        self.avoid |= unfit
        self.unfit |= unfit

    def adapt_body(self, endpoint: Endpoint, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the request as an endpoint accepts it, from its earlier refusal."""
        most = self._most.get(endpoint)
        return body if most is None else request.lower_max_tokens(body, most)

    def needs_retry(self, outcome: tuple[object, Endpoint]) -> bool:
        """Return True if a request failed, or if its answer is empty and may be repeated."""
        result = outcome[0]
        if isinstance(result, Failure):
            return True
        return len(self._empty) < min(_EMPTY_TRIES, self._policy.attempts - 1) and _is_empty(result)

    def record_empty(self, endpoint: Endpoint) -> None:
        """Record an empty answer: the request is repeated there once, then elsewhere."""
        self._empty.append(endpoint)
        self.upcoming_sleep = 0.0
        if len(self._empty) == 1:
            self.prefer = endpoint
        else:
            self.prefer, self.excluded = None, {*self.excluded, *self._empty}

    def record_failure(self, endpoint: Endpoint, failure: Failure) -> None:
        """Record a failure, and choose the pause before the next request."""
        rule = failure.rule
        # A stale idle connection does not show a fault: the first one is free.
        stale = rule.stale and self.attempt_number == 0
        self.attempt_number += 1
        self.outcome_timestamp = time.monotonic()
        # An endpoint that answers others refuses the item: another one must confirm it.
        confirming = failure.is_clear and failure.accepts_others
        alone = rule.action is RetryAction.WAIT and failure.accepts_others
        self._counted += not (rule.free or stale or confirming or alone)
        self._refusals += confirming
        self._limited += rule.tries is not None
        if rule.action is RetryAction.WAIT:
            self._count_alone(endpoint, failure)
        if failure.is_quota:  # it says nothing about the item, however long it lasts
            self.start_time = self.outcome_timestamp
        if failure.max_answer_tokens is not None:
            self._corrections += 1
            self._most[endpoint] = failure.max_answer_tokens
        if failure.refused_field is not None and rule.free:
            self._corrections += 1
        self.is_final = (
            rule.action is RetryAction.FAIL
            or max(self._corrections, self._refusals) > self._policy.free_retries
            or self._counted >= self._policy.attempts
            or (rule.tries is not None and self._limited >= rule.tries)
            or (rule.poison and self._is_poison(endpoint, failure))
            or self.is_refused_alone
        )
        self.upcoming_sleep = 0.0 if stale else self._choose_pause(endpoint, failure)
        self.excluded = self.avoid
        if rule.action is RetryAction.SAME:
            self.prefer = endpoint

    @property
    def may_begin_again(self) -> bool:
        """Return True if all attempts are used up, and may be allowed again."""
        return self._counted >= self._policy.attempts and not self._began_again

    def begin_again(self, *, once: bool) -> None:
        """Allow all attempts again: no endpoint could have answered the last ones.

        Args:
            once: Whether this may not be repeated.
        """
        self._began_again = once
        self._counted = 0
        self.is_final = False
        self.upcoming_sleep = 0.0
        self.excluded = self.avoid = set(self.unfit)

    def _choose_pause(self, endpoint: Endpoint, failure: Failure) -> float:
        rule = failure.rule
        if rule.action is RetryAction.WAIT:
            if len(self.avoid) > len(self.unfit):
                self._put_off[endpoint] += 1
            if self._put_off.total() >= _PUT_OFF:
                # No other endpoint has capacity: the endpoints that failed it decide.
                self.full |= self._put_off.keys()
                self._put_off.clear()
                self.avoid = set(self.unfit)
            return self._pause_after_refusal(endpoint, failure)
        if rule.action is RetryAction.SAME:
            # Only a changed request is free: it differs from the refused one.
            return 0.0 if rule.free else self._policy.wait(self)
        repeated = endpoint in self.failed
        self.failed.add(endpoint)
        self.avoid.add(endpoint)
        return self._policy.wait(self) if repeated else 0.0

    @property
    def is_refused_alone(self) -> bool:
        """Return True if endpoints refuse it for now repeatedly, and answer others in between."""
        return self._alone >= _REFUSED_ALONE

    def _count_alone(self, endpoint: Endpoint, failure: Failure) -> None:
        """Count a refusal for now that only this item received since the last one.

        If others are refused too, the endpoint may have a limit that they share.
        """
        mark = self.marks.get(endpoint)
        clean = mark is not None and mark.throttled == endpoint.throttled
        if clean and mark is not None and failure.accepts_others:
            if endpoint.accepted - mark.accepted < _OTHERS:
                return  # requests that are accepted from now on count as well
            self._alone += 1
        self.marks[endpoint] = endpoint.mark(time.monotonic(), failure.accepts_others)

    def _pause_after_refusal(self, endpoint: Endpoint, failure: Failure) -> float:
        """Return the pause after a refusal for now.

        An endpoint that refuses is paused for all callers. If it still serves others, and refuses
        this request repeatedly, it is retried less and less often.
        """
        policy = self._policy
        if failure.accepts_others:
            seconds = min(failure.error.retry_after or policy.backoff_s, policy.backoff_max_s)
            return policy.named_wait(seconds)(self)
        if endpoint.resting or not endpoint.alive:
            return 0.0
        self._waits += 1
        beyond = self._waits - policy.free_retries
        return pause_after(policy.wait, beyond) if beyond > 0 else 0.0

    def _is_poison(self, endpoint: Endpoint, failure: Failure) -> bool:
        """Return True if the item is at fault: endpoints with this error answer other items."""
        error = failure.error
        failing = self._server_errors.setdefault((error.status, error.code), set())
        if endpoint.serves_others:
            failing.add(endpoint)
        return len(failing) >= self._policy.poison_endpoints


class _StopAtFinal(stop_base):
    """Stops a call whose last failure cannot or must not be repeated."""

    def __call__(self, retry_state: RetryCallState) -> bool:
        assert isinstance(retry_state, AttemptLog), "only the fleet evaluates it"
        return retry_state.is_final


def make_stop(policy: RetryPolicy) -> stop_base:
    """Return when a call that has failed is not repeated any more."""
    return _StopAtFinal() | stop_after_delay(policy.patience_s)


T = TypeVar("T")
SendFunction: TypeAlias = Callable[
    [Endpoint, Mapping[str, Any], RequestCharge], Awaitable[tuple[T | Failure, Endpoint]]
]


class Retrier:
    """Repeats failed calls across endpoints, and counts failures of the run as a whole.

    Args:
        policy: How often and for how long.
        monitor: Assigns endpoints and stops runs.
        limiter: All quotas.
    """

    def __init__(self, policy: RetryPolicy, monitor: HealthMonitor, limiter: RateLimiter) -> None:
        self._policy = policy
        self._stop_retrying = make_stop(policy)
        self._monitor = monitor
        self._limiter = limiter
        self._affinity = monitor.balancer.affinity
        self._calls = 0
        self._repeated = 0
        self._failed = 0

    async def call(
        self, body: Mapping[str, Any], send: SendFunction[T], *, shorten: bool = False
    ) -> tuple[T, Endpoint]:
        """Send one request until its answer is good.

        Args:
            body: The request.
            send: Sends it to an endpoint.
            shorten: Whether the answer may be limited further if the budget is short; if it is
                cut there, or the limit refused, the request is repeated with its own limit.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: No item can succeed any more.
        """
        self._calls += 1
        self._monitor.probe_url = body.get(URL_FIELD, CHAT_URL)
        log = CURRENT_CALLS.get()
        prefix: int | None = None
        if self._affinity is not None and "messages" in body:
            prefix = self._affinity.make_key(body)
        lost, answered = LostRequests(), None
        try:
            charge = await RequestCharge.reserve(log, body, lost, shorten=shorten)
            endpoint = await self._acquire_endpoint(charge, None, prefix=prefix)
            result, endpoint = await send(endpoint, charge.body, charge)
            if charge.body is not body and _needs_own_limit(result):
                charge = await RequestCharge.reserve(log, body, lost)
                endpoint = await self._acquire_endpoint(charge, endpoint, prefix=prefix)
                result, endpoint = await send(endpoint, body, charge)
            if isinstance(result, Failure) or _is_empty(result):
                attempts = AttemptLog(self._policy)

                async def send_again() -> tuple[T | Failure, Endpoint]:
                    charge = await RequestCharge.reserve(log, body, lost)
                    endpoint = await self._acquire_endpoint(
                        charge, attempts.prefer, attempts.excluded, attempts.unfit, prefix
                    )
                    charge.marks = attempts.marks
                    return await send(endpoint, attempts.adapt_body(endpoint, body), charge)

                answer, endpoint = await self._retry(attempts, (result, endpoint), send_again, log)
            else:
                answer = result
            answered = answer
        finally:
            lost.settle(answered)
        if log is not None:
            log.endpoint = endpoint.label
        self._monitor.count_answered(log)
        return answer, endpoint

    async def _retry(
        self,
        attempts: AttemptLog,
        first: tuple[T | Failure, Endpoint],
        send_again: Callable[[], Awaitable[tuple[T | Failure, Endpoint]]],
        log: CallLog | None,
    ) -> tuple[T, Endpoint]:
        """Repeat a call whose first request has failed, or was answered with nothing.

        The policies are tenacity's, its loop is not: it takes 0.1 ms of CPU time per repetition,
        a third of what a request costs.
        """
        outcome = first
        try:
            while attempts.needs_retry(outcome):
                await self._record_outcome(attempts, outcome, log)
                await asyncio.sleep(attempts.upcoming_sleep)
                outcome = await send_again()
        except EndpointError as error:
            self._count_failed(error)
            raise
        if attempts.refusers:
            self._monitor.eject_refusers(attempts.refusers)
        answer, endpoint = outcome
        assert not isinstance(answer, Failure), "a failure is repeated or raised"
        return answer, endpoint

    async def _acquire_endpoint(
        self,
        charge: RequestCharge,
        prefer: Endpoint | None,
        avoid: Set[Endpoint] = frozenset(),
        unfit: Set[Endpoint] = frozenset(),
        prefix: int | None = None,
    ) -> Endpoint:
        """Wait for an endpoint; release the reservation if there will be none."""
        try:
            self._check_stopped()
            if self._limiter.counts_tokens:
                charge.need = TokenNeed(self._limiter, request.max_usage(charge.body))
            return await self._monitor.balancer.acquire(
                avoid, prefer, charge.need, charge.log, unfit, prefix
            )
        except BaseException:
            charge.release(sent=False)
            raise

    def _check_stopped(self) -> None:
        if self._monitor.stop_reason is not None:
            raise self._monitor.make_stop_error()

    async def _record_outcome(
        self, attempts: AttemptLog, outcome: tuple[object, Endpoint], log: CallLog | None
    ) -> None:
        """Record a failed request or an empty answer; raise if it ends the call or the run."""
        result, endpoint = outcome
        if not isinstance(result, Failure):
            if isinstance(result, OpenStream):
                await result.drain()
            attempts.record_empty(endpoint)
            self._count_retry()
            return
        if self._monitor.stop_reason is not None:
            raise self._monitor.make_stop_error() from result.error
        if result.accepts_others:
            attempts.trusted.add(endpoint)
        if result.is_refusal:
            await self._check_item_fault(attempts, endpoint, result, log)
        failure, short = request.redirect_long_prompt(
            endpoint, result, self._monitor.balancer.alive
        )
        attempts.exclude(short)
        attempts.record_failure(endpoint, failure)
        is_silent = attempts.answers == self._monitor.answers
        attempts.answers = self._monitor.answers
        if self._stop_retrying(attempts):
            if failure.is_refusal and self._is_item_at_fault(attempts):
                raise self._monitor.count_refused(failure, len(attempts.refusers))
            if attempts.is_refused_alone:
                raise self._monitor.count_refused(failure, len(attempts.marks))
            is_lost = is_silent and failure.is_loss and attempts.may_begin_again
            if not is_lost or not await self._outlasts_outage(attempts):
                raise failure.error
        if not failure.rule.free:
            self._count_retry()

    async def _outlasts_outage(self, attempts: AttemptLog) -> bool:
        """Allow an item its attempts again if all endpoints that lost it are down.

        With few requests in flight, an item's attempts are used up before failures in a row mark
        these endpoints as unhealthy. If the item itself stops them, others are up: it would stop
        them, too, so it gets its attempts again once.
        """
        alive = (e for e in self._monitor.balancer.alive if e not in attempts.failed)
        others = set(itertools.islice(alive, self._policy.attempts))
        down = await self._monitor.find_unreachable(attempts.failed | others)
        if not attempts.failed <= down:
            return False
        attempts.begin_again(once=not others or not others <= down)
        return True

    async def _check_item_fault(
        self, attempts: AttemptLog, endpoint: Endpoint, failure: Failure, log: CallLog | None
    ) -> None:
        """Raise if an item that is refused is itself at fault.

        An unexpected page may be temporary: its meaning is known after the last attempt.
        """
        attempts.refusers[endpoint] = failure
        others = self._monitor.balancer.alive - attempts.refusers.keys() - attempts.full
        if not failure.is_clear or (others and len(attempts.refusers) == 1):
            return
        at_fault = self._is_item_at_fault(attempts)
        if not at_fault:
            at_fault = await self._monitor.resolve_fault(attempts.refusers, log)
            if self._monitor.stop_reason is not None:
                raise self._monitor.make_stop_error() from failure.error
        if at_fault:
            raise self._monitor.count_refused(failure, len(attempts.refusers))

    def _is_item_at_fault(self, attempts: AttemptLog) -> bool:
        """Return True if the item causes its refusals, rather than the endpoints.

        It does if an endpoint that recently answered another item refuses it, and a second one does
        too, or there is no second one.
        """
        refusers = attempts.refusers
        alone = not self._monitor.balancer.alive - refusers.keys() - attempts.full
        return (alone or len(refusers) > 1) and not attempts.trusted.isdisjoint(refusers)

    def _count_retry(self) -> None:
        self._repeated += 1
        budget = self._policy.budget
        if budget is None:
            return
        if self._repeated > budget * max(self._calls, self._policy.first_calls):
            self._stop(
                f"{self._repeated} retries over {self._calls} calls exceed the retry budget of "
                f"{budget:g} per call: check the endpoints, then resume the run"
            )

    def _count_failed(self, error: EndpointError) -> None:
        """Stop a run if hardly any call succeeds."""
        # A too long prompt is its item's fault, and long items may follow each other.
        self._failed += not isinstance(error, PromptTooLongError)
        first = self._policy.first_calls
        ended = self._monitor.answers + self._failed
        if self._failed > self._policy.first_failed * first and ended <= first:
            self._stop(
                f"{self._failed} of the first {ended} calls failed; the last: {error.message}"
            )

    def _stop(self, message: str) -> None:
        self._monitor.stop(message)
        raise RunStoppedError(message)


def _is_empty(result: object) -> bool:
    """Return True if an answer claims to be complete but is empty."""
    if isinstance(result, OpenStream):
        return result.is_empty
    return isinstance(result, dict) and transport.is_empty(result)


def _needs_own_limit(result: object) -> bool:
    """Return True if an answer ends at its limit of tokens, or the request may be refused for it.

    A server may require more tokens, such as those that a model has for its reasoning.
    """
    if isinstance(result, Failure):
        return result.rule.kind is RequestRefusedError
    return isinstance(result, dict) and transport.is_cut(result)


_RECENT: Final = 512
_ENOUGH: Final = 20
"""Minimum number of answers for a quantile."""

SendResult: TypeAlias = dict[str, Any] | Failure


@dataclass(slots=True, eq=False)
class HedgedCall:
    """One request in flight that may be hedged.

    Attributes:
        endpoints: Endpoints that were sent the request, the first one included.
        charge: The request and its cost.
        task: The task that waits for the answer.
        cancelling: The task's pending cancellations at the start.
        started: Monotonic time in seconds.
        next_hedge_at: Monotonic time in seconds before which no further request is sent.
        hedges: The further requests in flight, with endpoint and cost.
        answer: Their first good answer and its endpoint, if it came first.
        failed: Whether the first request has failed and the call waits for the others.
    """

    endpoints: set[Endpoint]
    charge: RequestCharge
    task: asyncio.Task[Any]
    cancelling: int
    started: float
    next_hedge_at: float = 0.0
    hedges: dict[asyncio.Task[None], tuple[Endpoint, RequestCharge]] = field(default_factory=dict)
    answer: tuple[dict[str, Any], Endpoint] | None = None
    failed: bool = False


class Hedger:
    """Sends second requests for the stragglers of one fleet.

    Args:
        policy: When, and how many.
        balancer: Assigns endpoints.
        send: Sends one request and returns its result; it never hedges.
    """

    def __init__(
        self,
        policy: HedgePolicy,
        balancer: LoadBalancer,
        send: SendFunction[dict[str, Any]],
    ) -> None:
        self._policy = policy
        self._balancer = balancer
        self._send = send
        self._calls: dict[HedgedCall, None] = {}
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._timer: asyncio.TimerHandle | None = None
        self._peak = 0
        self._answers = 0
        self._doubled = 0

    async def send(
        self, endpoint: Endpoint, body: Mapping[str, Any], charge: RequestCharge
    ) -> tuple[SendResult, Endpoint]:
        """Send one request, and a second one if it turns out to be a straggler.

        Returns:
            The result that counts, and the endpoint that gave it.
        """
        call = self._add_call(endpoint, charge)
        try:
            result, _ = await self._send(endpoint, body, charge)
        except asyncio.CancelledError:
            if call.answer is not None and call.task.uncancel() <= call.cancelling:
                return call.answer
            raise
        else:
            if not isinstance(result, Failure):
                self._record_answer(call)
                if call.hedges:
                    _share_prompt_tokens(call, result)
                return result, endpoint
            call.failed = True
            while call.hedges and call.answer is None:
                await asyncio.wait(call.hedges, return_when=asyncio.FIRST_COMPLETED)
            return call.answer or (result, endpoint)
        finally:
            self._remove_call(call)

    def _add_call(self, endpoint: Endpoint, charge: RequestCharge) -> HedgedCall:
        task = asyncio.current_task()
        assert task is not None, "a request is sent from a task"
        call = HedgedCall({endpoint}, charge, task, task.cancelling(), time.monotonic())
        self._calls[call] = None
        self._peak = max(self._peak, len(self._calls))
        return call

    def _remove_call(self, call: HedgedCall) -> None:
        del self._calls[call]
        self._cancel_hedges(call)
        if self._timer is None and self._is_run_ending():
            self._check_stragglers()

    def _record_answer(self, call: HedgedCall) -> None:
        """Record the duration of a good answer."""
        self._answers += 1
        self._recent.append(time.monotonic() - call.started)

    def _is_run_ending(self) -> bool:
        running = len(self._calls)
        return (
            0 < running < self._policy.below * self._peak
            and self._peak >= self._policy.peak
            and not self._balancer.contended
            and len(self._recent) >= _ENOUGH
        )

    def _check_stragglers(self) -> None:
        """Check for stragglers now and, while the run is ending, periodically."""
        self._timer = None
        if not self._is_run_ending():
            return
        times = sorted(self._recent)
        limit = times[int(self._policy.quantile * len(times))]
        now = time.monotonic()
        for call in list(self._calls):
            if now - call.started <= limit:
                break
            wanted = now >= call.next_hedge_at and len(call.endpoints) <= self._policy.copies
            if wanted and self._doubled < self._policy.share * self._answers:
                self._hedge(call, now + times[len(times) // 2])
        pause = max(self._policy.tick_s, limit / 10)
        self._timer = asyncio.get_running_loop().call_later(pause, self._check_stragglers)

    def _hedge(self, call: HedgedCall, due: float) -> None:
        charge = call.charge.reserve_again()
        if charge is None:  # the budget does not cover a second request
            return
        if call.charge.need is not None:
            charge.need = call.charge.need.copy()
        endpoint = self._balancer.try_acquire(call.endpoints, charge.need, charge.log)
        if endpoint is None:
            charge.release(sent=False)
            return
        self._doubled += 1
        endpoint.stats.hedges += 1
        call.next_hedge_at = due
        call.endpoints.add(endpoint)
        further = self._run_hedge(call, endpoint, charge)
        task = asyncio.get_running_loop().create_task(further)
        call.hedges[task] = endpoint, charge
        task.add_done_callback(lambda done: call.hedges.pop(done, None))

    async def _run_hedge(self, call: HedgedCall, endpoint: Endpoint, charge: RequestCharge) -> None:
        result, _ = await self._send(endpoint, charge.body, charge)
        if not isinstance(result, Failure) and call in self._calls and call.answer is None:
            call.answer = (result, endpoint)
            _share_prompt_tokens(call, result)
            if not call.failed:
                call.task.cancel()

    def close(self) -> None:
        """Cancel the timer and all second requests."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for call in self._calls:
            self._cancel_hedges(call)

    def _cancel_hedges(self, call: HedgedCall) -> None:
        for task, (endpoint, charge) in call.hedges.items():
            # A task that is cancelled before its first step runs no code, so it does not release
            # its endpoint.
            coroutine = task.get_coro()
            not_started = (
                inspect.iscoroutine(coroutine)
                and inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED
            )
            if not_started and not task.cancelling():
                self._balancer.release(endpoint, None, charge.log, charge.tokens, None)
                charge.release(sent=False)
            # At once: the item may be recorded before the task is cancelled.
            endpoint.stats.add_lost(charge.settle_lost())
            task.cancel()


def _share_prompt_tokens(call: HedgedCall, answer: Mapping[str, Any]) -> None:
    """Note the prompt's length for all copies of a request: they have the same prompt."""
    prompt = transport.read_usage(answer).prompt
    for charge in (call.charge, *(charge for _, charge in call.hedges.values())):
        charge.prompt_tokens = prompt
