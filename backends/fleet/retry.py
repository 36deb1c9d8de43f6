"""One call: sent, and repeated until an answer is good or no further attempt is allowed."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable, Mapping, Set
from typing import Any, Final, TypeAlias, TypeVar

from ..core.errors import EndpointError, PromptTooLongError, RunStoppedError
from ..core.protocols import CURRENT_CALLS, CallLog
from . import judge, room
from .affinity import Affinity
from .attempts import Attempts
from .charge import Charge
from .endpoint import Endpoint
from .failures import Failure, Step
from .pacing import Pacer, estimate
from .policy import RetryPolicy
from .stream import OpenStream
from .warden import Warden

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
        failure, short = room.elsewhere(endpoint, failure, self._warden.dispatch.alive)
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
    return isinstance(result, dict) and judge.is_empty(result)
