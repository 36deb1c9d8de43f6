"""What one task may spend, and how it is reported."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.budget import leases as module
from fanfold.backends.budget.budget import Budget, BudgetSettings, LeaseTable, RunBudget
from fanfold.backends.budget.leases import LeaseManager, open_lease, spent_of_lease
from fanfold.backends.budget.spend_log import SpendLogs
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
    over_s = CONFIG.backend.queue_s + 100  # so long ago was the lease over, and the clocks' slack
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
    assert not shelf.lease_path(late.lease["name"]).exists()  # type: ignore[index]
