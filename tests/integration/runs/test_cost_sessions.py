"""The cost of a run is reported during the run, after kill -9, and for workers."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from fanfold.backends.budget.cost import read_budget, read_cost
from fanfold.backends.budget.spend_log import SpendLogs
from fanfold.backends.core.money import Amount
from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.run_folder import open_folder
from fanfold.tests.integration.runs.conftest import Lab, LabMaker

pytestmark = pytest.mark.integration

CAP = 1_000_000


def told(lab: Lab) -> tuple[Any, dict[str, Any], int]:
    """Return the cost and the budget as the folder tells them, and what counts as spent."""
    folder = open_folder(lab.out)
    run = folder.read_provenance()["run"]
    with Journal(folder.journal, run, lab.items) as ledger:
        cost = read_cost(folder, run, ledger.usage_by_session)
        amounts = {life: spent.amount for life, spent in ledger.usage_by_session.items()}
    return (
        cost,
        read_budget(folder, cost),
        SpendLogs(folder.budget, run).total_spent(amounts).tokens,
    )


def paid(lab: Lab) -> int:
    """Return the tokens that the fleet has read and written, by its own counts."""
    totals = lab.fleet.stats()["totals"]
    names = ("prompt_tokens", "completion_tokens", "abandoned_tokens")
    return sum(int(totals[name]) for name in names)


async def test_what_a_killed_life_may_have_cost_is_in_doubt(lab_of: LabMaker) -> None:
    """Two workers write the journal; the coordinator and both are killed."""
    async with lab_of(60, ttft_s=0.02) as lab:
        lab.config["limits"] |= {"hedge": False, "streams": 4}
        lab.config["model"] = {"max_tokens": 64, "price": {"prompt": 1, "completion": 1}}
        lab.config |= {"budget": {"tokens": CAP}, "backend": {"kind": "local", "processes": 2}}
        await lab.killed_at(15)
        cost, budget, spent = told(lab)
        assert cost.unaccounted.tokens > 0
        assert cost.usage.tokens + cost.unaccounted.tokens == spent >= paid(lab)
        in_doubt = cost.unaccounted_json()["usd"]  # the cap is in tokens; workers' open calls count
        assert isinstance(in_doubt, float)
        assert in_doubt > 0
        assert budget["tokens"] == {"spent": spent, "cap": CAP}
        result = await lab.live(overrides=("backend={kind: local}",))
        assert result.exit_code == 0
        after, _, spent = told(lab)
        assert after == result.cost
        assert after.usage.tokens + after.unaccounted.tokens == spent >= paid(lab)
        assert after.node_time.node_ms > cost.node_time.node_ms
        assert result.budget["tokens"]["spent"] == spent
        assert after.nano_usd >= after.usage.useful_nano_usd > 0


async def test_it_is_told_while_the_run_goes_on(lab_of: LabMaker) -> None:
    async with lab_of(200, ttft_s=0.02) as lab:
        lab.config["limits"] |= {"hedge": False, "streams": 4}
        lab.config |= {"budget": {"tokens": CAP}}
        folder = await lab.begin()
        life = asyncio.create_task(lab.live(folder))
        await lab.until(lambda: lab.journal_lines() >= 10)
        cost, _, spent = await asyncio.to_thread(told, lab)
        assert not life.done()
        assert 10 <= cost.usage.requests < 200
        assert cost.unaccounted.tokens > 0  # what is reserved
        assert cost.usage.tokens + cost.unaccounted.tokens == spent
        result = await life
        assert result.cost is not None
        assert result.cost.usage.requests == 200
        assert result.cost.unaccounted == Amount()
