"""Node time during a run."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

from fanfold.backends.budget.budget import Budget, BudgetSettings, LeaseTable, RunBudget
from fanfold.backends.budget.spend_log import Lease, SpendLogs
from fanfold.backends.core.money import NO_PRICES, Amount, BudgetLimits
from fanfold.backends.core.types import Json
from fanfold.graphs.run import node_time
from fanfold.graphs.run.node_time import NodeTimeMeter, meter_node_time
from fanfold.nodes.shard.gate import Gate


async def nowhere(line: Mapping[str, Json]) -> None:
    """Note nothing."""


async def lost(leases: LeaseTable, name: str) -> None:
    """Lend a request to a worker that is lost; its lease was over an hour ago."""
    await leases.lend(name, Lease(Amount(requests=1), time.time() - 3600, has_log=True))
    leases.mark_lost(name)


async def test_a_damaged_book_of_a_lost_worker_ends_no_watch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Node-hours are spent, and end the run, as before; an error is reported once."""
    monkeypatch.setattr(node_time, "_TICK_S", 0.01)
    monkeypatch.setattr(node_time, "_RECOVER_S", 0.0)
    shelf = SpendLogs(tmp_path / "budget", "run")
    terms = BudgetSettings(BudgetLimits(requests=10, node_ms=2000), NO_PRICES)
    budget = Budget(terms, Amount(), shelf.create(shelf.session_path(1)))
    leases = LeaseTable(budget.balance, shelf, {})
    await lost(leases, "1.0-1.0")
    await lost(leases, "1.1-2.0")
    shelf.lease_path("1.0-1.0").write_bytes(b"?\n")
    gate = Gate(1, 0.0, "shard")
    sheet = NodeTimeMeter(lambda: (4, 4), NO_PRICES, lambda _: None, nowhere)
    with caplog.at_level(logging.WARNING, "fanfold.graphs.run.node_time"):
        async with meter_node_time(sheet, gate, RunBudget(budget, leases, shelf)):
            await asyncio.wait_for(gate.wait_closed(float("inf")), 60)
    assert budget.balance.settled.node_ms > 1000
    assert budget.balance.left.requests == 9  # the spend log of the other was read all the same
    said = [record.getMessage() for record in caplog.records]
    assert len([text for text in said if "not a complete line with a checksum" in text]) == 1, said
    await budget.balance.aclose()
