"""Reservations, leases and spend logs: a cap holds in all cases, and nothing leaks."""

from __future__ import annotations

import asyncio
import random
import tempfile
from io import FileIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.backends.budget.budget import Budget, BudgetSettings, LeaseTable
from fanfold.backends.budget.spend_log import CLOCK_SKEW_S, Lease, SpendLogs
from fanfold.backends.core.errors import BudgetExhaustedError, JournalError
from fanfold.backends.core.money import NANO_PER_USD, Amount, BudgetLimits, TokenPrices
from fanfold.backends.core.types import Usage

TARIFF = TokenPrices.from_usd(prompt=1.0, completion=2.0)


def tokens(count: int) -> Amount:
    return Amount(1, count, 0)


def shelf_in(folder: Path) -> SpendLogs:
    return SpendLogs(folder / "budget", "run")


def opened(shelf: SpendLogs, life: int, caps: BudgetLimits) -> Budget:
    before = shelf.total_spent({})
    return Budget(BudgetSettings(caps, TARIFF), before, shelf.create(shelf.session_path(life)))


async def killed(budget: Budget) -> None:
    """Leave things on disk as a process that ends now; what its thread was given is written."""
    assert budget.balance._thread is not None
    await asyncio.to_thread(budget.balance._thread.shutdown)
    assert budget.balance._log is not None
    budget.balance._log.close()


STEP = st.tuples(
    st.sampled_from(["reserve", "settle", "lend", "back", "lose", "late"]),
    st.integers(0, 40),
    st.floats(0, 1),
)
LIFE = st.tuples(st.lists(STEP, max_size=25), st.booleans())


class Trial:
    """One session: its steps, and its real spending."""

    def __init__(
        self, shelf: SpendLogs, life: int, cap: int, away: dict[str, tuple[int, int]]
    ) -> None:
        self.budget = opened(shelf, life, BudgetLimits(tokens=cap))
        self.leases = LeaseTable(self.budget.balance, shelf, shelf.unreturned_leases(0.0))
        self.life, self.away = life, away
        self.spent, self.open = 0, list[int]()
        self.out = dict[str, tuple[int, int]]()

    async def step(self, number: int, what: str, size: int, share: float) -> None:
        await getattr(self, what)(f"{self.life}.{number}", size, share)

    async def reserve(self, _: str, size: int, __: float) -> None:
        if size > self.budget.balance.left.tokens:
            assert not self.budget.balance.try_reserve(tokens(size))
        else:
            await self.budget.balance.reserve(tokens(size))
            self.open.append(size)

    async def settle(self, _: str, __: int, share: float) -> None:
        if self.open:
            reserved = self.open.pop()
            used = int(share * reserved)
            self.budget.balance.settle(tokens(reserved), tokens(used))
            self.spent += used

    async def lend(self, name: str, size: int, share: float) -> None:
        if size <= self.budget.balance.left.tokens:
            await self.leases.lend(name, Lease(tokens(size), 1e12))
            self.out[name] = size, int(share * size)
            self.spent += int(share * size)  # the worker spends it, even if unreported

    async def back(self, *_: Any) -> None:
        if self.out:
            name, lent = self.out.popitem()
            await self.leases.return_lease(name, tokens(lent[1]))
            await self.leases.return_lease(name, tokens(lent[1]))

    async def lose(self, *_: Any) -> None:
        if self.out:
            name, lent = self.out.popitem()
            self.leases.mark_lost(name)
            self.away[name] = lent

    async def late(self, *_: Any) -> None:
        if self.away:
            name, lent = self.away.popitem()
            await self.leases.return_lease(name, tokens(lent[1]))

    async def end(self, crash: bool) -> None:
        self.away |= self.out
        if crash:
            self.spent += sum(self.open)  # all in flight may have been paid
            await killed(self.budget)
            return
        for size in self.open:
            self.budget.balance.settle(tokens(size), Amount())
        self.leases.mark_all_lost()
        await self.budget.balance.aclose()


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 400), st.lists(LIFE, min_size=1, max_size=4))
def test_a_cap_holds_over_lives_crashes_and_leases(cap: int, lives: list[Any]) -> None:
    """Real spending stays below that of the spend logs, and that below the cap."""
    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(_live(SpendLogs(Path(folder) / "budget", "run"), cap, lives))


async def _live(shelf: SpendLogs, cap: int, lives: list[Any]) -> None:
    spent, away = 0, dict[str, tuple[int, int]]()
    for life, (steps, crash) in enumerate(lives, 1):
        trial = Trial(shelf, life, cap, away)
        balance = trial.budget.balance
        for number, (what, size, share) in enumerate(steps):
            await trial.step(number, what, size, share)
            assert balance.settled.tokens + balance.reserved.tokens + balance.lost.tokens <= cap
            assert spent + trial.spent + sum(trial.open) <= cap
        await trial.end(crash)
        spent += trial.spent
        said = shelf.total_spent({}, now=0.0).tokens
        assert spent <= said <= cap
        if not any(crashed for _, crashed in lives[:life]):
            assert said == spent + sum(lent - used for lent, used in away.values())


