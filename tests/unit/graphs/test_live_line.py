from __future__ import annotations

import io
import re
import time
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from fanfold.backends.budget.budget import Budget, BudgetSettings
from fanfold.backends.core.money import (
    NANO_PER_USD,
    NO_PRICES,
    Amount,
    BudgetLimits,
    NodeTime,
    UsageTotals,
)
from fanfold.backends.core.silence import SilenceWatch
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet
from fanfold.backends.fleet.stats import FleetHealth
from fanfold.backends.storage.journal import Journal
from fanfold.graphs.run.accounting import OpenRun
from fanfold.graphs.run.console import fill_lines, format_count
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


def follow(
    progress: Progress, health: FleetHealth | None, simulated: bool = True, **parts: Any
) -> ProgressLine:
    """Return the progress of a run in which one item more is done."""
    nothing = cast(Any, None)
    given: dict[str, Any] = {"item_journal": Failed({}), "gate": Gate(8, 1.0)} | parts
    tools = OpenRun(
        store=nothing,
        aggregators=nothing,
        run_item=nothing,
        progress=progress,
        fingerprint=b"",
        simulated=simulated,
        **given,
        fleet=None if health is None else Watched(health),
    )
    shown = ProgressLine(tools)
    progress.done += 1
    return shown


class Failed(Journal):
    """A journal in which items failed."""

    def __init__(self, classes: dict[str, int]) -> None:
        self.classes = classes

    def count_failures(self) -> dict[str, int]:
        return self.classes


def line(
    progress: Progress, health: FleetHealth | None, simulated: bool = True, **parts: Any
) -> str:
    """Return the line for a pipe or a file."""
    return str(follow(progress, health, simulated, **parts))


def screen(
    width: int,
    progress: Progress,
    health: FleetHealth | None,
    simulated: bool = True,
    **parts: Any,
) -> list[str]:
    """Return the lines that a terminal shows."""
    file = io.StringIO()
    console = Console(file=file, width=width)
    console.print(follow(progress, health, simulated, **parts).render(width))
    return [text.rstrip() for text in file.getvalue().splitlines()]


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


def test_a_pipe_gets_the_whole_run_in_one_line() -> None:
    """Items done, failed and in all, items and tokens per second, in flight, time left."""
    usage = UsageTotals(prompt_tokens=10_000_000)
    progress = Progress(total=4991, done=4000, failed=10, usage=usage)
    shown = line(progress, health(healthy=8, in_flight=256))
    parts = r"SIMULATED  4,001/4,991  10 failed  [\d,.kM]+/s  \d+ tok/s  8/8 up  256 in flight  \S+"
    assert re.match(parts, shown)


def test_it_tells_of_reused_answers() -> None:
    shown = line(Progress(total=100, done=40, usage=UsageTotals(reused=12)), health())
    assert "  12 reused  " in shown
    assert "reused" not in line(Progress(total=100, done=40), health())


CLASSES = {"InvalidAnswerError": 7, "RefusedAnswerError": 2, "TruncatedAnswerError": 1}


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_terminal_shows_a_bar_and_all_else_below_it(width: int) -> None:
    usage = UsageTotals(prompt_tokens=10_000_000, nano_usd=421_000_000, reused=12)
    progress = Progress(total=4991, done=4000, failed=10, usage=usage)
    busy = health(healthy=8, in_flight=256, refusals=3)
    first, *rest = screen(width, progress, busy, item_journal=Failed(CLASSES))
    assert re.fullmatch(r"SIMULATED  [━╸╺ ]+   80 %  4,011/4,991", first)
    assert len(first) == width
    below = "  ".join(rest)
    for part in ("/s", " left", "8/8 up  256 in flight", "3 refused", "0.42 USD", "12 reused"):
        assert part in below
    assert "10 failed:  7 InvalidAnswerError  2 RefusedAnswerError  1 Trunc" in below


