"""The cost of a run, from its spend logs and its journal's records."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.budget.cost import NO_ENDPOINT, Cost, describe_cost, group_usage
from fanfold.backends.budget.limits import estimate_total
from fanfold.backends.budget.spend_log import SpendLogs
from fanfold.backends.core.errors import JournalError
from fanfold.backends.core.money import (
    NANO_PER_USD,
    Amount,
    BudgetLimits,
    NodeTime,
    UsageTotals,
)
from fanfold.backends.storage.journal_file import ItemCounts
from fanfold.backends.storage.results import make_rows
from fanfold.tests.journals import write_journal


def book(shelf: SpendLogs, life: int, *lines: dict[str, Any]) -> None:
    written = shelf.create(shelf.session_path(life))
    for line in lines:
        written.write(line, sync=False)
    written.close()


def held(node_ms: int, idle_ms: int = 0, nano_usd: int = 0) -> dict[str, Any]:
    return {"held": NodeTime(node_ms, idle_ms, nano_usd).to_json()}


def test_doubt_is_what_the_books_allow_and_nothing_proves(tmp_path: Path) -> None:
    shelf = SpendLogs(tmp_path / "budget", "run")
    book(shelf, 1, {"level": {"tokens": 500}}, held(10), held(20, 5), {"level": {"tokens": 900}})
    book(shelf, 2, held(300))  # without limits: its journal is believed
    book(shelf, 3, held(7, 0, 70), {"settled": Amount(4, 410, 1070, 7).to_json()})
    journal = {
        1: Amount(3, 600, 0),
        2: Amount(5, 5000, 0),
        3: Amount(4, 400, 1000),
        4: Amount(1, 9),
    }
    assert shelf.total_node_time() == NodeTime(327, 5, 70)
    assert shelf.total_spent(journal) == Amount(13, 900 + 5000 + 410 + 9, 1070, 327)
    assert shelf.unaccounted(journal) == Amount(0, 300 + 10, 0, 0)


def test_open_calls_count_where_no_level_does(tmp_path: Path) -> None:
    """The last line counts; a session that has settled its spending has none left."""
    shelf = SpendLogs(tmp_path / "budget", "run")
    book(shelf, 1, {"open": Amount(9, 900, 90).to_json()}, {"open": Amount(2, 80, 8).to_json()})
    book(shelf, 2, {"level": {"tokens": 500}}, {"open": Amount(3, 70, 30).to_json()}, held(5))
    book(shelf, 3, {"open": Amount(4, 40).to_json()}, {"settled": Amount(1, 10).to_json()})
    book(shelf, 4, {"open": Amount(4, 40).to_json()}, {"open": Amount().to_json()})
    journal = {n: Amount(1, 10, 1) for n in (1, 2, 3, 4)}
    assert shelf.total_spent({1: journal[1]}) == Amount(3, 90, 9).plus(Amount(3, 500, 30, 5)).plus(
        Amount(1, 10)
    )
    assert shelf.unaccounted(journal) == Amount(2, 80, 8).plus(Amount(3, 490, 30))


@pytest.mark.parametrize(
    ("limits", "doubt", "lines"),
    [
        ((), Amount(3, 120), ["In doubt: at most 3 requests, 120 tokens"]),
        (
            ("tokens",),
            Amount(0, 1200),
            ["In doubt, and counted against the budget: at most 1,200 tokens"],
        ),
        ((), Amount(), []),
    ],
)
def test_the_last_lines_say_what_is_in_doubt(
    limits: tuple[str, ...], doubt: Amount, lines: list[str]
) -> None:
    assert list(describe_cost(Cost(UsageTotals(3, 10), unaccounted=doubt), limits)) == lines


def test_lost_answers_make_an_upper_bound() -> None:
    spent = UsageTotals(prompt_tokens=10, lost_tokens=5, nano_usd=2 * NANO_PER_USD)
    (line,) = describe_cost(Cost(spent, priced=True), ())
    assert line == "Cost: at most 2.00 USD, of which at most 2.00 wasted"
    exact = UsageTotals(prompt_tokens=10, nano_usd=2 * NANO_PER_USD, useful_nano_usd=NANO_PER_USD)
    (line,) = describe_cost(Cost(exact, priced=True), ())
    assert line == "Cost: 2.00 USD, of which 1.00 wasted"


def test_a_price_that_is_rounded_up_is_no_doubt(tmp_path: Path) -> None:
    shelf = SpendLogs(tmp_path / "budget", "run")
    book(shelf, 1, {"settled": Amount(3, 30, 1003).to_json()})
    assert shelf.unaccounted({1: Amount(3, 30, 1000)}) == Amount()
    assert shelf.unaccounted({1: Amount(2, 30, 1000)}) == Amount(1, 0, 3)


def test_time_counts_in_a_life_whose_caps_do_not_limit_it(tmp_path: Path) -> None:
    shelf = SpendLogs(tmp_path / "budget", "run")
    book(shelf, 1, held(50), {"settled": Amount(1, 10, 0, 0).to_json()})
    assert shelf.total_spent({1: Amount(1, 10)}).node_ms == 50
    assert shelf.unaccounted({1: Amount(1, 10)}) == Amount()


def record(index: int, endpoint: str | None, model: str | None, **more: Any) -> dict[str, Any]:
    tokens = {"prompt_tokens": 10, "completion_tokens": 2, "useful_tokens": 12}
    about = {"index": index, "id": f"i{index}", "status": "done", "requests": 1, "nano_usd": 5}
    return about | tokens | {"endpoint": endpoint, "model": model, "finished_at": DAY} | more


DAY = "2026-02-03T04:05:06.000+00:00"


def journal(folder: Path, name: str, *records: dict[str, Any]) -> None:
    write_journal(folder / name, records, "run")


def test_records_add_up_by_what_was_asked_for(tmp_path: Path) -> None:
    lost = {"endpoint": "h2:1", "model": None, "requests": 2, "lost_tokens": 100, "nano_usd": 3}
    mine = {"endpoint": "h1:1", "model": "a", "requests": 1, "useful_tokens": 12, "nano_usd": 2}
    shared = record(1, "h1:1", "a", requests=3, lost_tokens=100, shares=[mine, lost])
    unasked = record(2, None, None, requests=0, nano_usd=0, status="failed")
    journal(tmp_path, "0001.jsonl", record(0, "h1:1", "a"), shared, unasked)
    journal(tmp_path, "0002-w-1.jsonl", record(2, "h2:1", "b"), record(0, "h3:1", None))

    def by(key: str) -> dict[str, tuple[int, int]]:
        groups = group_usage(tmp_path, "run", 3, key, "asked").by_key
        return {name: (spent.requests, spent.nano_usd) for name, spent in groups.items()}

    assert by("endpoint") == {"h1:1": (2, 7), "h2:1": (3, 8), NO_ENDPOINT: (0, 0), "h3:1": (1, 5)}
    assert by("node") == {"h1": (2, 7), "h2": (3, 8), NO_ENDPOINT: (0, 0), "h3": (1, 5)}
    assert by("model") == {"a": (2, 7), NO_ENDPOINT: (0, 0), "b": (3, 8), "asked": (1, 5)}
    assert by("day") == {"2026-02-03": (6, 20)}
    lives = group_usage(tmp_path, "run", 3, None, "asked").sessions
    assert {life: spent.requests for life, spent in lives.items()} == {1: 4, 2: 2}


def test_a_foreign_file_is_told(tmp_path: Path) -> None:
    journal(tmp_path, "notes.jsonl", record(0, "h", "a"))
    with pytest.raises(JournalError, match="not a journal file"):
        group_usage(tmp_path, "run", 1, "day", "m")


def test_dollars_are_null_where_nobody_knows_them() -> None:
    spent = UsageTotals(
        prompt_tokens=10, useful_tokens=4, nano_usd=NANO_PER_USD, useful_nano_usd=NANO_PER_USD // 4
    )
    told = Cost(spent, NodeTime(3_600_000, 1_800_000, 2 * NANO_PER_USD), priced=True).to_json()
    assert (told["usd"], told["wasted_usd"], told["node_usd"]) == (3.0, 0.75, 2.0)
    assert (told["node_hours"], told["idle_node_hours"], told["idle_node_usd"]) == (1.0, 0.5, 1.0)
    assert told["tokens"]["wasted"] == 6
    free = Cost(UsageTotals(prompt_tokens=10), NodeTime(3_600_000), Amount(0, 5)).to_json()
    assert (free["usd"], free["wasted_usd"], free["node_usd"]) == (None, None, None)
    assert free["in_doubt"] == {"requests": 0, "tokens": 5, "usd": None, "node_hours": 0.0}
    asked_before = {"prompt_tokens": 5, "nano_usd": 0, "useful_tokens": 5}
    reused = {"prompt_tokens": 0, "nano_usd": 0, "useful_tokens": 0}
    told_rows = make_rows([asked_before, reused, {"nano_usd": NANO_PER_USD}], priced=True)
    assert [row["usd"] for row in told_rows] == [None, 0.0, 1.0]


@pytest.mark.parametrize(
    ("limits", "spent", "settled", "counts", "total"),
    [
        # A killed session's reservations: 20,000 tokens in doubt, once.
        (
            BudgetLimits(tokens=10**6),
            Amount(100, 30_000),
            Amount(100, 10_000),
            ItemCounts(done=100, failed=0, open=900),
            {"tokens": 20_000 + 100_000},
        ),
        # Failed items were paid too; doubt in dollars.
        (
            BudgetLimits(nano_usd=10**12),
            Amount(4, 400, 3 * NANO_PER_USD),
            Amount(4, 400, 2 * NANO_PER_USD),
            ItemCounts(done=3, failed=1, open=4),
            {"usd": 1 + 4.0},
        ),
        # Two limits, nothing in doubt.
        (
            BudgetLimits(requests=100, node_ms=10**9),
            Amount(10, 0, 0, 3_600_000),
            Amount(10, 0, 0, 3_600_000),
            ItemCounts(done=5, failed=0, open=5),
            {"requests": 20, "node_hours": 2.0},
        ),
        # All items ended, or none.
        (
            BudgetLimits(tokens=10),
            Amount(9, 9),
            Amount(3, 3),
            ItemCounts(done=3, failed=0, open=0),
            {"tokens": 9},
        ),
        (BudgetLimits(tokens=10), Amount(9, 9), Amount(), ItemCounts(0, 0, 3), {}),
    ],
)
def test_the_need_counts_doubt_once(
    limits: BudgetLimits,
    spent: Amount,
    settled: Amount,
    counts: ItemCounts,
    total: dict[str, float],
) -> None:
    assert estimate_total(spent, settled, limits, counts) == total
