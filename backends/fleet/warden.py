"""What successes and failures mean for an endpoint, and for the run as a whole.

The states are the endpoints' own (breaker, lane, resting, ejected); the timers that move them are
here, and so are the conditions that stop a run: no endpoint left, no request accepted, a quota
that is used up, nobody alive for too long.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Final

import aiohttp

from ..core.errors import EndpointError, PromptTooLongError, RunStoppedError
from ..core.protocols import CallLog
from .balancer import Dispatcher
from .breaker import State
from .endpoint import Endpoint
from .failures import Failure, Step, Trip, of_refused_item
from .policy import AffinityPolicy, FleetPolicy
from .transport import Transport

_LOG: Final = logging.getLogger(__name__)
_NOBODY_THERE: Final = frozenset({502, 503, 504})
"""Statuses of a proxy or a starting server; any other answer shows that somebody is there."""
_RECENT: Final = 200
"""Items of which a share may be refused as themselves at fault."""
_REFUSED_ITEMS: Final = 2
"""An endpoint that refuses so many items, and accepts none between them, is itself at fault."""
_LOOK_S: Final = 0.1
_QUIET_LOOKS: Final = 2
"""So many looks at a fleet without any request show that no other item comes."""


class Warden:
    """Watches over the endpoints of one fleet.

    Args:
        endpoints: All members.
        policy: When to do what.
        transport: For probes.

    Attributes:
        dispatch: Who hands the endpoints out.
        stopped: Why no further request is sent, or None.
        paused: Why nothing goes on at the moment, or None.
        answers: Good answers so far.
        refusals: Times that an endpoint said "not now".
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], policy: FleetPolicy, transport: Transport
    ) -> None:
        self._endpoints = endpoints
        self._policy = policy
        self._transport = transport
        self._timers: set[asyncio.TimerHandle] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._sweeping = False
        self._deadline: asyncio.TimerHandle | None = None
        self._refused = 0
        self._ended: deque[bool] = deque(maxlen=_RECENT)
        self._changed = asyncio.Event()
        slack = (policy.affinity or AffinityPolicy()).slack
        self._wakes: dict[Endpoint, asyncio.TimerHandle] = {}
        self.dispatch = Dispatcher(endpoints, policy.streams, self._paced, self._starved, slack)
        self.stopped: str | None = None
        self.paused: str | None = None
        self.answers = 0
        self.refusals = 0

    def close(self) -> None:
        """Cancel all timers and probes, so that nothing is left on the loop."""
        for handle in self._timers:
            handle.cancel()
        for task in self._tasks:
            task.cancel()
        self._timers.clear()
        self._wakes.clear()
        self._sweeping = False
        self._deadline = None
        self.dispatch.far.clear()
        for endpoint in self._endpoints:
            endpoint.resting = False

    def succeeded(self, endpoint: Endpoint, level: int, seconds: float) -> None:
        """Take note of a good answer, sent as one of ``level`` requests in flight."""
        now = time.monotonic()
        self.answers += 1
        endpoint.refusals = 0
        endpoint.lane.answered(level, seconds, now)
        if endpoint.breaker.succeed():
            endpoint.lane.reset(now)
            _LOG.info("endpoint %s is back", endpoint.label)
            self.refresh(endpoint)

    def clear(self, endpoint: Endpoint, item: CallLog | None) -> None:
        """Trust an endpoint again that has accepted another item than those that it refused."""
        if id(item) not in endpoint.doubts:
            endpoint.doubts.clear()
            self.refresh(endpoint)
            self._announce()

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
            RunStoppedError: So many items end this way that it looks like an outage.
        """
        error, share = of_refused_item(failure, endpoints), self._policy.retry.refused_share
        self._ended.append(True)
        count = sum(self._ended)
        if count <= share * _RECENT:
            return error
        self.stop(
            f"{count} of the last {len(self._ended)} items were refused by endpoints that answered "
            f"other items; more than {share:.0%} of {_RECENT} look like an outage: check the key "
            f"and the items, then resume the run; the last answer: {failure.error.message}"
        )
        raise RunStoppedError(self.stopped or "") from error

    async def settle(self, refusers: Mapping[Endpoint, Failure], item: CallLog | None) -> bool:
        """Wait until it is known whether an item is at fault, or the endpoints that refuse it.

        Endpoints that accept another item meanwhile are in order. Those that refuse another one
        too, or that no other item is there to be sent to, are used no more. Streams of the item
        that wait for this call keep no other item away.

        Args:
            refusers: Endpoints that have refused the item, and how.
            item: The item.

        Returns:
            Whether the item is at fault.
        """
        if item is None:
            return await self._settled(refusers, item)
        item.queued += 1
        item.line = self.dispatch
        try:
            return await self._settled(refusers, item)
        finally:
            item.queued -= 1

    async def _settled(self, refusers: Mapping[Endpoint, Failure], item: CallLog | None) -> bool:
        quiet = 0
        while not any(e.proves(item, time.monotonic()) for e in refusers):
            if self.stopped is not None or all(e.ejected or e.retired for e in refusers):
                return False
            quiet = quiet + 1 if self.dispatch.quiet else 0
            if quiet > _QUIET_LOOKS:
                for endpoint, failure in refusers.items():
                    self._eject(endpoint, failure.error)
                    self.refresh(endpoint)
                continue
            if item is not None and item.idle and self.dispatch.jammed:
                self.dispatch.lend()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._changed.wait()
        return True

    def answered_elsewhere(self, refusers: Mapping[Endpoint, Failure]) -> None:
        """Use endpoints no more that have accepted nothing, and refused what another one answers.

        Those that have other requests in flight are judged by their ends.
        """
        for endpoint, failure in refusers.items():
            if endpoint.doubts and endpoint.outstanding <= endpoint.streaming:
                self._eject(endpoint, failure.error)
                self.refresh(endpoint)

    def _announce(self) -> None:
        """Wake those that wait for news of the endpoints."""
        self._changed.set()
        self._changed = asyncio.Event()

    def _is_open_question(self, endpoint: Endpoint, failure: Failure, item: CallLog | None) -> bool:
        """Tell whether a refusal says nothing of the endpoint: the item may be at fault."""
        if failure.accepts_others:
            return True
        if not failure.is_clear:
            return False
        endpoint.doubts.add(id(failure if item is None else item))
        undecided = endpoint.outstanding - endpoint.streaming > 1
        return undecided or len(endpoint.doubts) < _REFUSED_ITEMS

    def failed(self, endpoint: Endpoint, failure: Failure, item: CallLog | None = None) -> None:
        """Do what a failure means; it may stop the run."""
        if failure.is_refusal and self._is_open_question(endpoint, failure, item):
            self.refresh(endpoint)
            return
        treatment, error = failure.treatment, failure.error
        if treatment.step is Step.WAIT and failure.accepts_others:
            # It refuses this item and answers others: the item waits, the endpoint works on.
            self.refusals += 1
            self.refresh(endpoint)
            return
        if treatment.step is Step.STOP:
            self.stop(error.message)
        if treatment.step in {Step.EJECT, Step.REKEY}:
            self._eject(endpoint, error)
        if treatment.step is Step.FAIL and not isinstance(error, PromptTooLongError):
            self._count_hopeless(endpoint, failure)
        if treatment.shrink:
            endpoint.lane.shrink(time.monotonic())
        if treatment.trip is not Trip.NO and endpoint.breaker.fail(treatment.trip is Trip.OPEN):
            self._open(endpoint, error)
        if treatment.step is Step.WAIT:
            self._refuse(endpoint, failure, item)
        self.refresh(endpoint)

    def _count_hopeless(self, endpoint: Endpoint, failure: Failure) -> None:
        """Stop a run that nobody accepts, or eject who alone accepts nothing."""
        self._refused += 1
        most = self._policy.retry.hopeless_after
        if not self.answers and (self._refused >= most or failure.treatment.schema):
            self.stop(f"no request was accepted; the last answer: {failure.error.message}")
        elif self.answers and not endpoint.has_answered and endpoint.stats.calls >= most:
            self._eject(endpoint, failure.error)

    def _refuse(self, endpoint: Endpoint, failure: Failure, item: CallLog | None) -> None:
        """Let an endpoint rest as long as it asked; all of its host, where the quota is shared."""
        self.refusals += 1
        endpoint.throttled += 1
        retry, treatment = self._policy.retry, failure.treatment
        seconds = failure.error.retry_after or treatment.rest_s
        if seconds is None and treatment.long:
            # One that answers other items is asked again soon: the item may be at fault.
            first = endpoint.refusals == 0 and endpoint.proves(item, time.monotonic())
            seconds = retry.refusal_pause_s if first else retry.long_pause_s
        endpoint.lane.refused(endpoint.outstanding)
        if seconds is None and endpoint.outstanding > 1:
            # It works at the others that it has: the narrower lane is answer enough.
            return
        endpoint.refusals += 1
        pause = retry.spread(seconds or retry.rest(endpoint.refusals), random.random())
        host = endpoint.url.split("/")[2]
        for other in self._endpoints:
            if other is endpoint or (treatment.shared and other.url.split("/")[2] == host):
                self.rest(other, pause)
        self._check_rest(failure.error)

    def _check_rest(self, error: EndpointError) -> None:
        seconds = error.retry_after or 0.0
        if seconds > max(self._policy.timeout.fleet_s, self._policy.retry.long_wait_s) and all(
            e.resting for e in self.dispatch.alive
        ):
            self.stop(f"{error.message}; resume the run in {seconds:.0f} s")

    def rest(self, endpoint: Endpoint, seconds: float) -> None:
        """Send an endpoint nothing for a while; of two pauses the later end counts."""
        pending = self._wakes.get(endpoint)
        if pending is not None:
            if pending.when() >= asyncio.get_running_loop().time() + seconds:
                return
            pending.cancel()
            self._timers.discard(pending)
        endpoint.resting = True
        if seconds > self._policy.retry.long_wait_s:
            self.dispatch.far.add(endpoint)
        self._wakes[endpoint] = self._later(seconds, lambda: self._wake(endpoint))

    def _wake(self, endpoint: Endpoint) -> None:
        self._wakes.pop(endpoint, None)
        endpoint.resting = False
        self.dispatch.far.discard(endpoint)
        self.refresh(endpoint)

    def _eject(self, endpoint: Endpoint, error: EndpointError) -> None:
        if endpoint.ejected:
            return
        endpoint.ejected = True
        self._announce()
        _LOG.warning("endpoint %s is used no more: %s", endpoint.label, error.message)
        if all(e.ejected or e.retired for e in self._endpoints):
            self.stop(f"no endpoint is left; the last answer: {error.message}")

    def _open(self, endpoint: Endpoint, error: EndpointError) -> None:
        _LOG.warning("endpoint %s is left alone: %s", endpoint.label, error.message)
        self._later(endpoint.breaker.pause_s, lambda: self._spawn(self._probe(endpoint)))

    async def _probe(self, endpoint: Endpoint) -> None:
        """Ask an endpoint that was left alone whether it is there."""
        try:
            answer = await self._transport.get(
                f"{endpoint.url}/models",
                await endpoint.headers(),
                self._policy.breaker.probe_s,
                endpoint.spec.proxied,
            )
            there = answer.status not in _NOBODY_THERE
        except (aiohttp.ClientError, TimeoutError):
            there = False
        if there:
            endpoint.breaker.probed()
            self.refresh(endpoint)
        else:
            endpoint.breaker.miss()
            self._later(endpoint.breaker.pause_s, lambda: self._spawn(self._probe(endpoint)))

    def _paced(self, endpoint: Endpoint, tokens: int) -> None:
        """Let an endpoint with a quota of its own rest until the next request is due."""
        now, wait = time.monotonic(), 0.0
        if endpoint.bucket is not None:
            wait = endpoint.bucket.take(1.0, now, reserve=1.0)
        if endpoint.tokens is not None:
            wait = max(wait, endpoint.tokens.take(tokens, now, reserve=tokens))
        if wait > 0:
            self.rest(endpoint, wait)

    def _starved(self) -> None:
        """Look for full lanes soon: calls wait although more could be in flight."""
        if not self._sweeping:
            self._sweeping = True
            self._later(self._policy.lane.settle_s, self._sweep)

    def _sweep(self) -> None:
        """Widen the lanes that are full, and go on while calls wait."""
        self._sweeping = False
        now = time.monotonic()
        for endpoint in list(self.dispatch.alive) if self.dispatch.hungry else ():
            full = endpoint.outstanding >= endpoint.width
            if full and endpoint.breaker.state is State.CLOSED and endpoint.lane.widen(now):
                self.refresh(endpoint)
        if self.dispatch.hungry:
            self._starved()

    def refresh(self, endpoint: Endpoint) -> None:
        """Rank an endpoint anew, and watch whether any is alive."""
        self.dispatch.refresh(endpoint)
        if self.dispatch.alive:
            if self._deadline is not None:
                self._deadline.cancel()
                self._deadline = self.paused = None
                _LOG.warning("an endpoint is back; the run goes on")
        elif self._deadline is None and self.stopped is None:
            seconds = self._policy.timeout.fleet_s
            self.paused = f"no endpoint is alive; waiting up to {seconds:g} s for one to return"
            _LOG.warning("%s", self.paused)
            self._deadline = self._later(seconds, self._give_up)

    def _give_up(self) -> None:
        seconds = self._policy.timeout.fleet_s
        self.stop(
            f"no endpoint came back within {seconds:g} s (limits.fleet_wait_s): start them again "
            "and resume the run"
        )

    def stop(self, message: str) -> None:
        """End the run: no further request is sent, and what waits fails."""
        if self.stopped is None:
            self.stopped = message
            self._announce()
            _LOG.error("%s", message)
        self.dispatch.fail_all(lambda: RunStoppedError(message))

    def _later(self, seconds: float, call: Callable[[], None]) -> asyncio.TimerHandle:
        def run() -> None:
            self._timers.discard(handle)
            call()

        handle = asyncio.get_running_loop().call_later(seconds, run)
        self._timers.add(handle)
        return handle

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
