"""Each second of each server has one cause, from the servers' counts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.cluster.utilization import (
    CAUSES,
    Interval,
    JobTime,
    ServerState,
    Utilization,
    compute_utilization,
)

NOTHING = dict.fromkeys(CAUSES, 0.0)


def job(end: float, *did: tuple[Interval, ...], **changes: Any) -> JobTime:
    """A job from 0 whose servers reported what they did."""
    facts: dict[str, Any] = {"nodes": 1, "begin": 0, "end": end, "overhead_s": 0, "servers": 1}
    facts |= {"was_stopped": False, "is_measured": True, "intervals": did} | changes
    return JobTime(**{"inside_s": facts["nodes"] * end} | facts)


def lost(share: Utilization) -> dict[str, float]:
    """Return the causes that cost anything."""
    return {cause: seconds for cause, seconds in share.lost_s.items() if seconds}


def test_each_second_has_one_cause() -> None:
    did = (
        Interval(0, 10),  # ready, and no item has begun
        Interval(10, 20, items=2),  # cold: half of the batch
        Interval(20, 60, items=4),
        Interval(60, 65, items=1),  # starved
        Interval(65, 70, items=2),
        Interval(70, 75, items=1),  # from here on the load only falls
        Interval(75, 80),
    )
    share = compute_utilization([job(80, did, was_stopped=True)], batch_size=4)
    assert (share.paid_s, share.full_s, share.busy_s) == (80, 40, 65)
    assert lost(share) == {"start-up": 10, "cold": 10, "starved": 10, "drain": 10}
    assert share.useful_share == 0.5
    assert (share.measured, share.unmeasured, share.unknown_s) == (1, 0, 0)


def test_the_end_of_a_finished_run_is_its_tail() -> None:
    did = (Interval(0, 10, items=4), Interval(10, 15, items=2), Interval(15, 20))
    share = compute_utilization([job(20, did)], batch_size=4)
    assert share.full_s == 10
    assert lost(share) == {"tail": 10}


def test_a_few_requests_sent_again_do_not_end_the_tail() -> None:
    """At the end of a run the slowest requests are sent to a second server, too."""
    busy = (Interval(0, 50, items=100), Interval(50, 80, items=20), Interval(80, 100))
    other = (Interval(0, 50, items=100), Interval(50, 60), Interval(60, 80, items=2))
    share = compute_utilization([job(100, busy, other, servers=2)])
    assert (share.full_batch, share.full_s) == (100, 50)
    assert lost(share) == {"tail": 40, "down": 10}


def test_the_tail_begins_when_the_last_server_gets_no_more() -> None:
    early = (Interval(0, 40, items=4), Interval(40, 100))
    late = (Interval(0, 60, items=4), Interval(60, 100, items=1))
    share = compute_utilization([job(100, early, late, servers=2)])
    assert lost(share) == {"starved": 10, "tail": 40}


def test_a_server_that_never_worked_is_cold() -> None:
    did = (Interval(0, 100, items=4),)
    share = compute_utilization([job(100, did, nodes=2, servers=2)], batch_size=4)
    assert (share.paid_s, share.full_s, share.busy_s) == (200, 100, 100)
    assert lost(share) == {"cold": 100}


def test_servers_share_their_node() -> None:
    late = (Interval(0, 50), Interval(50, 100, items=4))
    share = compute_utilization(
        [job(100, (Interval(0, 100, items=4),), late, servers=2)], batch_size=4
    )
    assert (share.paid_s, share.full_s) == (100, 75)
    assert lost(share) == {"cold": 25}


def test_no_items_no_share() -> None:
    share = compute_utilization([job(100)])
    assert (share.useful_share, lost(share)) == (0, {"start-up": 100})
    assert compute_utilization([]).useful_share is None


def test_a_job_without_counts_is_unknown() -> None:
    silent = job(50, overhead_s=10, is_measured=False)
    share = compute_utilization([silent])
    assert (share.useful_share, share.measured_s, share.unknown_s) == (None, 0, 60)
    assert (lost(share), share.measured, share.unmeasured) == ({}, 0, 1)
    share = compute_utilization([silent, job(100, (Interval(0, 100, items=4),))])
    assert (share.paid_s, share.unknown_s, share.full_s, share.useful_share) == (160, 60, 100, 1)


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
        Interval(85, 90, items=1),  # no further item begins
        Interval(90, 100, "over"),
    )
    share = compute_utilization([job(105, did)], batch_size=4)
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
    share = compute_utilization([job(100, (Interval(0, 100, items=2),), did, nodes=2)], 4)
    assert lost(share) == {"starved": 190, "cold": 10}


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


def test_places_are_the_most_that_a_server_was_seen_to_work_on() -> None:
    """One that has too few items nearly all the time is starved, and not full of two."""
    did = (Interval(0, 1, items=4), Interval(1, 60, items=1), Interval(60, 100, items=2))
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
    was_stopped=st.booleans(),
    is_measured=st.booleans(),
    intervals=st.lists(servers, max_size=4).map(tuple),
)


@given(st.lists(jobs, max_size=3), st.none() | st.integers(1, 5))
def test_causes_and_full_time_make_up_what_was_paid(all_jobs: list[JobTime], most: int) -> None:
    share = compute_utilization(all_jobs, most)
    assert share.full_s + sum(share.lost_s.values()) == pytest.approx(share.measured_s, abs=1e-6)
    assert share.paid_s == sum(one.paid_s for one in all_jobs)
    assert -1e-9 <= share.full_s <= share.busy_s + 1e-9 <= share.measured_s + 2e-6
    assert all(seconds >= 0 for seconds in share.lost_s.values())
    assert share.lost_s.keys() == NOTHING.keys()
