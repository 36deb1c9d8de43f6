"""Quotas: reserve, settle, shares, lowered rates, and estimates of tokens."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.policy import RateLimitPolicy
from fanfold.backends.fleet.rate_limit import Quota, RateLimiter


class Clock:
    """A clock that a test sets."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def count_sent(quota: Quota, clock: Clock, seconds: float, tokens: int = 0) -> int:
    """Return how many requests are sent in so many seconds, each as early as allowed."""
    end, sent = clock.now + seconds, 0
    while clock.now < end:
        wait = quota.reserve(tokens)
        if wait == 0.0:
            sent += 1
            quota.settle(tokens, tokens)
        else:
            clock.now += min(wait, end - clock.now)
    return sent


def test_requests_are_spread_from_the_first_second_on() -> None:
    clock = Clock()
    quota = Quota(8.0, None, clock=clock)
    assert [count_sent(quota, clock, 1.0) for _ in range(3)] == [8, 8, 8]
    clock.now += 100.0  # a quiet time is not made up for
    assert count_sent(quota, clock, 1.0) <= 9


def test_processes_with_a_share_begin_at_different_times() -> None:
    clock = Clock()
    quotas = [Quota(8.0, None, share=1 / 64, clock=clock) for _ in range(64)]
    assert sum(quota.reserve(0) == 0.0 for quota in quotas) == 0
    waits = sorted(quota.reserve(0) for quota in quotas)
    assert waits[-1] - waits[0] > 2.0
    assert all(0.0 < wait <= 8.0 for wait in waits)


def test_tokens_wait_for_the_window_or_for_a_smaller_answer() -> None:
    clock = Clock()
    quota = Quota(None, 600, clock=clock)
    assert quota.reserve(600) == 0.0
    assert quota.reserve(100) == math.inf
    quota.settle(600, 200)
    assert quota.reserve(400) == 0.0
    quota.settle(400, 400)
    assert quota.reserve(1) == pytest.approx(60.6, abs=0.61)
    clock.now = 30.0
    assert quota.get_window_left() == pytest.approx(30.0)
    clock.now = 61.5
    assert quota.get_window_left() == 60.0  # unknown: never too few
    assert quota.reserve(600) == 0.0


def test_what_was_not_sent_is_released() -> None:
    clock = Clock()
    quota = Quota(2.0, 100, clock=clock)
    assert quota.reserve(100) == 0.0
    quota.cancel(100)
    assert quota.reserve(100) == 0.0
    assert quota.reserve(1) > 0.0


@given(st.lists(st.floats(0.0, 1.0), min_size=1, max_size=20))
def test_a_share_bounds_both(shares: list[float]) -> None:
    clock = Clock()
    quota = Quota(10.0, 1000, window_s=6.0, clock=clock)
    for share in shares:
        quota.set_share(share)
        quota.cancel(0)  # one request at once, at any share
        clock.now += 10.0
        sent = count_sent(quota, clock, 3.0, tokens=10)
        assert sent <= 30 * share + 2
        assert sent * 10 <= max(1000 * share, 10) + 10


def test_a_rate_that_is_refused_is_lowered_and_recovers() -> None:
    clock = Clock()
    quota = Quota(80.0, None, clock=clock)
    for _ in range(50):  # a burst of refusals counts once
        quota.slow_down()
    assert count_sent(quota, clock, 1.0) == pytest.approx(60, abs=4)
    clock.now += 2.0
    quota.slow_down()
    assert count_sent(quota, clock, 1.0) == pytest.approx(45, abs=4)
    for _ in range(12):
        clock.now += 10.0
        quota.reserve(0)
    clock.now += 1.0
    assert count_sent(quota, clock, 1.0) == pytest.approx(82, abs=4)


def test_an_estimate_is_above_until_answers_show_the_length_of_prompts() -> None:
    limiter = RateLimiter(RateLimitPolicy(tokens_per_min=1000))
    most = Usage(400, 100)
    assert limiter.estimate_tokens(most) == 500
    for prompt in range(90, 98):
        limiter.record_usage(most, Usage(prompt, 10))
    assert limiter.estimate_tokens(most) == math.ceil(97 * 1.25) + 100
    assert limiter.estimate_tokens(Usage(800, 100)) == math.ceil(2 * 97 * 1.25) + 100
    assert limiter.estimate_tokens(Usage(400, 0)) == math.ceil(97 * 1.25) + 13


def test_an_endpoint_has_one_quota_in_all_loops() -> None:
    limiter = RateLimiter(RateLimitPolicy(share=0.5))
    assert limiter.get_endpoint_quota("a", None, None, 60.0) is None
    assert not limiter.counts_tokens
    quota = limiter.get_endpoint_quota("a", None, 100, 60.0)
    assert quota is limiter.get_endpoint_quota("a", None, 100, 60.0)
    assert limiter.counts_tokens
    assert quota is not None
    assert [quota.reserve(n) for n in (50, 1)] == [0.0, math.inf]
    limiter.set_share(1.0)
    assert quota.reserve(50) == 0.0


def test_the_share_of_workers_with_endpoints_of_their_own_is_not_of_these() -> None:
    policy = RateLimitPolicy(tokens_per_min=100, share=0.5, shares_endpoints=False)
    limiter = RateLimiter(policy)
    quota = limiter.get_endpoint_quota("a", None, 100, 60.0)
    assert quota is not None
    assert quota.reserve(100) == 0.0
    assert limiter.quota is not None
    assert limiter.quota.reserve(51) == 0.0  # above the limit: alone
    assert limiter.quota.reserve(1) == math.inf
