"""What one task may spend, and how it is reported."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.budget import leases as module
from fanfold.backends.budget.budget import Budget, BudgetSettings, LeaseTable, RunBudget
from fanfold.backends.budget.leases import LeaseManager, open_lease, spent_of_lease
from fanfold.backends.budget.spend_log import CLOCK_SKEW_S, SpendLogs, read_lease_clock
from fanfold.backends.core.errors import BudgetExhaustedError
from fanfold.backends.core.messages import WALLTIME_REASON, ShardTask, own_version
from fanfold.backends.core.money import NO_PRICES, Amount, BudgetLimits
from fanfold.backends.workers.testing import make_task as rehearsal
from fanfold.configs.loader import load_config
from fanfold.graphs.worker import WorkerResources, run_task

CONFIG = load_config(
    {"task": {"prompt": "{x}"}, "endpoints": {"urls": ["http://127.0.0.1:9/v1"]}}
).config


def order_in(folder: Path, **changes: Any) -> ShardTask:
    fields: dict[str, Any] = {
        "shard": "0-1",
        "attempt": 0,
        "fanfold": own_version(),
        "run": {"id": "run", "model": "m", "simulated": False, "fingerprint": "00", "session": 1},
        "settings": {},
        "items": [(0, "a", {"x": 1}, None)],
        "urls": None,
        "journal": str(folder / "journal"),
        "streams": 1,
        "deadline_s": 60.0,
        "lease": {"name": "1.0-1.0", "caps": {"tokens": 100}, "booked": True},
    }
    return ShardTask(**fields | changes)


async def test_an_order_that_is_delivered_twice_spends_its_lease_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second waits for the first, may spend nothing, and tells nothing of what was spent."""
    monkeypatch.setattr(module, "_POLL_S", 0.01)
    order, entered = order_in(tmp_path), asyncio.Event()

    async def second() -> Amount | None:
        async with open_lease(order, CONFIG) as budget:
            entered.set()
            assert budget is not None
            with pytest.raises(BudgetExhaustedError):
                await budget.balance.reserve(Amount(1, 1))
            return spent_of_lease(budget)

    async with open_lease(order, CONFIG) as budget:
        assert budget is not None
        await budget.balance.reserve(Amount(1, 60))
        other = asyncio.create_task(second())
        await asyncio.sleep(0.05)
        assert not entered.is_set()
        budget.balance.settle(Amount(1, 60), Amount(1, 40))
        used = spent_of_lease(budget)
        assert used is not None
        assert used.tokens == 40
    assert await other is None


async def test_a_refused_order_tells_nothing_of_what_was_spent(tmp_path: Path) -> None:
    """A coordinator that learned "nothing" would lend the same again."""
    bag = WorkerResources()
    order = order_in(tmp_path, fanfold="another")
    summary = await run_task(order.to_json(), bag)
    await bag.aclose()
    assert summary["error"]["class"] == "BackendError"
    assert (summary["lease"], summary["used"]) == (None, None)


async def test_an_order_whose_lease_was_given_back_is_not_begun(tmp_path: Path) -> None:
    """An engine may start it however late: then the coordinator may have lent it to others."""
    journal = tmp_path / "journal"
    journal.mkdir()
    asked = rehearsal("0-2", [{}, {}], journal, tariff=NO_PRICES.to_json())
    budget_terms, shelf = (
        BudgetSettings(BudgetLimits.from_settings(requests=100), NO_PRICES),
        SpendLogs(tmp_path / "budget", "run"),
    )
    budget = Budget(budget_terms, Amount(), shelf.create(shelf.session_path(1)))
    leases = LeaseTable(budget.balance, shelf, {})
    over_s = CONFIG.backend.queue_s + CLOCK_SKEW_S + 100  # how long the lease is over
    asked = replace(asked, deadline_s=-over_s)
    lender = LeaseManager(RunBudget(budget, leases, shelf), CONFIG, "m", lambda: 1)
    late = replace(asked, lease=await lender.lend(asked))
    assert budget.balance.left.requests < 100
    lender.mark_lost("0-2")
    await leases.recover_lost()
    assert budget.balance.left.requests == 100  # never begun

    async with open_lease(late, CONFIG) as own:
        assert own is not None
        with pytest.raises(BudgetExhaustedError):
            await own.balance.reserve(Amount(1))
    bag = WorkerResources()
    summary = await run_task(late.to_json(), bag)
    await bag.aclose()
    await budget.balance.aclose()
    assert summary["error"] is None
    assert sum(summary["tally"].values()) == 0
    assert summary["stopped"].startswith(WALLTIME_REASON)  # the coordinator sends the shard again
    assert summary["used"] is None
    state = shelf.read_lease(late.lease["name"])  # type: ignore[index]
    assert state.settled == Amount()  # taken back, for good


