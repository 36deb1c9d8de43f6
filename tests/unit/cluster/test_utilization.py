"""Each second of each server has one cause, from the journal or the servers' counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.cluster.utilization import (
    CAUSES,
    AnsweredItem,
    Interval,
    JobTime,
    ServerState,
    Utilization,
    compute_utilization,
    group_by_job,
    intervals_of_items,
    read_answered_items,
)

NOTHING = dict.fromkeys(CAUSES, 0.0)


def job(end: float, *did: tuple[Interval, ...], **changes: Any) -> JobTime:
    """A job from 0, whose items begin at 0 and go on to its end."""
    facts: dict[str, Any] = {"nodes": 1, "begin": 0, "end": end, "overhead_s": 0, "servers": 1}
    facts |= {"first_item_at": 0, "last_item_at": end, "was_stopped": False, "has_counts": True}
    facts |= {"intervals": did} | changes
    return JobTime(**{"inside_s": facts["nodes"] * end} | facts)


def by_journal(end: float, calls: list[AnsweredItem], **changes: Any) -> JobTime:
    (found,) = group_by_job(calls, [(0, end)], [True])
    did = tuple(intervals_of_items(own, 0, end) for own in found.calls.values())
    told = {"first_item_at": found.first, "last_item_at": found.last, "has_counts": False}
    return job(end, *did, **told | changes)


def busy(endpoint: str, begin: float, end: float, places: int) -> list[AnsweredItem]:
    return [AnsweredItem(endpoint, begin, end)] * places


def lost(share: Utilization) -> dict[str, float]:
    """Return the causes that cost anything."""
    return {cause: seconds for cause, seconds in share.lost_s.items() if seconds}


def test_each_second_has_one_cause() -> None:
    calls = [
        *busy("a", 10, 20, 2),  # cold: half of the places
        *busy("a", 20, 60, 4),  # full
        *busy("a", 60, 70, 1),  # starved
        *busy("a", 70, 75, 1),
    ]
    share = compute_utilization([by_journal(80, calls, was_stopped=True)], batch_size=4)
    assert (share.paid_s, share.full_s, share.busy_s) == (80, 40, 65)
    assert lost(share) == {"start-up": 10, "cold": 10, "starved": 10, "drain": 10}
    assert share.useful_share == 0.5
    assert (share.by_counts, share.by_journal) == (0, 1)


def test_the_end_of_a_finished_run_is_its_tail() -> None:
    share = compute_utilization([by_journal(20, busy("a", 0, 10, 4))], batch_size=4)
    assert share.full_s == 10
    assert lost(share) == {"tail": 10}


def test_a_server_that_never_answered_is_cold() -> None:
    share = compute_utilization(
        [by_journal(100, busy("a", 0, 100, 4), nodes=2, servers=2)], batch_size=4
    )
    assert (share.paid_s, share.full_s, share.busy_s) == (200, 100, 100)
    assert lost(share) == {"cold": 100}


def test_servers_share_their_node() -> None:
    calls = [*busy("a", 0, 100, 4), *busy("b", 50, 100, 4)]
    share = compute_utilization([by_journal(100, calls, servers=2)], batch_size=4)
    assert (share.paid_s, share.full_s) == (100, 75)
    assert lost(share) == {"cold": 25}


def test_places_are_what_the_busiest_server_kept_up() -> None:
    calls = [*busy("a", 0, 90, 8), *busy("a", 90, 91, 50)]
    assert compute_utilization([by_journal(100, calls)]).full_batch == 8


def test_no_items_no_share() -> None:
    share = compute_utilization([by_journal(100, [])])
    assert (share.useful_share, lost(share)) == (0, {"start-up": 100})
    assert compute_utilization([]).useful_share == 0


def test_a_life_of_a_server_by_its_own_counts() -> None:
    did = (
        Interval(2, 10, "starting"),
        Interval(10, 15),  # ready, and no item has begun
        Interval(15, 25, items=3),  # cold
        Interval(25, 45, items=4),
        Interval(45, 50, items=2, has_queue=True),  # what waits could not get in: full
        Interval(50, 60, items=1),  # starved
        Interval(60, 70, "down"),
        Interval(70, 85, items=4),
        Interval(85, 90, items=1),  # no further item begins since 80
        Interval(90, 100, "over"),
    )
    share = compute_utilization([job(105, did, first_item_at=15, last_item_at=80)], batch_size=4)
    assert (share.full_s, share.busy_s) == (40, 65)
    assert lost(share) == {
        "start-up": 15,
        "cold": 10,
        "starved": 10,
        "down": 10,
        "tail": 20,  # and who is over stays over
    }


def test_a_server_that_is_not_ready_while_others_work_starts_up() -> None:
    late = (Interval(0, 60, "starting"), Interval(60, 100, items=4))
    share = compute_utilization(
        [job(100, (Interval(0, 100, items=4),), late, nodes=2, servers=2)], 4
    )
    assert lost(share) == {"start-up": 60}


def test_a_server_that_never_has_enough_is_starved_once_it_works() -> None:
    """So it is where ``limits.streams`` is too small for all servers."""
    did = (Interval(0, 10), Interval(10, 100, items=2))
    assert lost(compute_utilization([job(100, did)], 4)) == {"cold": 10, "starved": 90}


def test_a_server_that_nobody_hears_of_again_is_down() -> None:
    assert lost(compute_utilization([job(100, (Interval(0, 40, items=4),))], 4)) == {"down": 60}


def test_a_node_that_is_lost_costs_nothing_more() -> None:
    """Slurm goes on with a smaller job: of two nodes for 100 s one was there for 40."""
    lives, lost_one = (Interval(0, 100, items=4),), (Interval(0, 30, items=4),)
    whole = job(100, lives, lost_one, nodes=2, servers=2)
    assert lost(compute_utilization([whole], 4)) == {"down": 70}
    share = compute_utilization([replace(whole, inside_s=140)], 4)
    assert (share.full_s, lost(share)) == (130, {"down": 10})
    share = compute_utilization([replace(whole, inside_s=100)], 4)  # less than its servers worked
    assert (share.full_s, lost(share)) == (100, {})


def test_what_the_scheduler_counts_besides_is_start_up() -> None:
    share = compute_utilization(
        [job(90, (Interval(0, 90, items=4),), nodes=2, servers=1, overhead_s=20)], 4
    )
    assert (share.paid_s, share.full_s) == (200, 180)
    assert lost(share) == {"start-up": 20}


def test_places_are_those_that_servers_count_where_any_do() -> None:
    """What waits in the client or in a server's queue is no place of its batch."""
    journal = by_journal(100, busy("a", 0, 100, 12))
    share = compute_utilization([journal, job(100, (Interval(0, 100, items=4, has_queue=True),))])
    assert (share.full_batch, share.by_counts, share.by_journal) == (4, 1, 1)
    assert share.useful_share == 1


