from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

import pytest

from fanfold.backends.cluster.chain import Chain, Job
from fanfold.backends.cluster.hours import Call, calls_of, spent, useful_share
from fanfold.backends.cluster.schedulers import Used


def at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds")


def job(begin: float, end: float, code: int = 5) -> Job:
    return Job("1", 1, 3600, at(0), began=at(begin), ended=at(end), code=code)


def busy(endpoint: str, begin: float, end: float, places: int) -> list[Call]:
    return [Call(endpoint, begin, end)] * places


def test_each_second_has_one_cause() -> None:
    calls = [
        *busy("a", 10, 20, 2),  # cold: half of the places
        *busy("a", 20, 60, 4),  # full
        *busy("a", 60, 70, 1),  # starved
        *busy("a", 70, 75, 1),
    ]
    share = useful_share([job(0, 80)], calls, 1, places=4)
    assert share.paid_s == 80
    assert share.full_s == 40
    assert share.lost_s == {"start-up": 10, "cold": 10, "starved": 10, "tail": 0, "drain": 10}
    assert share.useful == 0.5


def test_the_end_of_a_finished_run_is_its_tail() -> None:
    share = useful_share([job(0, 20, code=0)], busy("a", 0, 10, 4), 1, places=4)
    assert share.full_s == 10
    assert share.lost_s["tail"] == 10


def test_a_server_that_never_answered_is_cold() -> None:
    one = replace(job(0, 100), nodes=2)
    share = useful_share([one], busy("a", 0, 100, 4), 1, places=4)
    assert (share.paid_s, share.full_s) == (200, 100)
    assert share.lost_s["cold"] == 100


def test_servers_share_their_node() -> None:
    calls = [*busy("a", 0, 100, 4), *busy("b", 50, 100, 4)]
    share = useful_share([job(0, 100)], calls, 2, places=4)
    assert (share.paid_s, share.full_s) == (100, 75)
    assert share.lost_s["cold"] == 25


def test_causes_and_full_time_make_up_what_was_paid() -> None:
    calls = [*busy("a", 3, 9, 5), *busy("b", 1, 30, 3), *busy("a", 12, 44, 2)]
    share = useful_share([job(0, 50), job(60, 70)], calls, 3)
    assert share.full_s + sum(share.lost_s.values()) == pytest.approx(share.paid_s)


def test_places_are_what_the_busiest_server_kept_up() -> None:
    calls = [*busy("a", 0, 90, 8), *busy("a", 90, 91, 50)]
    assert useful_share([job(0, 100)], calls, 1).places == 8


def test_no_items_no_share() -> None:
    share = useful_share([job(0, 100)], [], 1)
    assert (share.useful, share.lost_s["start-up"]) == (0, 100)
    assert useful_share([], [], 1).useful == 0


def test_calls_are_read_from_journal_records() -> None:
    record = {"endpoint": "a", "latency_s": 2.5, "finished_at": at(10)}
    assert calls_of([record, record | {"endpoint": None}]) == [Call("a", 7.5, 10)]


def test_the_schedulers_numbers_come_first() -> None:
    chain = Chain((job(0, 50), replace(job(60, 70), id="2"), replace(job(80, 90), id="3")))
    used = {"1": Used(4, 55, "COMPLETED"), "3": Used(4, 0, "PENDING")}
    found = spent(chain, used)
    assert [(s.node_s, s.by_scheduler) for s in found] == [(220, True), (10, False), (10, False)]
