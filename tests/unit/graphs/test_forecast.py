from __future__ import annotations

import dataclasses
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.budget.price import Price
from fanfold.backends.core.money import BudgetLimits
from fanfold.graphs.cli.format import (
    budget_lines,
    cost_lines,
    format_budget_reach,
    format_duration,
    format_usd_amount,
)
from fanfold.graphs.run.estimate import sample_indices
from fanfold.graphs.run.forecast import AnswerLimit, Forecast, ItemStats, Range, RunPlan, forecast

PRICE = Price(prompt=1.0, cached_prompt=0.1, completion=4.0)


def record(index: int, **fields: Any) -> dict[str, Any]:
    return {
        "index": index,
        "status": "done",
        "error_class": None,
        "requests": 1,
        "repairs": 0,
        "prompt_tokens": 100,
        "completion_tokens": 50,
        "latency_s": 2.0,
        "finished_at": f"2026-01-01T{index // 5 // 1800:02}:{index // 5 // 30 % 60:02}:"
        f"{2 * (index // 5) % 60:02}.000+00:00",  # five at a time
    } | fields


def seen_of(*records: dict[str, Any], total: int = 10**9) -> ItemStats:
    found = ItemStats.from_records(records, total, "somewhere")
    assert found is not None
    return found


def plan(**fields: Any) -> RunPlan:
    given: dict[str, Any] = {
        "items": 1000,
        "first": Range.exact(100),
        "max_tokens": 200,
        "repairs": 1,
        "streams": 10,
    }
    return RunPlan(**(given | fields))


@given(st.integers(0, 5000), st.integers(1, 300), st.text())
def test_a_sample_is_spread_over_the_input(total: int, count: int, seed: str) -> None:
    chosen = sample_indices(total, count, seed)
    assert chosen == sorted(set(chosen)) == sample_indices(total, count, seed)
    assert len(chosen) == min(total, count)
    for part, index in enumerate(chosen):
        assert part * total // len(chosen) <= index < (part + 1) * total // len(chosen)


def test_a_mean_knows_how_well_it_is_known() -> None:
    assert Range.from_sample([], 5) == Range.exact(0)
    assert Range.from_sample([1, 2, 3], 3) == Range.exact(2)  # all there are
    assert Range.from_sample([7], 100) == Range(0, 7, 14)
    few, many = Range.from_sample([1, 3] * 5, 10**6), Range.from_sample([1, 3] * 500, 10**6)
    assert few.low < many.low < 2 < many.high < few.high
    assert Range.from_sample([1, 3] * 500, 1001).high < many.high  # few are left


def test_without_a_look_answers_may_be_as_long_as_allowed() -> None:
    found = forecast(plan(price=PRICE), None)
    assert found.requests == Range(1000, 1000, 2000)
    assert found.prompt == Range(100_000, 100_000, 1000 * (200 + 200 + 60))
    assert found.completion == Range(1000, 200_000, 400_000)
    assert found.usd is not None
    assert found.usd.high == pytest.approx(0.46 + 1.6)
    assert found.seconds is found.node_hours is None
    assert forecast(plan(repairs=0), None).requests == Range.exact(1000)


def test_what_was_seen_is_extrapolated() -> None:
    seen = seen_of(*(record(n) for n in range(100)))
    found = forecast(plan(price=PRICE, nodes=4), seen)
    assert found.completion.likely == 50_000
    assert found.prompt.likely == found.usd.likely * 1e6 - 4 * 50_000  # type: ignore[union-attr]
    assert found.seconds is not None
    assert found.seconds.likely == 1000 * 2.0 / 10
    assert found.seconds.high == pytest.approx(1000 * 2.0 / 5)  # no more at a time than seen
    assert found.node_hours is not None
    assert found.node_hours.likely == pytest.approx(200 * 4 / 3600)
    assert found.requests.likely == 1000
    assert found.requests.high == pytest.approx(1030)  # repairs too rare to be seen


def test_repairs_send_the_prompt_again() -> None:
    seen = seen_of(*(record(n, repairs=1, requests=2) for n in range(1000)))
    found = forecast(plan(), seen)
    assert found.prompt.likely == 1000 * (100 * 2 + 50 + 60)
    own = forecast(plan(), seen, own=True)
    assert own.prompt.likely == 1000 * 100  # as the journal says


HELD_S = 1000 * 2 * (1.25 * 100 + 200) / 6000
"""Seconds more because requests in flight reserve their tokens: items, latency, reservation."""


def test_quotas_slow_a_run_down() -> None:
    seen = seen_of(*(record(n) for n in range(100)))
    assert forecast(plan(requests_per_s=2), seen).seconds.likely == 500  # type: ignore[union-attr]
    slow = forecast(plan(tokens_per_min=6000), seen).seconds
    assert slow is not None
    assert slow.likely == pytest.approx(150_000 / 100 + HELD_S)


