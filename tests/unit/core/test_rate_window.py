"""Sliding windows and token buckets: what a service with any windows counts."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.rate_window import RateWindow
from fanfold.backends.core.token_bucket import TokenBucket

WINDOW_S = 6.0


def test_an_amount_fits_when_an_earlier_one_has_left_the_window() -> None:
    window = RateWindow(100, WINDOW_S)
    window.reserve(60)
    assert not window.has(60, 0.0)
    assert window.due_s(60, 0.0) == math.inf
    window.settle(60, 50, 1.0)
    assert window.has(50, 1.0)
    assert not window.has(51, 1.0)
    due = 1.0 + window.due_s(51, 1.0)
    assert 1.0 + WINDOW_S < due <= 1.0 + 1.02 * WINDOW_S
    assert not window.has(51, 1.0 + WINDOW_S - 0.001)
    assert window.has(51, due + 1e-6)


def test_an_amount_above_the_limit_is_alone_and_counts_for_longer() -> None:
    window = RateWindow(100, WINDOW_S)
    assert window.has(250, 0.0)
    window.reserve(250)
    window.settle(250, 250, 0.0)
    assert not window.has(1, 2.4 * WINDOW_S)
    assert window.has(1, 2.6 * WINDOW_S)


def test_nothing_is_used_without_a_limit_that_allows_it() -> None:
    window = RateWindow(0, WINDOW_S)
    assert not window.has(1, 0.0)
    assert window.due_s(1, 0.0) == math.inf
    window.limit = 10
    assert window.has(1, 0.0)


class Service:
    """Counts in windows of its own, each of which begins with a record, after the answer."""

    def __init__(self) -> None:
        self.began, self.used, self.most = -math.inf, 0, 0

    def record(self, amount: int, now: float) -> None:
        if now - self.began >= WINDOW_S:
            self.began, self.used = now, 0
        self.used += amount
        self.most = max(self.most, self.used)


@given(
    st.lists(
        st.tuples(
            st.floats(0.0, 3.0),  # time to the next request
            st.integers(1, 60),  # its estimate
            st.floats(0.0, 1.0),  # part of it that it uses
            st.floats(0.0, 20.0),  # time until the service counts it
            st.floats(0.0, 4.0),  # time until the client knows
        ),
        max_size=80,
    ),
    st.floats(0.0, 1e6),
)
def test_no_window_of_the_service_sees_more_than_the_limit(
    requests: list[tuple[float, int, float, float, float]], start: float
) -> None:
    window, service = RateWindow(100, WINDOW_S), Service()
    events: list[tuple[float, str, int, int]] = []
    now = start
    for gap, estimate, part, counted, known in requests:
        now += gap
        while True:
            due = min((e[0] for e in events), default=math.inf)
            if due <= now:
                event = min(events)
                events.remove(event)
                when, kind, reserved, used = event
                if kind == "counted":
                    service.record(used, when)
                else:
                    window.settle(reserved, used, when)
            elif window.has(estimate, now):
                break
            else:
                now = min(due, now + max(window.due_s(estimate, now), 1e-3))
        window.reserve(estimate)
        used = int(part * estimate)
        events.append((now + counted, "counted", estimate, used))
        events.append((now + counted + known, "known", estimate, used))
    for when, kind, _, used in sorted(events):
        if kind == "counted":
            service.record(used, when)
    assert service.most <= 100


@given(st.lists(st.tuples(st.floats(0.0, 30.0), st.integers(0, 100)), max_size=300))
def test_the_memory_of_a_window_is_constant(uses: list[tuple[float, int]]) -> None:
    window, now = RateWindow(1000, WINDOW_S), 0.0
    for gap, amount in uses:
        now += gap / 100
        window.reserve(amount)
        window.settle(amount, amount, now)
        assert len(window._ends) <= 102
        assert window._used == sum(window._ends.values())
    assert window.reserved == 0


def test_bucket_spreads_requests() -> None:
    bucket = TokenBucket(2.0)
    assert [bucket.take(1, 0.0) for _ in range(4)] == [0.0, 0.0, 0.5, 1.0]
    assert bucket.take(1, 10.0) == 0.0


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=200), st.sampled_from([0.125, 5, 80]))
def test_what_waits_for_a_bucket_is_never_more_than_its_rate_and_burst(
    gaps: list[float], rate: float
) -> None:
    """Requests are taken when they are due; after a pause of any length none are made up for."""
    burst = max(1.0, rate / 20)
    bucket, now, sent = TokenBucket(rate, burst), 0.0, list[float]()
    for gap in gaps:
        now += gap if gap > 0.9 else gap / rate / 2
        now += bucket.due_s(1.0, now)
        bucket.take(1.0, now)
        sent.append(now)
    for i, first in enumerate(sent):
        inside = [t for t in sent[i:] if t < first + 1.0 - 1e-6]
        assert len(inside) <= rate + burst + 1e-6
