"""Retries across endpoints and hedged requests."""

from __future__ import annotations

import asyncio
import inspect
import random
import time
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias, TypeVar

from ..core.errors import EndpointError, PromptTooLongError, RunStoppedError
from ..core.protocols import CURRENT_CALLS, CallLog
from . import request, transport
from .balancer import Affinity, Dispatcher, Warden
from .endpoint import Endpoint, Mark
from .failures import Failure, Step
from .policy import HedgePolicy, Pacer, RetryPolicy, estimate
from .request import Charge
from .transport import OpenStream

_OTHERS: Final = 8
"""So many requests of others must be accepted in between: one of few is refused by chance."""
_PUT_OFF: Final = 2
"""After so many refusals for now elsewhere, the endpoints that failed the item are asked again."""
_REFUSED_ALONE: Final = 2
"""So many refusals for now of a call alone, after the first, show that its item is at fault."""


class Attempts:
    """Made at an item's first failure, so that a call that succeeds at once pays nothing.

    Args:
        policy: How often and how patiently to repeat.

    Attributes:
        avoid: Endpoints that failed this item, or cannot hold it.
        unfit: Those of them that cannot hold it.
        refusers: Endpoints that refused it for a reason that may lie in the item, and how.
        marks: Endpoints that refused it for now, and what each had done then.
        trusted: Endpoints that had lately answered another item when they refused this one.
        full: Endpoints that had no room for it again and again: no answer of theirs is waited for.
    """

    __slots__ = (
        "_alone",
        "_corrections",
        "_counted",
        "_failed",
        "_failures",
        "_limited",
        "_most",
        "_policy",
        "_put_off",
        "_refusals",
        "_server_errors",
        "_until",
        "_waits",
        "avoid",
        "full",
        "marks",
        "refusers",
        "trusted",
        "unfit",
    )

    def __init__(self, policy: RetryPolicy, now: float) -> None:
        self._policy = policy
        self._failures = 0
        self._counted = 0
        self._until = now + policy.patience_s
        self._limited = 0
        self._corrections = 0
        self._alone = 0
        self._waits = 0
        self._put_off: Counter[Endpoint] = Counter()
        self._refusals = 0
        self._most: dict[Endpoint, int] = {}
        self._server_errors: dict[tuple[int | None, str | None], set[Endpoint]] = {}
        self._failed: set[Endpoint] = set()
        self.avoid: set[Endpoint] = set()
        self.unfit: set[Endpoint] = set()
        self.refusers: dict[Endpoint, Failure] = {}
        self.trusted: set[Endpoint] = set()
        self.full: set[Endpoint] = set()
        self.marks: dict[Endpoint, Mark] = {}

    def exclude(self, unfit: Set[Endpoint]) -> None:
        """Ask no more of endpoints that cannot hold the request."""
        self.avoid |= unfit
        self.unfit |= unfit

    def fitted(self, endpoint: Endpoint, body: Mapping[str, Any]) -> Mapping[str, Any]:
        """Return the request as an endpoint takes it, by what it said when it refused it."""
        most = self._most.get(endpoint)
        return body if most is None else request.lowered(body, most)

    def after(self, endpoint: Endpoint, failure: Failure, now: float, chance: float) -> float:
        """Count a failure and return the seconds to wait before the next call.

        Args:
            endpoint: Who failed.
            failure: How.
            now: Monotonic time in seconds.
            chance: A random number in 0 to 1, to spread callers.

        Raises:
            EndpointError: It was the last attempt, or asking again is hopeless.
        """
        treatment = failure.treatment
        # A connection that idled a moment too long is no sign of anything: free, once.
        stale = treatment.stale and self._failures == 0
        self._failures += 1
        # An endpoint that answers others refuses the item: another one is asked to confirm it.
        confirming = failure.is_clear and failure.accepts_others
        alone = treatment.step is Step.WAIT and failure.accepts_others
        self._counted += not (treatment.free or stale or confirming or alone)
        self._refusals += confirming
        self._limited += treatment.tries is not None
        if treatment.step is Step.WAIT:
            self._count_alone(endpoint, failure, now)
        if failure.most_tokens is not None:
            self._corrections += 1
            self._most[endpoint] = failure.most_tokens
        if (
            treatment.step is Step.FAIL
            or max(self._corrections, self._refusals) > self._policy.free_retries
            or self._counted >= self._policy.attempts
            or (treatment.tries is not None and self._limited >= treatment.tries)
            or (treatment.poison and self._is_poison(endpoint, failure))
            or self.refused_alone
            or now >= self._until
        ):
            raise failure.error
        if stale:
            return 0.0
        if treatment.step is Step.WAIT:
            if len(self.avoid) > len(self.unfit):
                self._put_off[endpoint] += 1
            if self._put_off.total() >= _PUT_OFF:
                # Nobody else has room for it: it ends where it failed, or is answered after all.
                self.full |= self._put_off.keys()
                self._put_off.clear()
                self.avoid = set(self.unfit)
            return self._wait(endpoint, failure, chance)
        if treatment.step is Step.SAME:
            # What is free is another request than the one that was refused.
            return 0.0 if treatment.free else self._policy.pause(self._failures, chance)
        repeated = endpoint in self._failed
        self._failed.add(endpoint)
        self.avoid.add(endpoint)
        return self._policy.pause(self._failures, chance) if repeated else 0.0

    @property
    def refused_alone(self) -> bool:
        """Whether endpoints refuse it for now again and again, and answer others in between."""
        return self._alone >= _REFUSED_ALONE

    def _count_alone(self, endpoint: Endpoint, failure: Failure, now: float) -> None:
        """Count a refusal for now that no other item has met since the last one.

        Where others are refused too, the endpoint may have a limit that they share.
        """
        mark = self.marks.get(endpoint)
        clean = mark is not None and mark.throttled == endpoint.throttled
        if clean and mark is not None and failure.accepts_others:
            if endpoint.accepted - mark.accepted < _OTHERS:
                return  # those that are accepted from now on count as well
            self._alone += 1
        self.marks[endpoint] = endpoint.mark(now)

    def _wait(self, endpoint: Endpoint, failure: Failure, chance: float) -> float:
        """Return the pause after a refusal for now.

        An endpoint that refuses is paused for all callers. One that goes on with the requests of
        others, and refuses this one again and again, is asked less and less often.
        """
        if failure.accepts_others:
            seconds = failure.error.retry_after or self._policy.backoff_s
            return self._policy.spread(min(seconds, self._policy.backoff_max_s), chance)
        if endpoint.resting or not endpoint.alive:
            return 0.0
        self._waits += 1
        beyond = self._waits - self._policy.free_retries
        return self._policy.pause(beyond, chance) if beyond > 0 else 0.0

    def _is_poison(self, endpoint: Endpoint, failure: Failure) -> bool:
        """Tell whether the item is at fault: others are answered where it meets this error."""
        error = failure.error
        met = self._server_errors.setdefault((error.status, error.code), set())
        if endpoint.serves_others:
            met.add(endpoint)
        return len(met) >= self._policy.poison_endpoints


