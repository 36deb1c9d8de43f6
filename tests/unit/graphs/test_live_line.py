from __future__ import annotations

import re
from typing import Any, cast

import pytest

from fanfold.backends.budget.budget import Budget, BudgetSettings
from fanfold.backends.core.money import (
    NANO_PER_USD,
    NO_PRICES,
    Amount,
    BudgetLimits,
    NodeTime,
    UsageTotals,
)
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.stats import FleetHealth
from fanfold.graphs.run.accounting import OpenRun
from fanfold.graphs.run.console import format_count
from fanfold.graphs.run.monitor import ProgressLine
from fanfold.nodes.shard.gate import Gate
from fanfold.nodes.shard.progress import Progress


class Watched(Fleet):
    """A fleet that says of itself what it is told."""

    def __init__(self, health: FleetHealth) -> None:
        super().__init__([EndpointSpec("http://h:1")])
        self.says = health

    def health(self) -> FleetHealth:
        return self.says


def line(
    progress: Progress,
    health: FleetHealth | None,
    simulated: bool = True,
    width: int = 80,
    **parts: Any,
) -> str:
    nothing = cast(Any, None)
    tools = OpenRun(
        store=nothing,
        item_journal=nothing,
        aggregators=nothing,
        run_item=nothing,
        gate=Gate(8, 1.0),
        progress=progress,
        fingerprint=b"",
        simulated=simulated,
        **parts,
        fleet=None if health is None else Watched(health),
    )
    shown = ProgressLine(tools)
    progress.done += 1
    return shown.render(width)


def health(**changes: Any) -> FleetHealth:
    given: dict[str, Any] = {"healthy": 7, "total": 8, "in_flight": 12, "waiting": 0, "refusals": 0}
    return FleetHealth(**given | {"paused": None} | changes)


def test_it_shows_the_fleet() -> None:
    shown = line(Progress(total=100, done=40, failed=2), health(refusals=3))
    assert re.match(r"SIM(ULATED)?  41/100  2 failed  ", shown)
    assert "7/8 up  12 in flight  3 refused" in shown
    assert "refused" not in line(Progress(total=100), health())
    assert "SIM" not in line(Progress(total=100), health(), simulated=False)
    assert "0 in flight" in line(Progress(total=100), None)


def test_a_terminal_of_80_columns_shows_a_run_whole() -> None:
    """Items done, failed and in all, items and tokens per second, in flight, time left."""
    usage = UsageTotals(prompt_tokens=10_000_000)
    progress = Progress(total=4991, done=4000, failed=10, usage=usage)
    shown = line(progress, health(healthy=8, in_flight=256))
    parts = (
        r"SIM(ULATED)?  4,001/4,991  10 failed  [\d,.kM]+/s  \d+ tok/s  8/8 up  256 in flight  \S+"
    )
    assert re.match(parts, shown)
    assert len(shown) <= 80


def test_it_tells_of_reused_answers() -> None:
    shown = line(Progress(total=100, done=40, usage=UsageTotals(reused=12)), health())
    assert "  12 reused  " in shown
    assert "reused" not in line(Progress(total=100, done=40), health())


def test_a_wide_terminal_leaves_nothing_out() -> None:
    busy = health(healthy=2000, total=2000, in_flight=9_999, refusals=9_999)
    shown = line(Progress(total=99_999, done=9_999), busy, width=120)
    assert shown.startswith("SIMULATED")
    assert "tok/s" in shown
    assert "9,999 refused" in shown


@pytest.mark.parametrize("reused", [True, False])
@pytest.mark.parametrize("simulated", [True, False])
@pytest.mark.parametrize("size", [1, 999, 9_999, 99_999, 9_999_999])
def test_it_fits_a_terminal(size: int, simulated: bool, reused: bool) -> None:
    busy = health(healthy=min(size, 2000), total=min(size, 2000), in_flight=size, refusals=size)
    progress = Progress(
        total=3 * size,
        done=size,
        failed=size,
        usage=UsageTotals(prompt_tokens=size, reused=size if reused else 0),
    )
    shown = line(progress, busy, simulated)
    assert len(shown) <= 80
    assert "up" in shown
    assert "in flight" in shown
    assert "failed" in shown
    assert "SIM" in shown or not simulated


def test_it_says_that_nobody_is_alive_and_how_long_it_waits() -> None:
    nobody = health(healthy=0, paused="no endpoint is alive")
    shown = line(Progress(total=100, done=4), nobody)
    assert "NO ENDPOINT ALIVE 0/8: waiting 0:00 of 10:00" in shown
    assert len(shown) <= 80


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (9_999, "9,999"),
        (10_000, "10k"),
        (143_330, "143k"),
        (999_700, "1.0M"),
        (2e9, "2.0G"),
    ],
)
def test_numbers_are_short(number: float, text: str) -> None:
    assert format_count(number) == text


def test_it_shows_dollars_only_if_something_has_a_price() -> None:
    usage, node_time = UsageTotals(nano_usd=421_000_000), NodeTime(nano_usd=1_000_000)
    spent = Progress(total=100, done=40, usage=usage, node_time=node_time)
    assert "  0.42 USD  " in line(spent, health())
    free = Progress(total=100, done=40, usage=UsageTotals(prompt_tokens=5))
    assert "USD" not in line(free, health())


@pytest.mark.parametrize(
    ("caps", "before", "shown"),
    [
        (BudgetLimits.from_settings(usd=10), Amount(nano_usd=420_000_000), "0.42/10 USD"),
        (BudgetLimits.from_settings(tokens=2_000_000), Amount(tokens=1_234_567), "1.2M/2.0M tok"),
        (BudgetLimits.from_settings(requests=500), Amount(requests=120), "120/500 req"),
        (BudgetLimits.from_settings(node_hours=2.5), Amount(node_ms=1_800_000), "0.50/2.50 node-h"),
        (
            BudgetLimits.from_settings(usd=10, requests=500),
            Amount(requests=499, nano_usd=NANO_PER_USD),
            "499/500 req",
        ),
    ],
)
def test_it_shows_what_is_spent_of_the_nearest_cap(
    caps: BudgetLimits, before: Amount, shown: str
) -> None:
    budget = Budget(BudgetSettings(caps, NO_PRICES), before, None)
    busy = health(healthy=8, in_flight=256)
    usage = UsageTotals(prompt_tokens=10_000_000)
    progress = Progress(total=4991, done=4000, failed=10, usage=usage)
    seen = line(progress, busy, budget=budget)
    assert f"  {shown}  " in seen
    assert len(seen) <= 80