async def test_many_streams_use_a_budget_up_and_never_pass_it(tmp_path: Path) -> None:
    """2,000 streams: at every moment settled and reserved stay below, and 98 % are used."""
    cap, shelf, dice = 1_000_000, shelf_in(tmp_path), random.Random(4)
    budget, worst = opened(shelf, 1, BudgetLimits(tokens=cap)), 0

    async def stream() -> None:
        nonlocal worst
        while True:
            account = budget.open_account()
            try:
                hold = await account.reserve(Usage(dice.randint(300, 900), 200), {})
            except BudgetExhaustedError:
                return
            worst = max(worst, budget.balance.settled.tokens + budget.balance.reserved.tokens)
            await asyncio.sleep(0)
            if dice.random() < 0.1:
                hold.release(sent=True)
            elif dice.random() < 0.1:
                hold.settle_all()
            else:
                hold.settle(Usage(dice.randint(80, 90), dice.randint(1, 200)))
            account.close()

    async with asyncio.TaskGroup() as group:
        for _ in range(2000):
            group.create_task(stream())
    await budget.balance.aclose()
    assert budget.balance.reserved.tokens == 0
    assert worst <= cap
    assert 0.98 * cap <= budget.balance.settled.tokens <= cap
    assert shelf.total_spent({}) == budget.balance.settled