T = TypeVar("T")
Send: TypeAlias = Callable[
    [Endpoint, Mapping[str, Any], Charge], Awaitable[tuple[T | Failure, Endpoint]]
]

_EMPTY_TRIES: Final = 2
"""An empty answer is asked for again on the same endpoint, then on another; attempts allowing."""


class Repeater:
    """Carries calls from endpoint to endpoint, and counts how the run as a whole fares.

    Args:
        policy: How often and how patiently.
        warden: Who hands out endpoints and stops runs.
        pacer: The whole process' quotas, or None.
        affinity: Who met which beginning, or None.
        weighs: Whether any quota counts tokens, so that requests must be estimated.
    """

    def __init__(
        self,
        policy: RetryPolicy,
        warden: Warden,
        pacer: Pacer | None,
        affinity: Affinity | None,
        weighs: Callable[[], bool],
    ) -> None:
        self._policy = policy
        self._warden = warden
        self._pacer = pacer
        self._affinity = affinity
        self._weighs = weighs
        self._calls = 0
        self._repeated = 0
        self._failed = 0

    async def call(self, body: Mapping[str, Any], send: Send[T]) -> tuple[T, Endpoint]:
        """Send one request until its answer is good.

        Raises:
            EndpointError: No endpoint answered within the attempts allowed.
            RunStoppedError: Asking on is hopeless for every item.
        """
        self._calls += 1
        try:
            return await self._call(body, send)
        except EndpointError as error:
            self._count_failed(error)
            raise

    async def _call(self, body: Mapping[str, Any], send: Send[T]) -> tuple[T, Endpoint]:
        log = CURRENT_CALLS.get()
        tokens = estimate(body) if self._weighs() else 0
        key = self._affinity.key(body) if self._affinity else 0
        prefer = self._affinity.home(key) if self._affinity else None
        attempts: Attempts | None = None
        avoid: Set[Endpoint] = frozenset()
        empty: list[Endpoint] = []
        tries = min(_EMPTY_TRIES, self._policy.attempts - 1)
        while True:
            charge = await Charge.open(log, body)
            unfit = frozenset() if attempts is None else attempts.unfit
            endpoint = await self._admitted(charge, tokens, avoid, prefer, unfit)
            if self._affinity is not None:
                self._affinity.met(key, endpoint)
            asked = body
            if attempts is not None:
                asked, charge.marks = attempts.fitted(endpoint, body), attempts.marks
            result, endpoint = await send(endpoint, asked, charge)
            if isinstance(result, Failure):
                attempts = attempts or Attempts(self._policy, time.monotonic())
                await self._after(attempts, endpoint, result, log)
                avoid = attempts.avoid
                prefer = endpoint if result.treatment.step is Step.SAME else prefer
            elif not _is_empty(result) or len(empty) >= tries:
                if log is not None:
                    log.endpoint = endpoint.label
                self._warden.count_answered(log)
                if attempts is not None and attempts.refusers:
                    self._warden.answered_elsewhere(attempts.refusers)
                return result, endpoint
            else:
                if isinstance(result, OpenStream):
                    await result.drain()
                empty.append(endpoint)
                prefer, avoid = (endpoint, avoid) if len(empty) == 1 else (None, {*avoid, *empty})
                self._count_repeated()

    async def _admitted(
        self,
        charge: Charge,
        tokens: int,
        avoid: Set[Endpoint],
        prefer: Endpoint | None,
        unfit: Set[Endpoint],
    ) -> Endpoint:
        """Wait for an endpoint; what is reserved is given back if there will be none."""
        try:
            self._go_on()
            if self._pacer is not None:
                await asyncio.sleep(self._pacer.admit(tokens))
                self._go_on()  # a stop fails who waits for an endpoint, and this call did not yet
            return await self._warden.dispatch.take(avoid, prefer, tokens, charge.log, unfit)
        except BaseException:
            charge.free(sent=False)
            raise

    def _go_on(self) -> None:
        if self._warden.stopped is not None:
            raise RunStoppedError(self._warden.stopped)

    async def _after(
        self, attempts: Attempts, endpoint: Endpoint, failure: Failure, log: CallLog | None
    ) -> None:
        """Wait as a failed request asks, or raise if it was the last."""
        if self._warden.stopped is not None:
            raise RunStoppedError(self._warden.stopped) from failure.error
        if failure.accepts_others:
            attempts.trusted.add(endpoint)
        if failure.is_refusal:
            await self._judge(attempts, endpoint, failure, log)
        failure, short = request.elsewhere(endpoint, failure, self._warden.dispatch.alive)
        try:
            pause = attempts.after(endpoint, failure, time.monotonic(), random.random())
        except EndpointError:
            if failure.is_refusal and self._is_at_fault(attempts):
                raise self._warden.count_refused(failure, len(attempts.refusers)) from None
            if attempts.refused_alone:
                raise self._warden.count_refused(failure, len(attempts.marks)) from None
            raise
        attempts.exclude(short)
        if not failure.treatment.free:
            self._count_repeated()
        await asyncio.sleep(pause)

    async def _judge(
        self, attempts: Attempts, endpoint: Endpoint, failure: Failure, log: CallLog | None
    ) -> None:
        """Raise if an item that is refused is itself at fault.

        An odd page may be a moment's matter: what it says is known after the last attempt.
        """
        attempts.refusers[endpoint] = failure
        others = self._warden.dispatch.alive - attempts.refusers.keys() - attempts.full
        if not failure.is_clear or (others and len(attempts.refusers) == 1):
            return
        at_fault = self._is_at_fault(attempts)
        if not at_fault:
            at_fault = await self._warden.settle(attempts.refusers, log)
            if self._warden.stopped is not None:
                raise RunStoppedError(self._warden.stopped) from failure.error
        if at_fault:
            raise self._warden.count_refused(failure, len(attempts.refusers))

    def _is_at_fault(self, attempts: Attempts) -> bool:
        """Tell whether the item is to blame for its refusals, rather than the endpoints.

        It is if an endpoint that answered another item lately refuses it, and a second one does
        too, or there is none.
        """
        refusers = attempts.refusers
        alone = not self._warden.dispatch.alive - refusers.keys() - attempts.full
        return (alone or len(refusers) > 1) and not attempts.trusted.isdisjoint(refusers)

    def _count_repeated(self) -> None:
        self._repeated += 1
        budget = self._policy.budget
        if budget is None:
            return
        if self._repeated > budget * max(self._calls, self._policy.first_calls):
            self._stop(
                f"{self._repeated} repetitions over {self._calls} calls are more than the "
                f"retry budget of {budget:g} per call: look at the endpoints, then resume the run"
            )

    def _count_failed(self, error: EndpointError) -> None:
        """Stop a run of which hardly any call succeeds."""
        # A prompt that is too long is its item's matter, and long items may stand together.
        self._failed += not isinstance(error, PromptTooLongError)
        first = self._policy.first_calls
        ended = self._warden.answers + self._failed
        if self._failed > self._policy.first_failed * first and ended <= first:
            self._stop(
                f"{self._failed} of the first {ended} calls failed; the last: {error.message}"
            )

    def _stop(self, message: str) -> None:
        self._warden.stop(message)
        raise RunStoppedError(message)