def test_the_limit_that_takes_longest_is_named_and_compared() -> None:
    seen = seen_of(*(record(n) for n in range(100)))
    found = forecast(plan(tokens_per_min=6000, requests_per_s=2), seen)
    bound = found.rate_bound
    assert bound is not None
    assert bound.limit == "tokens_per_min"
    assert bound.seconds.likely == pytest.approx(1500 + HELD_S)
    assert bound.slowdown == pytest.approx((1500 + HELD_S) / 200)
    assert forecast(plan(), seen).rate_bound is None


def test_the_limits_bound_the_time_without_any_measurement() -> None:
    wanted = plan(items=100_000, max_tokens=500, repairs=0, tokens_per_min=60_000, is_gateway=True)
    found = forecast(wanted, None)
    assert found.seconds is None
    bound = found.rate_bound
    assert bound is not None
    assert bound.seconds.likely == pytest.approx(1000 * 60)  # 100,000 items of 600 tokens: 16.7 h
    lines = list(cost_lines(found, wanted))
    assert any("60,000 tokens per minute: 2 h 48 min to 16 h 40 min" in line for line in lines)
    assert any("batch mode" in line for line in lines)


def test_long_answers_that_are_reserved_leave_room_for_few_requests() -> None:
    """The real time: a window holds what was used in it and what requests in flight reserve."""
    seen = seen_of(*(record(n) for n in range(100)))
    short = plan(tokens_per_min=6000, max_tokens=50)
    long = plan(tokens_per_min=6000, max_tokens=2875)
    assert (short.most_in_flight, long.most_in_flight) == (34, 2)
    bounds = [forecast(one, seen).rate_bound for one in (short, long)]
    times = [one.seconds.likely for one in bounds if one is not None]
    # with 3,000 tokens reserved for 2 s, each item takes half a window for 2 of 60 s
    assert times[1] - times[0] == pytest.approx(1000 * 2 * (2875 - 50) / 6000)
    lines = [line for line in cost_lines(forecast(long, seen), long) if "in flight" in line]
    assert len(lines) == 1
    assert "2 at most, because each one reserves about 3,000 tokens" in lines[0]
    wide = plan(tokens_per_min=6_000_000, max_tokens=50)
    assert not any("in flight" in line for line in cost_lines(forecast(wide, seen), wide))


def test_a_limit_that_does_not_matter_gives_no_advice() -> None:
    seen = seen_of(*(record(n) for n in range(100)))
    wanted = plan(requests_per_s=100, is_gateway=True)
    lines = list(cost_lines(forecast(wanted, seen), wanted))
    assert any("limit of 100 requests per second" in line for line in lines)
    assert not any("advice" in line for line in lines)


def test_cached_tokens_cost_less() -> None:
    seen = seen_of(*(record(n, cached_tokens=80) for n in range(100)))
    usd = forecast(plan(price=PRICE), seen, own=True).usd
    assert usd is not None
    assert usd.likely == pytest.approx(0.1 * (0.2 + 0.8 * 0.1) + 0.05 * 4)
    assert usd.high > 0.1 + 0.2


def test_tokens_that_nobody_reports_stay_unknown() -> None:
    seen = seen_of(record(0, prompt_tokens=None, completion_tokens=None))
    found = forecast(plan(), seen, own=True)
    assert found.completion.high == 400_000
    assert found.prompt.likely == 100_000
    assert found.seconds is not None


def test_items_that_were_not_asked_say_nothing() -> None:
    assert ItemStats.from_records([record(0, requests=0)], 5, "x") is None
    seen = seen_of(record(0), record(1, status="failed", error_class="E"), total=2)
    assert seen.failed == {"E": 1}
    assert seen.prompt == Range.exact(100)


@pytest.mark.parametrize(
    ("caps", "seen", "text"),
    [
        ({"usd": 100}, True, "covers all items; needs at most "),
        ({"usd": 0.15}, True, "covers about 50 % of the items (4"),
        ({"usd": 100, "requests": 300}, True, "covers about 30 % of the items (29 to 30 %)"),
        (
            {"requests": 1010},
            True,
            "likely covers all items, at least 98 %; tightest limit: budget.requests",
        ),
        ({"usd": 0.05}, False, "covers 2 to 48 % of the items; limited by budget.usd"),
        ({"usd": 0.5}, False, "covers at least 24 % of the items, all of them if answers"),
        ({"usd": 100}, False, "covers all items; needs at most 2 % of budget.usd, the tight"),
        (
            {"usd": 0.2, "node_hours": 0.06},
            True,
            "by budget.usd, in the worst case by budget.node_hours",
        ),
        ({"tokens": 1}, True, "covers about 0.0007 % of the items"),
    ],
)
def test_how_far_a_budget_reaches(caps: dict[str, Any], seen: bool, text: str) -> None:
    what = seen_of(*(record(n) for n in range(100))) if seen else None
    found = forecast(plan(price=PRICE, nodes=1, caps=BudgetLimits.from_settings(**caps)), what)
    assert text in format_budget_reach(found)
    (line,) = budget_lines(found, plan(caps=BudgetLimits.from_settings(**caps)))
    assert line == f"budget: {format_budget_reach(found)}"