class Lent:
    """A lender with 100 requests, and a task that holds a lease."""

    def __init__(self, folder: Path, term: float) -> None:
        self.logs = SpendLogs(folder / "budget", "run")
        settings = BudgetSettings(BudgetLimits.from_settings(requests=100), NO_PRICES)
        self.budget = Budget(settings, Amount(), self.logs.create(self.logs.session_path(1)))
        self.leases = LeaseTable(self.budget.balance, self.logs, {})
        self.lender = LeaseManager(
            RunBudget(self.budget, self.leases, self.logs), CONFIG, "m", lambda: 1
        )
        self.task = order_in(folder, deadline_s=term, tariff=NO_PRICES.to_json())

    async def lend(self) -> int:
        """Lend the task a part; return its requests."""
        self.task = replace(self.task, lease=await self.lender.lend(self.task))
        return 100 - self.budget.balance.left.requests

    async def lose(self) -> int:
        """Mark the worker as lost, and return what is left after a recovery."""
        self.lender.mark_lost("0-1")
        await self.leases.recover_lost()
        return self.budget.balance.left.requests


CLOCKS = [
    pytest.param(-7200.0, 0.0, id="hours behind"),
    pytest.param(-300.0, 0.0, id="minutes behind"),
    pytest.param(300.0, 0.0, id="minutes ahead"),
    pytest.param(0.0, -3600.0, id="set back while it works"),
    pytest.param(0.0, 3600.0, id="set forward while it works"),
]


@pytest.mark.parametrize(("skew", "jump"), CLOCKS)
async def test_no_clock_lets_a_lease_be_spent_after_its_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float, jump: float
) -> None:
    """The holder's clock is wrong, or is set; its lease ends in time all the same."""
    lent, real = Lent(tmp_path, term=1.0), time.time
    amount = await lent.lend()
    assert 2 <= amount < 100
    monkeypatch.setattr(time, "time", lambda: real() + skew)
    async with open_lease(lent.task, CONFIG) as held:
        assert held is not None
        await held.balance.reserve(Amount(1))
        monkeypatch.setattr(time, "time", lambda: real() + skew + jump)
        assert await lent.lose() == 100 - amount  # it may still spend
        await held.balance.reserve(Amount(1))
        async with asyncio.timeout(60):
            while await lent.lose() == 100 - amount:  # noqa: ASYNC110 - time passes
                await asyncio.sleep(0.02)
        assert 98 - held.balance._block.requests <= lent.budget.balance.left.requests <= 98
        with pytest.raises(BudgetExhaustedError, match="the lease has expired"):
            await held.balance.reserve(Amount(1))
    await lent.budget.balance.aclose()


@pytest.mark.parametrize(("skew", "jump"), CLOCKS)
async def test_a_lease_that_was_taken_back_is_void_whatever_the_clock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, skew: float, jump: float
) -> None:
    """Nobody had received it; who does later, finds it settled."""
    lent, real = Lent(tmp_path, term=60.0), time.time
    await lent.lend()
    assert await lent.lose() == 100
    monkeypatch.setattr(time, "time", lambda: real() + skew + jump)
    async with open_lease(lent.task, CONFIG) as held:
        assert held is not None
        with pytest.raises(BudgetExhaustedError):
            await held.balance.reserve(Amount(1))
        assert spent_of_lease(held) is None
    await lent.budget.balance.aclose()


async def test_time_before_the_task_begins_counts(tmp_path: Path) -> None:
    """Opening endpoints may take long; the term runs from the receipt."""
    lent = Lent(tmp_path, term=60.0)
    await lent.lend()
    async with open_lease(lent.task, CONFIG, received=read_lease_clock() - 61) as held:
        assert held is not None
        with pytest.raises(BudgetExhaustedError):
            await held.balance.reserve(Amount(1))
    await lent.budget.balance.aclose()


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="the system has no such clock")
async def test_a_lease_expires_while_its_host_is_suspended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the monotonic clocks only one goes on; the coordinator took the lease back meanwhile."""
    lent, real, slept = Lent(tmp_path, term=60.0), time.clock_gettime, [0.0]

    def read(clock: int) -> float:
        return real(clock) + (slept[0] if clock == time.CLOCK_BOOTTIME else 0.0)

    monkeypatch.setattr(time, "clock_gettime", read)
    await lent.lend()
    async with open_lease(lent.task, CONFIG) as held:
        assert held is not None
        await held.balance.reserve(Amount(1))
        slept[0] = 61.0
        with pytest.raises(BudgetExhaustedError, match="expired"):
            await held.balance.reserve(Amount(1))
    await lent.budget.balance.aclose()


@pytest.mark.parametrize("row", [{"x": "gold"}, {"y": "no column of the prompt"}])
async def test_a_lease_covers_the_examples(tmp_path: Path, row: dict[str, Any]) -> None:
    async def lend(name: str, **task: Any) -> int:
        config = load_config(
            {
                "task": {"prompt": "Judge {x}"} | task,
                "endpoints": {"urls": ["http://127.0.0.1:9/v1"]},
            }
        ).config
        logs = SpendLogs(tmp_path / name, "run")
        settings = BudgetSettings(BudgetLimits.from_settings(tokens=10**9), NO_PRICES)
        budget = Budget(settings, Amount(), logs.create(logs.session_path(1)))
        leases = LeaseTable(budget.balance, logs, {})
        lender = LeaseManager(RunBudget(budget, leases, logs), config, "m", lambda: 1)
        lease = await lender.lend(order_in(tmp_path, items=[(0, "a", row, None)]))
        await budget.balance.aclose()
        assert lease is not None
        caps: Any = lease["caps"]
        return int(caps["tokens"])

    examples = [{"x": "a long story " * 100, "output": "dull"}] * 3
    assert await lend("few", examples=examples) > await lend("none") + 3 * 100
