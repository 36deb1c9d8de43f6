"""Breaker and adaptive limit: pure state, time passed in."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.protocols import CallLog
from fanfold.backends.fleet.adaptive_limit import AdaptiveLimit
from fanfold.backends.fleet.endpoint import Breaker, BreakerState, Endpoint, EndpointSpec
from fanfold.backends.fleet.policy import (
    AdaptiveLimitPolicy,
    BreakerPolicy,
)

LANE = AdaptiveLimitPolicy(start=8, ceiling=1024, settle_s=1.0, samples=4)


def test_breaker_opens_after_failures_in_a_row_only() -> None:
    breaker = Breaker(BreakerPolicy(failures=3))
    assert [breaker.record_failure(), breaker.record_failure()] == [False, False]
    breaker.record_success()
    assert [breaker.record_failure(), breaker.record_failure(), breaker.record_failure()] == [
        False,
        False,
        True,
    ]
    assert breaker.state is BreakerState.OPEN


def test_breaker_ignores_what_was_under_way_when_it_opened() -> None:
    breaker = Breaker(BreakerPolicy(open_s=1.0))
    assert breaker.record_failure(at_once=True)
    assert not breaker.record_failure(at_once=True)
    assert not breaker.record_success()
    assert (breaker.state, breaker.times_opened, breaker.pause_s) == (BreakerState.OPEN, 1, 1.0)


def test_breaker_tries_with_one_and_doubles_its_pause() -> None:
    breaker = Breaker(BreakerPolicy(open_s=1.0, open_max_s=3.0))
    breaker.record_failure(at_once=True)
    breaker.half_open()
    assert breaker.record_failure()
    assert breaker.pause_s == 2.0
    breaker.record_missed_probe()
    assert breaker.pause_s == 3.0
    breaker.half_open()
    assert breaker.record_success()
    assert (breaker.state, breaker.times_opened) == (BreakerState.CLOSED, 1)
    breaker.record_failure(at_once=True)
    assert breaker.pause_s == 1.0


def test_lane_doubles_while_nothing_is_refused() -> None:
    lane = AdaptiveLimit(LANE)
    widths = []
    for second in range(8):
        lane.widen(float(second))
        widths.append(lane.width)
    assert widths == [16, 32, 64, 128, 256, 512, 1024, 1024]


def test_lane_waits_before_it_widens_again() -> None:
    lane = AdaptiveLimit(LANE)
    assert lane.widen(0.0)
    assert not lane.widen(0.5)
    assert lane.width == 16


def test_a_burst_of_refusals_leaves_what_was_accepted() -> None:
    lane = AdaptiveLimit(LANE)
    lane.widen(0.0)
    for outstanding in range(16, 6, -1):
        lane.record_refusal(outstanding)
    assert lane.width == 6
    for _ in range(6):
        lane.record_answer(6, 1.0, 1.0)
    assert lane.width == 7


def test_a_burst_of_late_answers_counts_once() -> None:
    lane = AdaptiveLimit(LANE)
    lane.widen(0.0)
    lane.shrink(3.0)
    lane.shrink(3.1)
    assert lane.width == 12


def test_lane_finds_the_knee_of_a_server_that_queues() -> None:
    """Eight are served at once: the ninth waits for one of them, and so on."""
    lane = AdaptiveLimit(LANE)
    lane.widen(0.0)
    lane.widen(1.0)
    for level in range(1, 33):
        lane.record_answer(level, max(1.0, level / 8), 2.0)
    assert lane.width == 16
    assert not lane.widen(30.0)
    assert lane.widen(90.0)


@given(st.floats(min_value=0.0, max_value=0.5))
def test_lane_takes_mild_slowing_for_no_knee(slowing: float) -> None:
    lane = AdaptiveLimit(LANE)
    for second in range(4):
        lane.widen(float(second))
    for level in range(1, 129):
        lane.record_answer(level, 1.0 + slowing * level.bit_length() / 8, 4.0)
    assert lane.width == 128


@given(st.lists(st.tuples(st.sampled_from("wra"), st.integers(1, 64)), max_size=200))
def test_lane_stays_within_its_bounds(events: list[tuple[str, int]]) -> None:
    lane = AdaptiveLimit(LANE, ceiling=100)
    for now, (kind, number) in enumerate(events):
        if kind == "w":
            lane.widen(float(now))
        elif kind == "r":
            lane.record_refusal(number)
            lane.shrink(float(now))
        else:
            lane.record_answer(number, float(number), float(now))
        assert 1 <= lane.width <= 100


def test_a_repetition_before_any_other_request_shows_nothing_new() -> None:
    endpoint = Endpoint(EndpointSpec("http://n:1"))
    item, other = CallLog(), CallLog()
    mark = endpoint.mark(10.0, alone=False)
    assert not endpoint.refuses_alone(item, mark, 10.1)
    endpoint.record_accepted(other, {}, 11.0)
    assert endpoint.refuses_alone(item, mark, 11.1)
    mark = endpoint.mark(12.0, alone=True)
    assert endpoint.refuses_alone(item, mark, 12.1)
    assert not endpoint.refuses_alone(item, mark, 100.0)
    endpoint.throttled += 1
    assert not endpoint.refuses_alone(item, mark, 12.1)


def test_an_endpoint_that_comes_back_starts_anew_and_keeps_its_statistics() -> None:
    spec = EndpointSpec("http://node:8000/v1")
    endpoint = Endpoint(spec)
    endpoint.breaker.record_failure(at_once=True)
    endpoint.ejected = endpoint.retired = True
    endpoint.in_flight = 2
    endpoint.limit.shrink(1.0)
    endpoint.record_latency(60.0)
    endpoint.stats.calls = 7
    endpoint.rejoin(Endpoint(EndpointSpec("http://node:8000/v1", weight=2.0)))
    assert endpoint.alive
    assert endpoint.width == 8
    assert (endpoint.in_flight, endpoint.stats.calls, endpoint.breaker.times_opened) == (2, 7, 1)
    assert (endpoint.calls, endpoint.has_answered) == (0, False)  # it may be another server
    assert (endpoint.latency_s, endpoint.spec.weight) == (0.0, 2.0)