async def test_the_level_is_on_disk_before_it_is_spent(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    budget = opened(shelf, 1, BudgetLimits(tokens=1000, nano_usd=NANO_PER_USD))
    for _ in range(30):
        await budget.balance.reserve(Amount(1, 20, 10**7))
        on_disk = shelf.total_spent({})
        assert on_disk.tokens >= budget.balance.reserved.tokens
        assert on_disk.nano_usd >= budget.balance.reserved.nano_usd
    await killed(budget)
    assert shelf.total_spent({1: Amount(7, 0, 0)}).requests == 7  # no cap: the journal counts


async def test_the_level_falls_when_much_was_reserved_and_little_spent(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    budget = opened(shelf, 1, BudgetLimits(tokens=1000))
    await budget.balance.reserve(tokens(800))
    budget.balance.settle(tokens(800), tokens(20))
    await killed(budget)
    assert 20 <= shelf.total_spent({}).tokens <= 40


async def test_a_kill_leaves_little_of_a_large_limit_in_doubt(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    budget = opened(shelf, 1, BudgetLimits(tokens=10**6))
    for _ in range(3):
        await budget.balance.reserve(tokens(400))
        budget.balance.settle(tokens(400), tokens(300))
    await killed(budget)
    assert 900 <= shelf.total_spent({}).tokens <= 900 + 10**6 // 1000


async def test_fast_spending_needs_few_lines(tmp_path: Path) -> None:
    """Steps grow to a hundredth of the limit."""
    shelf = shelf_in(tmp_path)
    budget = opened(shelf, 1, BudgetLimits(tokens=10**6))
    for _ in range(2500):
        await budget.balance.reserve(tokens(400))
        budget.balance.settle(tokens(400), tokens(400))
    await killed(budget)
    assert shelf.session_path(1).read_bytes().count(b"level") <= 300


async def test_a_lost_lease_counts_until_its_book_proves_less(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    budget = opened(shelf, 1, BudgetLimits(tokens=1000))
    leases = LeaseTable(budget.balance, shelf, {})
    for name, until in (("a", 100.0), ("b", 100.0), ("c", 100.0)):
        await leases.lend(name, Lease(tokens(200), until, has_log=True))
    end = 100 + 2 * CLOCK_SKEW_S
    book = shelf.create(shelf.lease_path("a"))
    book.write({"until": 9500.0, "term": 60.0}, sync=False)
    book.write({"level": {"tokens": 30}}, sync=True)
    done = shelf.create(shelf.lease_path("c"))
    done.write({"settled": tokens(50).to_json()}, sync=True)
    book.close()
    done.close()
    await killed(budget)
    assert shelf.total_spent({}, now=120.0).tokens >= 200 + 200 + 50
    assert shelf.unreturned_leases(now=end)["b"].tokens == 200
    within = shelf.unreturned_leases(now=end + 1)  # b was never begun in time, a may still go on
    assert {name: amount.tokens for name, amount in within.items()} == {"a": 200, "b": 0, "c": 50}
    over = 9500 + 60 + CLOCK_SKEW_S  # twice the term, and what clocks may differ by
    assert shelf.unreturned_leases(now=over - 1)["a"].tokens == 200
    assert shelf.unreturned_leases(now=over)["a"].tokens == 30


async def test_who_is_refused_learns_what_is_missing(tmp_path: Path) -> None:
    budget = opened(shelf_in(tmp_path), 1, BudgetLimits.from_settings(usd=0.5, tokens=10**9))
    await budget.balance.reserve(Amount(1, 10, 4 * 10**8))
    budget.balance.settle(Amount(1, 10, 4 * 10**8), Amount(1, 10, 4 * 10**8))
    with pytest.raises(
        BudgetExhaustedError, match=r"0.40 USD are spent of 0.50 USD.*take 0.20 USD"
    ):
        await budget.balance.reserve(Amount(1, 5, 2 * 10**8))
    assert not budget.can_carry(Amount(1, 5, 2 * 10**8))
    assert budget.can_carry(Amount(1, 5, 10**8))
    await budget.balance.aclose()


async def test_a_pause_waits_while_calls_in_flight_may_free_enough(tmp_path: Path) -> None:
    budget = opened(shelf_in(tmp_path), 1, BudgetLimits(tokens=100))
    await budget.balance.reserve(tokens(80))
    waiting = asyncio.ensure_future(budget.balance.reserve(tokens(60)))
    await asyncio.sleep(0.05)
    assert not waiting.done()
    budget.balance.settle(tokens(80), tokens(30))
    await waiting
    further = asyncio.ensure_future(budget.balance.reserve(tokens(60)))
    await asyncio.sleep(0)
    further.cancel()
    await asyncio.gather(further, return_exceptions=True)
    budget.balance.settle(tokens(60), tokens(60))
    with pytest.raises(BudgetExhaustedError):
        await budget.balance.reserve(tokens(11))
    await budget.balance.aclose()


async def test_an_item_is_begun_only_with_what_its_repairs_may_take(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    terms = BudgetSettings(BudgetLimits(tokens=1000), TARIFF, repairs=1)
    budget = Budget(terms, Amount(), shelf.create(shelf.session_path(1)))
    account = budget.open_account()
    first = await account.reserve(Usage(100, 50), {})
    reserved = budget.balance.reserved
    assert reserved.requests == 2
    assert reserved.tokens > 2 * 150
    first.settle(Usage(90, 40))
    second = await account.reserve(Usage(150, 50), {})
    assert budget.balance.reserved.tokens < reserved.tokens
    second.settle(Usage(140, 50))
    second.settle_all()
    account.close()
    assert budget.balance.reserved == Amount()
    assert budget.balance.settled.tokens == 130 + 190
    await budget.balance.aclose()


async def test_a_book_that_cannot_be_written_stops_spending(tmp_path: Path) -> None:
    budget = opened(shelf_in(tmp_path), 1, BudgetLimits(tokens=100))
    assert budget.balance._log is not None
    budget.balance._log.close()
    budget.balance._log._file = FileIO("/dev/full", "wb")
    for _ in range(2):
        with pytest.raises(JournalError, match="No space left"):
            await budget.balance.reserve(tokens(10))
    await killed(budget)


def test_money_is_exact_and_rounded_up() -> None:
    tariff = TokenPrices.from_usd(prompt=0.15, cached=0.075, completion=0.6, node_hour=1.0)
    assert tariff.nano_usd(Usage(1000, 100, 400)) == 600 * 150 + 400 * 75 + 100 * 600
    assert TokenPrices.from_usd(prompt=0.0001).nano_usd(Usage(1, 0)) == 1
    assert tariff.node_amount(3_600_000).nano_usd >= NANO_PER_USD
    assert BudgetLimits.from_settings(usd=0.1).nano_usd == 10**8
    assert not BudgetLimits().has_any


async def test_what_others_took_does_not_lower_what_a_prompt_may_take(tmp_path: Path) -> None:
    """A hundred short prompts are no promise: the next one may be a token a byte."""
    budget = opened(shelf_in(tmp_path), 1, BudgetLimits(tokens=10**6))
    for _ in range(100):
        (await budget.open_account().reserve(Usage(1000, 50), {})).settle(Usage(10, 1))
    hold = await budget.open_account().reserve(Usage(1000, 50), {})
    assert budget.balance.reserved.tokens == 1050
    hold.settle_all()
    await budget.balance.aclose()


async def test_a_probe_is_spent_although_no_item_records_it(tmp_path: Path) -> None:
    shelf = shelf_in(tmp_path)
    budget = opened(shelf, 1, BudgetLimits(tokens=1000))
    budget.charge_probe(Usage(8, 1))
    assert budget.report()["tokens"]["spent"] == 9
    await budget.balance.aclose()
    assert shelf.total_spent({}).tokens == 9  # in doubt for the next session
