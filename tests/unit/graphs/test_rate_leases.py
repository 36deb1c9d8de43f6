"""Shares of the rate limits: their sum in any window, and how workers read them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.messages import ShardTask
from fanfold.backends.fleet.policy import RateLimitPolicy
from fanfold.backends.fleet.rate_limit import RateLimiter
from fanfold.graphs.remote import rate_leases
from fanfold.graphs.remote.heartbeat import rates_file
from fanfold.graphs.remote.rate_leases import RateFile, RateLender, follow_share

WINDOW_S = 60.0


def test_two_of_many_workers_get_half_each() -> None:
    lender = RateLender(1 / 64, WINDOW_S)
    assert lender.update({"a", "b"}, 0.0) == {"a": 1 / 64, "b": 1 / 64}
    assert lender.update({"a", "b"}, 11.0) == {"a": 0.5, "b": 0.5}


def test_a_late_worker_waits_until_the_others_windows_have_ended() -> None:
    lender = RateLender(1 / 4, WINDOW_S)
    lender.update({"a"}, 0.0)
    assert lender.update({"a"}, 11.0) == {"a": 1.0}
    assert lender.update({"a", "b"}, 12.0) == {"a": 0.5, "b": 0.0}
    assert lender.update({"a", "b"}, 80.0) == {"a": 0.5, "b": 0.0}
    assert lender.update({"a", "b"}, 88.0) == {"a": 0.5, "b": 0.5}


def test_a_worker_between_two_tasks_keeps_its_share() -> None:
    lender = RateLender(1 / 2, WINDOW_S)
    lender.update({"a", "b"}, 0.0)
    assert lender.update({"a"}, 5.0) == {"a": 0.5, "b": 0.5}
    assert lender.update({"a", "b"}, 19.0) == {"a": 0.5, "b": 0.5}
    assert lender.update({"a"}, 50.0) == {"a": 0.5}
    assert lender.update({"a"}, 126.0) == {"a": 1.0}


@pytest.mark.parametrize("pause_s", [25.0, 300.0])
def test_workers_keep_their_shares_between_two_runs(pause_s: float) -> None:
    lender = RateLender(1 / 2, WINDOW_S)
    lender.update({"a", "b"}, 0.0)
    shares = {"a": 0.5, "b": 0.5}
    assert lender.update({"a", "b"}, 11.0) == shares
    lender.begin_run(11.0 + pause_s)
    assert lender.update({"a", "b"}, 12.0 + pause_s) == shares


def test_other_workers_have_shares_at_once_after_a_long_pause() -> None:
    lender = RateLender(1 / 2, WINDOW_S)
    lender.update({"a", "b"}, 0.0)
    lender.begin_run(300.0)
    assert lender.update({"c", "d"}, 301.0) == {"c": 0.5, "d": 0.5}


def test_other_workers_wait_after_a_short_pause() -> None:
    lender = RateLender(1 / 2, WINDOW_S)
    lender.update({"a", "b"}, 0.0)
    lender.begin_run(30.0)
    assert lender.update({"c", "d"}, 31.0) == {"a": 0.25, "b": 0.25, "c": 0.0, "d": 0.0}
    assert sum(lender.update({"c", "d"}, 60.0).values()) == 0.0
    assert lender.update({"c", "d"}, 140.0) == {"c": 0.5, "d": 0.5}


@given(
    st.lists(
        st.tuples(st.floats(0.1, 40.0), st.sets(st.sampled_from("abcdefgh"), max_size=8)),
        max_size=60,
    ),
    st.sampled_from([1.0, 0.5, 0.125, 1 / 64]),
)
def test_the_shares_of_any_window_add_up_to_one_at_most(
    steps: list[tuple[float, set[str]]], base: float
) -> None:
    lender, now = RateLender(base, WINDOW_S), 0.0
    history = list[tuple[float, dict[str, float]]]()
    for gap, workers in steps:
        now += gap
        history.append((now, dict(lender.update(workers, now))))
        least = now - WINDOW_S - 10.0  # a worker may use a share so long after it was lowered
        known = [shares for at, shares in history if at > least]
        before = [shares for at, shares in history if at <= least][-1:]
        most = dict[str, float]()
        for shares in (*before, *known):
            for worker, share in shares.items():
                most[worker] = max(most.get(worker, 0.0), share)
        assert sum(most.values()) <= 1.0 + 1e-6


def make_limiter() -> RateLimiter:
    return RateLimiter(RateLimitPolicy(tokens_per_min=1000, share=0.25))


def make_task(journal: Path | None) -> ShardTask:
    folder = None if journal is None else str(journal)
    return ShardTask("0-1", 0, "0", {"token": "t"}, {}, [], None, folder, 1, 60.0)


async def wait_for_share(limiter: RateLimiter, share: float) -> None:
    async with asyncio.timeout(30):
        while limiter.share != share:  # noqa: ASYNC110 - no event
            await asyncio.sleep(0.01)


async def test_a_worker_follows_its_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_leases, "_READ_S", 0.02)
    limiter, file = make_limiter(), RateFile(tmp_path, "t", RateLender(0.25, WINDOW_S))
    async with follow_share(make_task(tmp_path), limiter, "w:1"):
        assert limiter.share == 0.25  # nothing is lent yet
        rates_file(tmp_path, "t").write_text('{"shares": {"w:1": 0.75}}')
        await wait_for_share(limiter, 0.75)
        rates_file(tmp_path, "t").write_text('{"shares": {"w:1": 0}}')
        await wait_for_share(limiter, 0.0)
        assert limiter.quota is not None
        assert limiter.quota.reserve(1) > 0
        file.update({"w:1"})
        await wait_for_share(limiter, 0.25)
    file.remove()
    assert not rates_file(tmp_path, "t").exists()


async def test_a_worker_that_is_not_named_waits_and_then_uses_the_common_share(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_leases, "_READ_S", 0.02)
    monkeypatch.setattr(rate_leases, "_LOST_S", 0.2)
    rates_file(tmp_path, "t").write_text('{"shares": {"other:1": 1.0}}')
    limiter = make_limiter()
    async with follow_share(make_task(tmp_path), limiter, "w:1"):
        assert limiter.share == 0.0
        await wait_for_share(limiter, 0.25)


@pytest.mark.parametrize("text", ["", "[]", '{"shares": 5}', '{"shares": {"w:1": "x"}}'])
async def test_a_damaged_file_lowers_the_share_to_the_common_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    monkeypatch.setattr(rate_leases, "_READ_S", 0.02)
    monkeypatch.setattr(rate_leases, "_LOST_S", 0.2)
    limiter = make_limiter()
    limiter.set_share(1.0)
    rates_file(tmp_path, "t").write_text(text)
    async with follow_share(make_task(tmp_path), limiter, "w:1"):
        await wait_for_share(limiter, 0.25)


async def test_without_a_shared_folder_a_worker_keeps_its_share() -> None:
    limiter = make_limiter()
    async with follow_share(make_task(None), limiter, "w:1"):
        assert limiter.share == 0.25