@pytest.mark.parametrize("width", [20, 40, 60, 80, 140])
@pytest.mark.parametrize("reused", [True, False])
@pytest.mark.parametrize("simulated", [True, False])
@pytest.mark.parametrize("size", [1, 999, 9_999, 99_999, 9_999_999])
def test_it_fits_a_terminal(size: int, simulated: bool, reused: bool, width: int) -> None:
    busy = health(healthy=min(size, 2000), total=min(size, 2000), in_flight=size, refusals=size)
    progress = Progress(
        total=3 * size,
        done=size,
        failed=size,
        usage=UsageTotals(prompt_tokens=size, reused=size if reused else 0),
    )
    shown = screen(width, progress, busy, simulated, item_journal=Failed(CLASSES))
    assert all(len(text) <= width for text in shown)
    words = " ".join(" ".join(shown).split())
    for part in ("up", "in flight", "refused", "failed:", *CLASSES, "left" if size > 1 else "%"):
        assert part in words
    assert simulated == ("SIMULATED" in words)
    assert reused == ("reused" in words)


def test_a_hundred_per_cent_means_all() -> None:
    first, *_ = screen(80, Progress(total=100_000, done=99_998), None)
    assert "   99 %  100k/100k" in first
    first, *rest = screen(80, Progress(total=100, done=99), None)
    assert "  100 %  100/100" in first
    assert "done" in rest[0]


def test_many_error_classes_are_counted_together() -> None:
    classes = {f"Error{n}": 10 - n for n in range(10)}
    shown = screen(80, Progress(total=100, done=1, failed=55), None, item_journal=Failed(classes))
    assert "55 failed:" in shown[-2]
    assert shown[-1].endswith("10 of other classes")


@given(st.lists(st.text("ab", min_size=1, max_size=30), max_size=12), st.integers(10, 60))
def test_lines_break_between_parts(parts: list[str], width: int) -> None:
    lines = fill_lines(parts, width)
    assert [part for text in lines for part in text.split()] == parts
    assert all(len(text) <= width or text in parts for text in lines)


def test_it_says_that_nobody_is_alive_and_how_long_it_waits() -> None:
    nobody = health(healthy=0, paused="no endpoint is alive")
    shown = line(Progress(total=100, done=4), nobody)
    assert "NO ENDPOINT ALIVE 0/8: waiting 0:00 of 10:00" in shown
    below = screen(60, Progress(total=100, done=4), nobody)[1]
    assert below == "NO ENDPOINT ALIVE 0/8: waiting 0:00 of 10:00"


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
    assert f"  {shown}  " in line(progress, busy, budget=budget)
    assert shown in "\n".join(screen(60, progress, busy, budget=budget))


def slow_run(total: int, in_flight: int, earlier: bool) -> tuple[Progress, Gate]:
    progress, gate = Progress(total=total), Gate(64, 1.0)
    for n in range(40):
        record = {"status": "done", "requests": 1, "latency_s": 500.0 + 10 * (n % 20)}
        progress.times.add(record, is_earlier=earlier)
    gate.in_flight = in_flight
    return progress, gate


@pytest.mark.parametrize("earlier", [True, False])
def test_the_time_left_of_long_items_follows_from_their_times(earlier: bool) -> None:
    """Few items end in ten seconds; one that just ended would promise far too much."""
    progress, gate = slow_run(641, 64, earlier)
    shown = line(progress, None, gate=gate)
    # 576 wait: 9 rounds of 595 s on average, and the slowest of the last round
    assert "1h40 left" in shown


def test_the_time_left_counts_down_while_the_last_items_run() -> None:
    progress, gate = slow_run(65, 64, earlier=False)
    gate.started_at = time.monotonic() - 600.0
    assert "1:30 left" in line(progress, None, gate=gate)
    gate.started_at -= 600.0
    assert "0:00 left" in line(progress, None, gate=gate)


def test_it_names_endpoints_that_answer_nothing() -> None:
    class Silent(SilenceWatch):
        def find_silent(self) -> dict[str, float]:
            return {"node-3": 1.0, "node-7": 2.0}

    shown = line(Progress(total=100), health(), silence=Silent())
    assert "no answer for 10:00: node-3, node-7" in shown
    assert any("node-3, node-7" in row for row in screen(80, Progress(), None, silence=Silent()))