def _is_empty(result: object) -> bool:
    """Tell whether an answer claims to be whole and holds nothing."""
    if isinstance(result, OpenStream):
        return result.is_empty
    return isinstance(result, dict) and transport.is_empty(result)


_RECENT: Final = 512
_ENOUGH: Final = 20
"""Answers before a quantile means anything."""

Result: TypeAlias = dict[str, Any] | Failure


@dataclass(slots=True, eq=False)
class Call:
    """One request in flight that may be doubled.

    Attributes:
        asked: Who was asked, the first one included.
        charge: What the request costs, and what it asks.
        task: The task that waits for the answer.
        cancelling: The task's pending cancellations at the start.
        started: Monotonic time in seconds.
        due: Monotonic time in seconds before which no further request is sent.
        others: The further requests under way, who was asked, and what they cost.
        answer: Their first good answer and who gave it, when it came first.
        failed: Whether the first request has failed and the others are waited for.
    """

    asked: set[Endpoint]
    charge: Charge
    task: asyncio.Task[Any]
    cancelling: int
    started: float
    due: float = 0.0
    others: dict[asyncio.Task[None], tuple[Endpoint, Charge]] = field(default_factory=dict)
    answer: tuple[dict[str, Any], Endpoint] | None = None
    failed: bool = False


