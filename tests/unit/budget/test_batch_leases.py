"""Leases of batches: no spending is lost or counted twice, however sessions end."""

from __future__ import annotations

from pathlib import Path

import pytest

from fanfold.backends.budget.budget import Budget, BudgetSettings, LeaseTable
from fanfold.backends.budget.spend_log import Lease, SpendLogs
from fanfold.backends.core.errors import BudgetExhaustedError
from fanfold.backends.core.money import NO_PRICES, Amount, BudgetLimits

CAP = 10_000
BLOCK = 2 * CAP // 100
"""What a killed session may leave in doubt besides its leases: blocks of its spend log."""


class Sessions:
    """Sessions of one run, and what its journal contains."""

    def __init__(self, folder: Path) -> None:
        self.logs = SpendLogs(folder / "budget", ("run",))
        self.recorded = dict[int, Amount]()
        self.number = 0

    def open(self) -> tuple[Budget, LeaseTable]:
        self.number += 1
        before, earlier = self.logs.total_spent(self.recorded), self.logs.unreturned_leases()
        self.log = log = self.logs.create(self.logs.session_path(self.number))
        settings = BudgetSettings(BudgetLimits(tokens=CAP), NO_PRICES)
        budget = Budget(settings, before, log)
        return budget, LeaseTable(budget.balance, self.logs, earlier)

    async def kill(self, budget: Budget) -> None:
        """End a session without its last line."""
        await budget.balance.append_line({"held": {}}, sync=False)  # after all earlier lines
        self.log.close()

    def record(self, tokens: int) -> None:
        known = self.recorded.get(self.number, Amount())
        self.recorded[self.number] = known.plus(Amount(tokens=tokens))

    async def close(self, budget: Budget, leases: LeaseTable) -> None:
        leases.mark_all_lost()
        await budget.balance.aclose()

    def spent(self) -> int:
        return self.logs.total_spent(self.recorded).tokens

    def doubt(self) -> int:
        return self.logs.unaccounted(self.recorded).tokens


@pytest.fixture
def sessions(tmp_path: Path) -> Sessions:
    return Sessions(tmp_path)


def amount(tokens: int) -> Amount:
    return Amount(tokens=tokens)


async def test_within_one_session(sessions: Sessions) -> None:
    budget, leases = sessions.open()
    await leases.lend("batch-0001-0001", Lease(amount(8000), 0.0))
    assert budget.balance.left.tokens == CAP - 8000
    await leases.keep_spent("batch-0001-0001", amount(3000))
    assert budget.balance.left.tokens == CAP - 3000
    assert not any(budget.balance.returnable)  # nothing that waiting could bring back
    sessions.record(3000)
    await leases.settle_kept("batch-0001-0001")
    await sessions.close(budget, leases)
    assert (sessions.spent(), sessions.doubt()) == (3000, 0)


async def test_answers_of_a_later_session(sessions: Sessions) -> None:
    """Submitted in the first session, half recorded in the second, the rest in the third."""
    budget, leases = sessions.open()
    await leases.lend("batch-0001-0001", Lease(amount(8000), 0.0))
    await sessions.close(budget, leases)
    assert (sessions.spent(), sessions.doubt()) == (8000, 8000)

    budget, leases = sessions.open()
    assert budget.balance.left.tokens == CAP - 8000
    await leases.take_over("batch-0001-", "batch-0001-0002", amount(0), amount(3000))
    assert budget.balance.left.tokens == CAP - 3000
    assert budget.total_spent().tokens <= 8000
    sessions.record(1500)
    await sessions.close(budget, leases)
    assert (sessions.spent(), sessions.doubt()) == (3000, 1500)

    budget, leases = sessions.open()
    await leases.take_over("batch-0001-", "batch-0001-0003", amount(1500), amount(1500))
    assert budget.balance.left.tokens == CAP - 3000
    sessions.record(1500)
    await leases.settle_kept("batch-0001-0003")
    await sessions.close(budget, leases)
    assert (sessions.spent(), sessions.doubt()) == (3000, 0)


async def test_killed_sessions(sessions: Sessions) -> None:
    """The same, but no session ends by itself."""
    budget, leases = sessions.open()
    await leases.lend("batch-0001-0001", Lease(amount(8000), 0.0))
    await sessions.kill(budget)
    budget, leases = sessions.open()
    await leases.take_over("batch-0001-", "batch-0001-0002", amount(0), amount(3000))
    sessions.record(1500)
    await sessions.kill(budget)
    budget, leases = sessions.open()
    await leases.take_over("batch-0001-", "batch-0001-0003", amount(1500), amount(1500))
    assert CAP - 3000 - 3 * BLOCK <= budget.balance.left.tokens <= CAP - 3000
    sessions.record(1500)
    await leases.settle_kept("batch-0001-0003")
    await sessions.close(budget, leases)
    assert 3000 <= sessions.spent() <= 3000 + 3 * BLOCK
    assert sessions.doubt() <= 3 * BLOCK


async def test_batches_that_were_never_submitted_or_are_recorded(sessions: Sessions) -> None:
    budget, leases = sessions.open()
    await leases.lend("batch-0001-0001", Lease(amount(4000), 0.0))
    await leases.lend("batch-0002-0001", Lease(amount(4000), 0.0))
    await leases.keep_spent("batch-0002-0001", amount(700))
    sessions.record(700)
    await sessions.kill(budget)
    budget, leases = sessions.open()
    assert sorted(leases.earlier_leases("batch-")) == ["batch-0001-0001", "batch-0002-0001"]
    await leases.take_over("batch-0001-0001", "", amount(0), amount(0))
    await leases.take_over("batch-0002-", "batch-0002-0002", amount(700), amount(0))
    await leases.settle_kept("batch-0002-0002")  # nothing was taken over
    assert leases.earlier_leases("batch-") == []
    await sessions.close(budget, leases)
    assert 700 <= sessions.spent() <= 700 + BLOCK


async def test_a_batch_beyond_the_budget_waits_for_nothing(sessions: Sessions) -> None:
    budget, leases = sessions.open()
    await leases.lend("batch-0001-0001", Lease(amount(9000), 0.0))
    await leases.keep_spent("batch-0001-0001", amount(9000))
    with pytest.raises(BudgetExhaustedError):
        await leases.lend("batch-0002-0001", Lease(amount(2000), 0.0))
    await sessions.close(budget, leases)
