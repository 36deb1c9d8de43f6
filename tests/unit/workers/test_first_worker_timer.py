"""The wait for the first worker: fewer and fewer warnings, and an end."""

from __future__ import annotations

import pytest

from fanfold.backends.workers.member import FirstWorkerTimer


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_it_is_told_more_and_more_seldom(caplog: pytest.LogCaptureFixture) -> None:
    clock = Clock()
    arrival, told = FirstWorkerTimer(86_400.0, clock), list[int]()
    arrival.start()
    for seconds in range(0, 1000, 10):
        clock.now, before = 1000.0 + seconds, len(caplog.records)
        assert arrival.poll(2, has_responded=False) is None
        told += [seconds] * (len(caplog.records) - before)
    assert told == [60, 120, 240, 480, 960]
    assert (
        "no worker has responded in the 60 s since the first task was submitted (2 in flight)"
        in (caplog.messages[0])
    )
    assert "waits for 86400 s in all (backend.queue_s)" in caplog.messages[0]


def test_it_ends_once() -> None:
    clock = Clock()
    arrival = FirstWorkerTimer(30.0, clock)
    arrival.start()
    assert arrival.poll(2, has_responded=False) is None
    clock.now += 31.0
    assert "31 s since the first task was submitted (backend.queue_s)" in str(
        arrival.poll(2, has_responded=False)
    )
    assert arrival.poll(2, has_responded=False) is None


def test_whoever_was_heard_of_is_enough() -> None:
    clock = Clock()
    arrival = FirstWorkerTimer(30.0, clock)
    arrival.start()
    arrival.poll(2, has_responded=False)
    arrival.poll(2, has_responded=True)
    clock.now += 31.0
    assert arrival.poll(2, has_responded=False) is None


def test_time_without_orders_does_not_count() -> None:
    clock = Clock()
    arrival = FirstWorkerTimer(30.0, clock)
    arrival.start()
    clock.now += 31.0
    assert arrival.poll(0, has_responded=False) is None
    arrival.start()
    assert arrival.poll(2, has_responded=False) is None
