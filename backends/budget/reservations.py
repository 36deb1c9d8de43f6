"""Reserve before, settle after: budget balance of the process, and item accounts."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Lock
from typing import Any, Final, Protocol

from ..core.errors import BudgetExhaustedError, FanfoldError, JournalError
from ..core.money import Amount, BudgetLimits, TokenPrices
from ..core.protocols import CallLog, PromptCounter, Reservation
from ..core.types import Json, Usage
from .spend_log import SpendLog, read_lease_clock

logger = logging.getLogger(__name__)

_UNLIMITED: Final = 1 << 62
_BLOCKS: Final = 100
"""The largest block is a hundredth of a limit: up to three such blocks count as spent by a kill."""
_SMALLEST: Final = 1 / 64
"""The smallest block, as a share of the largest."""
_RAISE_S: Final = 0.25
"""Blocks grow while the level is raised more often than this, and shrink when it is raised rarely,
so that a killed process leaves what it spends in about a second, and few writes are needed."""
_RARELY: Final = 8
"""Times the interval after which a raise is rare."""
_SLACK: Final = 3
"""Lower the level of the spend log when it is so many blocks above what is in use."""
_POLL_S: Final = 0.1
"""Seconds between checks for waiters that wait in vain; two checks in a row must agree."""
_NEXT_S: Final = 0.01
"""The same interval while waiters are refused one after the other."""

DescribeExhausted = Callable[[Amount], str]
"""Describes which limit is exhausted, given the amount that could not be reserved."""


class ReservationHolder(Protocol):
    """Item that holds reservations.

    Attributes:
        waiting: Number of its calls that wait for a reservation.
    """

    waiting: int

    @property
    def reserved(self) -> Amount:
        """Amount that the item has reserved."""
        ...

    @property
    def gives_back(self) -> bool:
        """Whether the item may release something before any other item does."""
        ...


@dataclass(slots=True, eq=False)
class _Waiter:
    amount: Amount
    loop: asyncio.AbstractEventLoop
    future: asyncio.Future[None]
    holder: ReservationHolder | None
    granted: bool = False

    def grant(self) -> None:
        self.granted = True
        self.loop.call_soon_threadsafe(_set, self.future, None)

    def refuse(self, error: FanfoldError) -> None:
        self.loop.call_soon_threadsafe(_set, self.future, error)


def _set(future: asyncio.Future[None], error: FanfoldError | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)


class BudgetBalance:
    """Budget balance of this process: reservations against limits.

    Args:
        limits: The most that may be spent here.
        log: Spend log of the level; None trusts this process to return what it was lent.
        exhausted: Describes what is exhausted, for the error.
        until: Time of ``read_lease_clock`` after which nothing more is reserved.

    Attributes:
        settled: Spent so far.
        lost: Lent and not returned; counts as spent.
        set_aside: Reserved until the end of the session, such as time; waiting frees none of it.
        unrecorded: Reserved for answers that are paid, and whose items are not recorded yet;
            waiting frees none of it.
    """

    def __init__(
        self,
        limits: BudgetLimits,
        log: SpendLog | None,
        exhausted: DescribeExhausted,
        until: float = float("inf"),
    ) -> None:
        self._most = Amount(*(_UNLIMITED if cap is None else cap for cap in limits.as_tuple()))
        self._limited = [
            name
            for name, cap in zip(Amount._fields, limits.as_tuple(), strict=True)
            if cap is not None
        ]
        self._at = [Amount._fields.index(name) for name in self._limited]
        self._share, self._raised_at = _SMALLEST, float("-inf")
        self._block = self._measure_block()
        self._log, self._exhausted, self._until = log, exhausted, until
        self._level = self._most if log is None else self._unlimited_only()
        self._used = Amount()  # settled, lost and reserved
        self.settled, self.lost, self.set_aside = Amount(), Amount(), Amount()
        self.unrecorded = Amount()
        self._begun, self._fresh = deque[_Waiter](), deque[_Waiter]()
        self._holders = dict[ReservationHolder, None]()
        self._vain, self._poll_at, self._poll_s = False, 0.0, _POLL_S
        self._raising: Amount | None = None
        self._failure: JournalError | None = None
        self._lock = Lock()
        self._thread = ThreadPoolExecutor(1, "budget") if log is not None else None

    def _unlimited_only(self) -> Amount:
        values = self._most.to_json()
        return Amount(**{n: 0 if n in self._limited else v for n, v in values.items()})

    @property
    def left(self) -> Amount:
        """Amount that may still be reserved."""
        return self._most.minus(self._used)

    @property
    def reserved(self) -> Amount:
        """Amount that is reserved and not settled."""
        return self._used.minus(self.settled).minus(self.lost)

    @property
    def returnable(self) -> Amount:
        """Amount that is reserved and may be released."""
        return self.reserved.minus(self.set_aside).minus(self.unrecorded)

    def limited_fields(self, left: Amount) -> Mapping[str, int]:
        """Return the limited fields of an amount."""
        return {name: getattr(left, name) for name in self._limited}

    def add_holder(self, holder: ReservationHolder) -> None:
        """Register an item that makes reservations."""
        with self._lock:
            self._holders[holder] = None

    def remove_holder(self, holder: ReservationHolder) -> None:
        """Remove an item that has ended."""
        with self._lock:
            self._holders.pop(holder, None)

    async def reserve(
        self, amount: Amount, *, begun: bool = False, holder: ReservationHolder | None = None
    ) -> None:
        """Reserve an amount; wait while other holders may release something.

        What an item waits for (a reservation, an endpoint, another item's answer) may be held by
        an item that also waits. No single event shows that all of them wait, so this is polled.

        Args:
            amount: Amount to reserve.
            begun: Whether the item has started: such items come first.
            holder: Item that makes the reservation.

        Raises:
            BudgetExhaustedError: The amount is not available and no holder will release any.
            JournalError: The spend log cannot be written.
        """
        loop = asyncio.get_running_loop()
        with self._lock:
            if self._reserve_if_free(amount, begun):
                return
            waiter = _Waiter(amount, loop, loop.create_future(), holder)
            if holder is not None:
                holder.waiting += 1
            (self._begun if begun else self._fresh).append(waiter)
            self._grant_waiters()
        try:
            while not (await asyncio.wait({waiter.future}, timeout=self._poll_s))[0]:
                self._poll_waiters()
            waiter.future.result()
        except asyncio.CancelledError:
            waiter.future.cancel()
            self._cancel_waiter(waiter)
            raise

    def try_reserve(self, amount: Amount) -> bool:
        """Reserve an amount if it is available and nothing waits; return True on success."""
        with self._lock:
            return self._reserve_if_free(amount, begun=False)

    def settle(self, reserved: Amount, used: Amount) -> None:
        """Turn a reservation into spending; release the rest."""
        with self._lock:
            self.settled = self.settled.plus(used)
            self._used = self._used.replace_part(reserved, used)
            self._vain = False
            self._adjust()
            self._grant_waiters()

    def write_off(self, reserved: Amount) -> None:
        """Count a reservation as spent until a refund corrects it."""
        with self._lock:
            self.lost = self.lost.plus(reserved)
            self._grant_waiters()

    def extend_limits(self, amount: Amount) -> None:
        """Raise the limits by an amount that an earlier session turned out not to have spent."""
        with self._lock:
            self._most = self._most.plus(amount).minimum(Amount(*(_UNLIMITED,) * len(amount)))
            self._grant_waiters()

    def take_over(self, extra: Amount, spent: Amount) -> None:
        """Reserve what an earlier session has spent, and which this one records.

        Args:
            extra: What the earlier session returns; the limits rise by it.
            spent: The amount that was spent.
        """
        with self._lock:
            self._most = self._most.plus(extra).minimum(Amount(*(_UNLIMITED,) * len(extra)))
            self._used = self._used.plus(spent)
            self.unrecorded = self.unrecorded.plus(spent)
            self._adjust()
            self._grant_waiters()

    def keep_spent(self, reserved: Amount, spent: Amount) -> None:
        """Lower a reservation to what was spent, which stays reserved until it is recorded."""
        with self._lock:
            self._used = self._used.replace_part(reserved, spent)
            self.unrecorded = self.unrecorded.plus(spent)
            self._vain = False
            self._adjust()
            self._grant_waiters()

    def write_off_spent(self, spent: Amount) -> None:
        """Count an amount that was kept reserved as spent: the session ends before its items."""
        with self._lock:
            self.unrecorded = self.unrecorded.minus(spent)
            self.lost = self.lost.plus(spent)

    def settle_spent(self, spent: Amount) -> None:
        """Turn an amount that was kept reserved into spending: its items are recorded."""
        with self._lock:
            self.unrecorded = self.unrecorded.minus(spent)
            self.settled = self.settled.plus(spent)

    def refund(self, lost: Amount, used: Amount) -> None:
        """Replace an amount written off by what was spent of it."""
        with self._lock:
            self.lost = self.lost.minus(lost)
            self.settled = self.settled.plus(used)
            self._used = self._used.replace_part(lost, used)
            self._adjust()
            self._grant_waiters()

    def try_spend(self, used: Amount) -> bool | None:
        """Spend an amount that accrues without a request, such as time.

        Returns:
            True: spent; None: not yet, the spend log is being written; False: none is left.
        """
        with self._lock:
            wanted = self._used.plus(used)
            if _within(wanted, self._level):
                self.settled, self._used = self.settled.plus(used), wanted
                self._adjust()
                return True
            if self._failure is not None or not _within(wanted, self._most):
                return False
            self._raise(used)
            return None

    def _cancel_waiter(self, waiter: _Waiter) -> None:
        """Undo what a cancelled wait holds: its position in the queue, or its grant."""
        with self._lock:
            for queue in (self._begun, self._fresh):
                if waiter in queue:
                    queue.remove(waiter)
                    if waiter.holder is not None:
                        waiter.holder.waiting -= 1
                    self._grant_waiters()
                    return
        if waiter.granted:  # the waiter was cancelled before it saw the grant
            self.settle(waiter.amount, Amount())

    def _reserve_if_free(self, amount: Amount, begun: bool) -> bool:
        if self._failure is not None or self._begun or (self._fresh and not begun):
            return False
        if read_lease_clock() > self._until:
            return False
        wanted = self._used.plus(amount)
        if not _within(wanted, self._level):
            return False
        self._used = wanted
        self._adjust()
        return True

    def _grant_waiters(self) -> None:
        """Grant what can be granted, oldest first; items in progress come before others."""
        while queue := self._begun or self._fresh:
            waiter = queue[0]
            if self._failure is not None:
                _first(queue).refuse(self._failure)
                continue
            wanted = self._used.plus(waiter.amount)
            if read_lease_clock() > self._until:
                _first(queue).refuse(BudgetExhaustedError("the lease has expired"))
            elif _within(wanted, self._level):
                _first(queue)
                self._vain, self._poll_s = False, _POLL_S
                self._used = wanted
                self._adjust()
                waiter.grant()
            elif _within(wanted, self._most):
                self._raise(waiter.amount)
                return
            elif any(self.returnable):
                return
            else:
                self._refuse(_first(queue))

    def _refuse(self, waiter: _Waiter) -> None:
        waiter.refuse(BudgetExhaustedError(self._exhausted(waiter.amount)))

    def _poll_waiters(self) -> None:
        """Refuse the first waiter if no holder can release anything in two checks in a row."""
        with self._lock:
            self._grant_waiters()
            queue, now = self._begun or self._fresh, time.monotonic()
            if not queue or now < self._poll_at:
                return
            was, self._vain = self._vain, not self._can_come_back(queue[0].amount)
            if was and self._vain:
                self._vain, self._poll_s = False, _NEXT_S
                self._refuse(_first(queue))
                self._grant_waiters()
            self._poll_at = now + self._poll_s

    def _can_come_back(self, amount: Amount) -> bool:
        """Return True if a holder may release something, which a waiting holder does not."""
        if _within(self._used.plus(amount), self._most):
            return True  # the spend log is being written
        if any(holder.gives_back for holder in self._holders):
            return True
        loose = self.returnable
        for holder in self._holders:
            loose = loose.minus(holder.reserved)
        return any(loose)  # a worker's lease

    # -- the spend log -------------------------------------------------------------------

    def _adjust(self) -> None:
        """Raise the level ahead of need; lower it where it is far above."""
        if self._log is None or self._raising is not None:
            return
        for at in self._at:
            gap, block = self._level[at] - self._used[at], self._block[at]
            if 2 * gap < block and self._level[at] < self._most[at]:
                self._raise(Amount())
                return
            if gap > _SLACK * block and not self._begun and not self._fresh:
                self._lower()
                return

    def _measure_block(self) -> Amount:
        """Return by how much the level is raised above what is in use."""
        return Amount(*(math.ceil(value / _BLOCKS * self._share) for value in self._most))

    def _adapt_block(self) -> None:
        """Choose the block size by the time since the last raise."""
        now = time.monotonic()
        since, self._raised_at = now - self._raised_at, now
        if since < _RAISE_S:
            self._share = min(2 * self._share, 1.0)
        elif since > _RARELY * _RAISE_S:
            self._share = max(self._share / 2, _SMALLEST)
        self._block = self._measure_block()

    def _raise(self, amount: Amount) -> None:
        if self._raising is None and self._thread is not None:
            self._adapt_block()
            goal = self._used.plus(amount).plus(self._block)
            self._raising = goal.maximum(self._level).minimum(self._most)
            self._thread.submit(self._finish_raise, self._raising)

    def _finish_raise(self, level: Amount) -> None:
        failure = self._write_line({"level": self.limited_fields(level)}, sync=True)
        with self._lock:
            self._raising, self._failure = None, failure or self._failure
            if failure is None:
                self._level = level
            self._grant_waiters()

    def _lower(self) -> None:
        """Lower the level; the old one stays valid on disk until the new one is written."""
        assert self._thread is not None
        self._level = self._used.plus(self._block).minimum(self._level)
        self._thread.submit(
            self._write_line, {"level": self.limited_fields(self._level)}, sync=False
        )

    def _write_line(self, line: Mapping[str, Json], *, sync: bool) -> JournalError | None:
        assert self._log is not None
        try:
            self._log.write(line, sync=sync)
        except JournalError as error:
            logger.warning("%s", error.message)
            return error
        return None

    async def append_line(self, line: Mapping[str, Json], *, sync: bool) -> None:
        """Append another part's line to the spend log, after all earlier lines.

        Raises:
            JournalError: The line cannot be written.
        """
        if self._thread is None:
            return
        noting = asyncio.wrap_future(self._thread.submit(self._write_line, line, sync=sync))
        if (failure := await noting) is not None:
            raise failure

    async def aclose(self) -> None:
        """Write what was spent, and close the spend log.

        Raises:
            JournalError: The line cannot be written.
        """
        if self._thread is None or self._log is None:
            return
        try:
            spent = self.settled.plus(self.reserved)
            await self.append_line({"settled": spent.to_json()}, sync=True)
        finally:
            self._thread.submit(self._log.close)  # after a line whose caller was cancelled
            self._thread.shutdown(wait=False)


def _first(queue: deque[_Waiter]) -> _Waiter:
    """Remove and return the oldest waiter of a queue."""
    waiter = queue.popleft()
    if waiter.holder is not None:
        waiter.holder.waiting -= 1
    return waiter


def _within(amount: Amount, most: Amount) -> bool:
    return (
        amount.tokens <= most.tokens
        and amount.nano_usd <= most.nano_usd
        and amount.requests <= most.requests
        and amount.node_ms <= most.node_ms
    )


_ANSWERS: Final = 1024
_LEAST_ANSWERS: Final = 200
_MOST_ANSWERS: Final = 0.995
_ANSWER_MARGIN: Final = 1.25


class AnswerLengths:
    """A length that hardly any answer exceeds, learnt from the latest ones."""

    def __init__(self) -> None:
        self._latest = deque[int](maxlen=_ANSWERS)
        self._most: int | None = None
        self._new = 0

    def add(self, tokens: int) -> None:
        """Learn from an answer."""
        self._latest.append(tokens)
        self._new += 1

    @property
    def most(self) -> int | None:
        """Return the length in tokens; None if there were too few answers."""
        if len(self._latest) < _LEAST_ANSWERS:
            return None
        if self._most is None or self._new >= _LEAST_ANSWERS:
            ranked, self._new = sorted(self._latest), 0
            longest = ranked[int(_MOST_ANSWERS * len(ranked))]
            self._most = math.ceil(_ANSWER_MARGIN * longest)
        return self._most


_REPAIR_TOKENS: Final = 512
"""Tokens of the repair prompt, besides the answer that is sent back."""


class ItemAccount:
    """Budget account of one item.

    Args:
        balance: Balance that the account draws on.
        prices: Prices of tokens.
        repairs: How often an answer may be sent back. Repairs are reserved with the first
            request, so that an item that has started can finish.
        count: Counts prompts as the model does, used when the budget is short; or None.
        lengths: Lengths of the answers of all items, used when the budget is short.

    Attributes:
        waiting: Calls of the item that wait for a reservation.
    """

    __slots__ = (
        "_asking",
        "_balance",
        "_beginning",
        "_begun",
        "_closed",
        "_count",
        "_known",
        "_lengths",
        "_lock",
        "_log",
        "_pool",
        "_prices",
        "_repairs",
        "_reservations",
        "waiting",
    )

    def __init__(
        self,
        balance: BudgetBalance,
        prices: TokenPrices,
        repairs: int,
        count: PromptCounter | None = None,
        lengths: AnswerLengths | None = None,
    ) -> None:
        self._balance, self._prices, self._count = balance, prices, count
        self._lengths = lengths or AnswerLengths()
        self._repairs, self._asking = repairs, 0
        self._beginning = self._begun = self._known = self._closed = False
        self._pool, self._lock = Amount(), Lock()
        self._reservations = set[_Reservation]()
        self._log: CallLog | None = None
        self.waiting = 0

    @property
    def reserved(self) -> Amount:
        """Amount that the item has reserved, for requests in flight and for repairs."""
        total = self._pool
        for reservation in tuple(self._reservations):
            total = total.plus(reservation.amount)
        return total

    @property
    def gives_back(self) -> bool:
        """Whether the item may release something before any other item does.

        An item without a call in progress needs nothing from others, and ends.
        """
        log = self._log
        if log is not None and log.blocked:
            return False
        if log is not None and log.calls:
            return log.goes_on
        return any(self.reserved)

    async def reserve(
        self,
        most: Usage,
        body: Mapping[str, Any],
        log: CallLog | None = None,
        *,
        shorten: bool = False,
    ) -> Reservation:
        """Reserve what one request may cost; wait while others may release something.

        Args:
            most: Upper bound of its tokens.
            body: The request, for an exact count when the budget is short.
            log: The item's calls, which show if it can release reservations while it waits.
            shorten: Whether a shorter answer may be reserved if the rest does not cover this one.

        Raises:
            BudgetExhaustedError: The budget is too small and no holder will release any.
            JournalError: The spend log cannot be written.
        """
        self._asking += 1
        if log is not None and not self._known:
            self._log, self._known = log, True
            self._balance.add_holder(self)
        try:
            if self._beginning:
                usage = await self._reserve_further(most, body, shorten=shorten)
            else:
                self._beginning = True
                try:
                    usage = await self._reserve_first(most, body, shorten=shorten)
                finally:
                    self._beginning = self._begun
            return self._make_reservation(usage)
        finally:
            self._asking -= 1
            self._forget()

    def _make_reservation(self, usage: Usage) -> _Reservation:
        reservation = _Reservation(usage, self._prices.amount(usage), self)
        self._reservations.add(reservation)
        return reservation

    def end(self, reservation: _Reservation, used: Amount) -> None:
        """Settle one request."""
        self._reservations.discard(reservation)
        self._balance.settle(reservation.amount, used)
        self._forget()

    def settle_answer(self, reservation: _Reservation, usage: Usage) -> None:
        """Settle a request by the usage that its answer reports."""
        if usage.completion is not None:
            self._lengths.add(usage.completion)
        self.end(reservation, self._prices.amount(usage))

    async def _reserve_first(self, most: Usage, body: Mapping[str, Any], *, shorten: bool) -> Usage:
        """Reserve the first request and its repairs; return the usage they are based on."""
        usage, repairs = most, self._sum_repairs(most)
        if not self._balance.try_reserve(self._prices.amount(usage).plus(repairs)):
            usage = await self._count_usage(most, body)
            repairs = self._sum_repairs(usage)
            if shorten and self._is_short(self._prices.amount(usage).plus(repairs)):
                usage = self._shorten(usage)
                repairs = self._sum_repairs(usage)
            await self._balance.reserve(self._prices.amount(usage).plus(repairs), holder=self)
        self._begun = True
        with self._lock:
            self._pool = self._pool.plus(repairs)
        if self.waiting or self._closed:
            self._release_pool()
        return usage

    async def _reserve_further(
        self, most: Usage, body: Mapping[str, Any], *, shorten: bool
    ) -> Usage:
        """Reserve a further request, from the amount reserved for repairs if it is enough."""
        if self._draw_from_pool(self._prices.amount(most)):
            return most
        usage = await self._count_usage(most, body)
        if shorten and self._is_short(self._prices.amount(usage)):
            usage = self._shorten(usage)
        if not self._draw_from_pool(self._prices.amount(usage)):
            # A waiting item holds no repairs; otherwise two items could wait for each other.
            self._release_pool()
            amount = self._prices.amount(usage)
            await self._balance.reserve(amount, begun=self._begun, holder=self)
        return usage

    async def _count_usage(self, most: Usage, body: Mapping[str, Any]) -> Usage:
        """Return an upper bound of a request's usage; count the prompt if a counter is set."""
        prompt = None if self._count is None else await self._count(body)
        return most if prompt is None else Usage(prompt, most.completion)

    def _is_short(self, amount: Amount) -> bool:
        """Return True if the rest of the budget lacks now what a shorter answer takes less of."""
        rest = self._balance.left.minus(amount)
        return min(rest.tokens, rest.nano_usd) < 0

    def _shorten(self, usage: Usage) -> Usage:
        """Limit the answer of a request to what hardly any answer exceeds."""
        most, asked = self._lengths.most, usage.completion
        if most is None or asked is None or asked <= most:
            return usage
        return Usage(usage.prompt, most)

    def _sum_repairs(self, usage: Usage) -> Amount:
        prompt, answer, total = usage.prompt or 0, usage.completion or 0, Amount()
        for _ in range(self._repairs):
            prompt += answer + _REPAIR_TOKENS
            total = total.plus(self._prices.amount(Usage(prompt, answer)))
        return total

    def try_reserve(self, most: Usage) -> Reservation | None:
        """Reserve one further request if the budget has enough at once."""
        if not self._balance.try_reserve(self._prices.amount(most)):
            return None
        return self._make_reservation(most)

    def _draw_from_pool(self, amount: Amount) -> bool:
        """Take a request from the amount reserved for repairs, if it is enough."""
        with self._lock:
            rest = self._pool.minus(amount)
            if min(rest) < 0:
                return False
            self._pool = rest
            return True

    def close(self) -> None:
        """Release the amount reserved for repairs; the item has ended."""
        self._closed = True
        self._release_pool()
        self._forget()

    def _forget(self) -> None:
        """Deregister once the item has ended and none of its requests is open."""
        if self._closed and self._known and not self._reservations and not self._asking:
            self._known = False
            self._balance.remove_holder(self)

    def _release_pool(self) -> None:
        with self._lock:
            pool, self._pool = self._pool, Amount()
        if any(pool):
            self._balance.settle(pool, Amount())


class _Reservation:
    """Reservation for one request."""

    __slots__ = ("_account", "_open", "amount", "usage")

    def __init__(self, usage: Usage, amount: Amount, account: ItemAccount) -> None:
        self.usage, self._account = usage, account
        self.amount, self._open = amount, True

    def settle(self, usage: Usage) -> None:
        if usage.prompt is None or usage.completion is None:
            self.settle_all()
        elif self._open:
            self._open = False
            self._account.settle_answer(self, usage)

    def settle_all(self) -> Usage:
        self._end(self.amount)
        return self.usage

    def release(self, *, sent: bool) -> None:
        self._end(Amount(requests=int(sent)))

    def _end(self, used: Amount) -> None:
        if self._open:
            self._open = False
            self._account.end(self, used)