def test_places_are_the_most_that_a_server_was_seen_to_work_on() -> None:
    """One that has too few items nearly all the time is starved, and not full of two."""
    did = (Interval(0, 1, items=4), Interval(1, 100, items=2))
    share = compute_utilization([job(100, did)])
    assert (share.full_batch, share.full_s, lost(share)) == (4, 1, {"starved": 99})
    assert compute_utilization([job(100, (Interval(0, 100, has_queue=True),))]).full_batch == 1


STATES: tuple[ServerState, ...] = ("starting", "up", "down", "over")
times = st.floats(-10, 120, allow_nan=False)
stretches = st.builds(
    Interval, times, times, st.sampled_from(STATES), st.integers(0, 6), st.booleans()
)
servers = st.lists(stretches, max_size=6).map(lambda did: tuple(sorted(did)))
jobs = st.builds(
    JobTime,
    nodes=st.integers(1, 5),
    begin=st.just(0.0),
    end=st.floats(1, 100),
    inside_s=st.floats(0, 500),
    overhead_s=st.floats(0, 50),
    servers=st.integers(0, 6),
    first_item_at=st.none() | times,
    last_item_at=st.none() | times,
    was_stopped=st.booleans(),
    has_counts=st.booleans(),
    intervals=st.lists(servers, max_size=4).map(tuple),
)


@given(st.lists(jobs, max_size=3), st.none() | st.integers(1, 5))
def test_causes_and_full_time_make_up_what_was_paid(all_jobs: list[JobTime], most: int) -> None:
    share = compute_utilization(all_jobs, most)
    assert share.full_s + sum(share.lost_s.values()) == pytest.approx(share.paid_s, abs=1e-6)
    assert share.paid_s == sum(one.paid_s for one in all_jobs)
    assert -1e-9 <= share.full_s <= share.busy_s + 1e-9 <= share.paid_s + 2e-6
    assert all(seconds >= 0 for seconds in share.lost_s.values())
    assert share.lost_s.keys() == NOTHING.keys()


def test_calls_are_read_from_journal_records() -> None:
    record = {"endpoint": "a", "latency_s": 2.5, "finished_at": "1970-01-01T00:00:10+00:00"}
    assert list(read_answered_items([record, record | {"endpoint": None}])) == [
        AnsweredItem("a", 7.5, 10)
    ]


def test_items_belong_to_the_job_in_which_they_ended() -> None:
    calls = [
        *busy("a", -5, 5, 1),
        *busy("a", 8, 15, 1),
        *busy("b", 18, 22, 1),
        *busy("b", 99, 99, 1),
    ]
    one, other = group_by_job(calls, [(0, 10), (20, 30)], [True, False])
    assert (one.first, one.last, dict(one.calls)) == (0, 0, {"a": [AnsweredItem("a", 0, 5)]})
    assert (other.first, other.last, dict(other.calls)) == (20, 20, {})


def test_levels_fill_the_jobs_time() -> None:
    did = intervals_of_items([AnsweredItem("a", 1, 4), AnsweredItem("a", 2, 9)], 0, 6)
    assert [(s.begin, s.end, s.items) for s in did] == [(0, 1, 0), (1, 2, 1), (2, 4, 2), (4, 6, 1)]
    assert replace(job(6), intervals=(did,)).paid_s == 6