class Hedger:
    """Doubles the stragglers of one fleet.

    Args:
        policy: When, and how many.
        dispatch: Who hands endpoints out.
        send: Sends one request and returns its result; it never hedges.
        pacer: The whole process' quotas, or None; they are kept by second requests too.
    """

    def __init__(
        self,
        policy: HedgePolicy,
        dispatch: Dispatcher,
        send: Callable[[Endpoint, Mapping[str, Any], Charge], Awaitable[Result]],
        pacer: Pacer | None = None,
    ) -> None:
        self._pacer = pacer
        self._policy = policy
        self._dispatch = dispatch
        self._send = send
        self._calls: dict[Call, None] = {}
        self._recent: deque[float] = deque(maxlen=_RECENT)
        self._timer: asyncio.TimerHandle | None = None
        self._peak = 0
        self._answers = 0
        self._doubled = 0

    async def send(
        self, endpoint: Endpoint, body: Mapping[str, Any], charge: Charge
    ) -> tuple[Result, Endpoint]:
        """Send one request, and a second one if it turns out to be a straggler.

        Returns:
            The result that counts, and the endpoint that gave it.
        """
        call = self._enter(endpoint, charge)
        try:
            result = await self._send(endpoint, body, charge)
        except asyncio.CancelledError:
            if call.answer is not None and call.task.uncancel() <= call.cancelling:
                return call.answer
            raise
        else:
            if not isinstance(result, Failure):
                self._answered(call)
                return result, endpoint
            call.failed = True
            while call.others and call.answer is None:
                await asyncio.wait(call.others, return_when=asyncio.FIRST_COMPLETED)
            return call.answer or (result, endpoint)
        finally:
            self._leave(call)

    def _enter(self, endpoint: Endpoint, charge: Charge) -> Call:
        task = asyncio.current_task()
        assert task is not None, "a request is sent from a task"
        call = Call({endpoint}, charge, task, task.cancelling(), time.monotonic())
        self._calls[call] = None
        self._peak = max(self._peak, len(self._calls))
        return call

    def _leave(self, call: Call) -> None:
        del self._calls[call]
        self._drop_others(call)
        if self._timer is None and self._is_end_game():
            self._tick()

    def _answered(self, call: Call) -> None:
        """Take note of how long a good answer took."""
        self._answers += 1
        self._recent.append(time.monotonic() - call.started)

    def _is_end_game(self) -> bool:
        running = len(self._calls)
        return (
            0 < running < self._policy.below * self._peak
            and self._peak >= self._policy.peak
            and not self._dispatch.contended
            and len(self._recent) >= _ENOUGH
        )

    def _tick(self) -> None:
        """Look for stragglers now and, while the end game lasts, again and again."""
        self._timer = None
        if not self._is_end_game():
            return
        times = sorted(self._recent)
        limit = times[int(self._policy.quantile * len(times))]
        now = time.monotonic()
        for call in list(self._calls):
            if now - call.started <= limit:
                break
            wanted = now >= call.due and len(call.asked) <= self._policy.copies
            if wanted and self._doubled < self._policy.share * self._answers:
                self._double(call, now + times[len(times) // 2])
        pause = max(self._policy.tick_s, limit / 10)
        self._timer = asyncio.get_running_loop().call_later(pause, self._tick)

    def _double(self, call: Call, due: float) -> None:
        tokens, charge = estimate(call.charge.body), call.charge.again()
        if charge is None:  # the budget does not carry a second request
            return
        if self._pacer is not None and not self._pacer.spare(tokens):
            charge.free(sent=False)
            return
        endpoint = self._dispatch.take_now(call.asked, tokens, charge.log)
        if endpoint is None:
            charge.free(sent=False)
            if self._pacer is not None:
                self._pacer.settle(tokens, 0)
            return
        self._doubled += 1
        endpoint.stats.hedges += 1
        call.due = due
        call.asked.add(endpoint)
        further = self._further(call, endpoint, charge)
        task = asyncio.get_running_loop().create_task(further)
        call.others[task] = endpoint, charge
        task.add_done_callback(lambda done: call.others.pop(done, None))

    async def _further(self, call: Call, endpoint: Endpoint, charge: Charge) -> None:
        result = await self._send(endpoint, charge.body, charge)
        if not isinstance(result, Failure) and call in self._calls and call.answer is None:
            call.answer = (result, endpoint)
            if not call.failed:
                call.task.cancel()

    def close(self) -> None:
        """Cancel the timer and all second requests."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for call in self._calls:
            self._drop_others(call)

    def _drop_others(self, call: Call) -> None:
        for task, (endpoint, charge) in call.others.items():
            # A task that is cancelled before its first step runs nothing, not even what gives
            # its endpoint back.
            coroutine = task.get_coro()
            unborn = (
                inspect.iscoroutine(coroutine)
                and inspect.getcoroutinestate(coroutine) == inspect.CORO_CREATED
            )
            if unborn and not task.cancelling():
                self._dispatch.give(endpoint, item=charge.log)
                charge.free(sent=False)
            # At once: the item may be recorded before the task hears that it is cancelled.
            endpoint.stats.lost(charge.lost())
            task.cancel()
