"""The end game: when nothing waits any more, stragglers are asked a second time elsewhere.

The first good answer counts and the other request is cancelled. To hedge a fixed share all along
would spend the second requests before the tail comes.
"""

from __future__ import annotations

import asyncio
import inspect
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from .balancer import Dispatcher
from .charge import Charge
from .endpoint import Endpoint
from .failures import Failure
from .pacing import Pacer, estimate
from .policy import HedgePolicy

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