def test_caps_of_which_nothing_is_known() -> None:
    hours = plan(price=Price(node_hour=2), caps=BudgetLimits.from_settings(usd=1, node_hours=1))
    found = forecast(hours, None)
    assert found.budget_reach is None
    assert found.unknown_limits == ("usd", "node_hours")
    assert [line.partition(":")[0] for line in budget_lines(found, hours)] == [
        "budget.usd",
        "budget.node_hours",
    ]
    seen = seen_of(*(record(n) for n in range(100)))
    priced = forecast(dataclasses.replace(hours, nodes=2), seen)
    assert priced.usd is not None
    assert priced.usd.likely == pytest.approx(2 * 2 * 200 / 3600)
    assert list(budget_lines(forecast(plan(), None), plan())) == ["budget: none"]


def test_every_figure_fits_json() -> None:
    seen = seen_of(*(record(n) for n in range(100)))
    found: Forecast = forecast(
        plan(price=PRICE, nodes=1, caps=BudgetLimits.from_settings(usd=1)), seen
    )
    data = found.to_json()
    assert data["budget"]["cap"] == "usd"
    assert data["requests"] == {"low": 1000, "likely": 1000, "high": 1030}
    assert data["measured"] == "somewhere"


def test_lines_fit_a_terminal() -> None:
    seen = seen_of(*(record(n, latency_s=n / 7, completion_tokens=n) for n in range(1, 100)))
    large = plan(items=987_654, price=PRICE, nodes=64, caps=BudgetLimits.from_settings(usd=1234.5))
    for what in (None, seen):
        found = forecast(large, what)
        lines = [*cost_lines(found, large), *budget_lines(found, large)]
        assert max(map(len, lines)) <= 100, max(lines, key=len)


def test_amounts_and_times_have_the_digits_they_deserve() -> None:
    assert [format_usd_amount(x) for x in (0, 1234.5, 0.5, 0.0032, 1e-9)] == [
        "$0.00",
        "$1,234.50",
        "$0.500",
        "$0.0032",
        "$0.000001",
    ]
    assert [format_duration(x) for x in (0.0123, 0.5, 45, 100, 6000, 200_000)] == [
        "12.3 ms",
        "0.5 s",
        "45 s",
        "2 min",
        "1 h 40 min",
        "56 h",
    ]


CUT = {"status": "failed", "error_class": "TruncatedAnswerError", "completion_tokens": 100}


def test_truncated_answers_are_longer_under_a_larger_limit() -> None:
    """At least what they had, at most the new limit; whole answers and truncated ones say more."""
    records = [record(n, **(CUT if n < 40 else {"completion_tokens": 60})) for n in range(100)]

    def estimate(limit: AnswerLimit | None) -> ItemStats:
        found = ItemStats.from_records(records, 100, "somewhere", limit=limit)
        assert found is not None
        return found

    before = estimate(None)
    assert before.completion.likely == pytest.approx(76)
    rest = 30  # half a whole answer; evenly spread lengths give (100 - 60) * 40 / 60 = 26.7
    only_cut = estimate(AnswerLimit(500, truncated=1.0))
    assert (only_cut.completion.low, only_cut.completion.high) == (100, 500)
    assert only_cut.completion.likely == pytest.approx(100 + rest)
    assert only_cut.latency.likely == pytest.approx(2.0 * (100 + rest) / 76)
    alike = estimate(AnswerLimit(500))
    assert alike.completion.likely == pytest.approx(0.4 * (100 + rest) + 0.6 * 60)
    assert estimate(AnswerLimit(500, truncated=0.0)) == before
    assert estimate(AnswerLimit(100)).completion.likely == pytest.approx(76)  # cut there again
    assert estimate(AnswerLimit(120)).completion.high == pytest.approx(0.4 * 120 + 0.6 * 60)


def test_many_truncated_answers_are_likely_much_longer() -> None:
    """Lengths spread evenly from 64 to 160: a fifth is whole at a limit of 83."""
    lengths = [64 + n * 97 / 100 for n in range(100)]
    records = [
        record(n, **(CUT | {"completion_tokens": 83} if one > 83 else {"completion_tokens": one}))
        for n, one in enumerate(lengths)
    ]
    found = ItemStats.from_records(records, 100, "there", limit=AnswerLimit(500, truncated=1.0))
    assert found is not None
    cut = [one for one in lengths if one > 83]
    assert found.completion.likely == pytest.approx(sum(cut) / len(cut), rel=0.05)


def test_without_a_whole_answer_truncated_ones_may_reach_the_limit() -> None:
    found = ItemStats.from_records(
        [record(n, **CUT) for n in range(9)], 9, "somewhere", limit=AnswerLimit(300)
    )
    assert found is not None
    assert (found.completion.low, found.completion.likely, found.completion.high) == (100, 300, 300)
