"""Who waits for the first worker is told so, more and more seldom, and not for ever."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from fanfold.backends.workers.member import Arrival


@dataclass
class Site:
    busy: int = 2
    heard: bool = False


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_it_is_told_more_and_more_seldom(caplog: pytest.LogCaptureFixture) -> None:
    clock, site = Clock(), Site()
    arrival, told = Arrival(86_400.0, clock), list[int]()
    arrival.sent()
    for seconds in range(0, 1000, 10):
        clock.now, before = 1000.0 + seconds, len(caplog.records)
        assert arrival.look([site]) is None
        told += [seconds] * (len(caplog.records) - before)
    assert told == [60, 120, 240, 480, 960]
    assert (
        "no worker has been heard of in the 60 s since the first order (2 are out)"
        in (caplog.messages[0])
    )
    assert "waits for 86400 s in all (backend.queue_s)" in caplog.messages[0]


def test_it_ends_once() -> None:
    clock, site = Clock(), Site()
    arrival = Arrival(30.0, clock)
    arrival.sent()
    assert arrival.look([site]) is None
    clock.now += 31.0
    assert "31 s since the first order (backend.queue_s)" in str(arrival.look([site]))
    assert arrival.look([site]) is None


def test_whoever_was_heard_of_is_enough() -> None:
    clock, site = Clock(), Site()
    arrival = Arrival(30.0, clock)
    arrival.sent()
    arrival.look([site])
    site.heard = True
    arrival.look([Site(), site])
    site.heard = False
    clock.now += 31.0
    assert arrival.look([site]) is None


def test_time_without_orders_does_not_count() -> None:
    clock, site = Clock(), Site()
    arrival = Arrival(30.0, clock)
    arrival.sent()
    site.busy = 0
    clock.now += 31.0
    assert arrival.look([site]) is None
    site.busy = 1
    arrival.sent()
    assert arrival.look([site]) is None
