"""A faulty run has equal sums in the journal, the endpoints' counters and the fleet's counts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fanfold.backends.budget.cost import GROUP_KEYS, group_usage
from fanfold.backends.budget.spend_log import SpendLogs
from fanfold.backends.core.money import NANO_PER_USD, UsageTotals
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.storage.run_folder import RunFolder
from fanfold.tests.integration.runs.conftest import LabMaker

pytestmark = pytest.mark.integration

ITEMS = 240
FAULTS = (
    FaultRule("500", p=0.06, draw="attempt"),
    FaultRule("drop", p=0.04, draw="attempt"),
    FaultRule("cut_body", p=0.05, draw="attempt"),
    FaultRule("error200", p=0.03, draw="attempt"),
    FaultRule("hang", p=1, max_count=2),
    FaultRule("bad_schema", p=0.03, draw="item"),  # sent back, in vain
    FaultRule("bad_schema", p=0.12, first_round=True, draw="item"),  # sent back, and mended
    FaultRule("slow", p=0.06, draw="attempt", value=0.0001),  # never ends: a timeout, or hedged
)
PRICE = {"prompt": 0.15, "completion": 0.6}


def records(folder: Path) -> list[dict[str, Any]]:
    files = (folder / "journal").glob("*.jsonl")
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    return [line for line in lines if "status" in line]


def useful_by_the_fleet(book: dict[str, dict[str, Any]]) -> int:
    """Tokens of one good answer to each question that had any."""
    return sum(one["tokens"] // one["served"] for one in book.values() if one["served"])


@pytest.mark.parametrize("budget", [{}, {"tokens": 10**9, "usd": 1000}], ids=["free", "limited"])
async def test_a_faulty_run_adds_up_three_ways(lab_of: LabMaker, budget: dict[str, Any]) -> None:
    async with lab_of(ITEMS, ttft_s=0.005, tpot_s=0.0002, jitter=0.0, faults=FAULTS) as lab:
        lab.config["limits"] |= {"request_timeout_s": 2.0, "attempts": 6}
        lab.config |= {"model": {"price": PRICE}, "budget": budget}
        result = await lab.live(await lab.begin())
        fleet = lab.fleet.stats(prompts=True)
    totals = fleet["totals"]
    assert {rule.kind for rule in FAULTS} == totals["injected"].keys()
    assert totals["disconnects"] > 0

    # the first way: the journal
    journal, found = UsageTotals(), records(lab.out)
    for record in found:
        journal.add(record)
    assert result.progress["failed"] > 0
    assert any(record["repairs"] and record["status"] == "done" for record in found)
    # the second: the endpoints' counters
    rows = pq.read_table(lab.out / "endpoints.parquet").to_pylist()
    counted = {name: sum(row[name] for row in rows) for name in rows[0] if "tokens" in name}
    assert sum(row["hedges"] for row in rows) > 0
    # the third: the fleet's own counts
    delivered = totals["prompt_tokens"] + totals["completion_tokens"] - totals["broken_tokens"]
    useful = useful_by_the_fleet(fleet["prompts"])
    wasted = delivered - useful + totals["broken_tokens"] + totals["abandoned_tokens"]

    assert journal.useful_tokens == counted["useful_tokens"] == useful > 0
    assert (
        journal.prompt_tokens + journal.completion_tokens
        == counted["prompt_tokens"] + counted["completion_tokens"]
        == delivered
    )
    assert journal.wasted_tokens == counted["wasted_tokens"] >= wasted > 0
    assert totals["broken_tokens"] > 0
    assert totals["abandoned_tokens"] > 0

    # the same, by endpoint and in dollars
    folder = RunFolder(lab.out)
    groups = group_usage(folder.journal, result.run_id, ITEMS, "endpoint", "m")
    assert groups.total == journal
    of_rows = {row["endpoint"]: (row["useful_tokens"], row["wasted_tokens"]) for row in rows}
    assert of_rows == {
        name: (spent.useful_tokens, spent.wasted_tokens) for name, spent in groups.by_key.items()
    }
    for key in ("model", *GROUP_KEYS):
        parts = group_usage(folder.journal, result.run_id, ITEMS, key, "m").by_key.values()
        for field in UsageTotals.__slots__:
            assert sum(getattr(part, field) for part in parts) == getattr(journal, field)
    rounding = journal.requests / NANO_PER_USD
    usd = journal.nano_usd / NANO_PER_USD
    assert math.isclose(sum(row["usd"] for row in rows), usd, abs_tol=rounding)
    results = pq.read_table(folder.results).to_pylist()
    assert math.isclose(sum(row["usd"] for row in results), usd, abs_tol=1e-9)
    assert sum(row["wasted_tokens"] for row in results) == journal.wasted_tokens
    assert result.cost is not None
    told = result.cost.to_json()
    assert told["usd"] == usd
    assert told["tokens"]["wasted"] == journal.wasted_tokens

    # and with the spend log, which rounds up the price of a request
    pages = SpendLogs(folder.budget, result.run_id).read_sessions()
    assert pages[1].node_time.node_ms > 0
    if budget:
        settled = pages[1].settled
        assert settled is not None
        assert settled.tokens == journal.tokens
        assert math.isclose(settled.nano_usd / NANO_PER_USD, usd, abs_tol=rounding)
        assert result.budget["tokens"]["spent"] == journal.tokens
    assert result.cost.unaccounted_json() == {
        "requests": 0,
        "tokens": 0,
        "usd": 0.0,
        "node_hours": 0.0,
    }
