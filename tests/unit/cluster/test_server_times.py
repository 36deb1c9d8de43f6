"""Times of servers, from the nodes' event logs, and their utilization."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fanfold.backends.cluster.utilization import (
    Interval,
    JobServers,
    JobTime,
    compute_utilization,
    read_job_servers,
)
from fanfold.backends.core.errors import JournalError


def line(at: float, event: str, instance: int | None = None, **what: Any) -> dict[str, Any]:
    own = {} if instance is None else {"instance": instance}
    return {"v": 1, "at": at, "host": "n", "event": event} | own | what


def load(at: float, *running: int | None, waiting: int = 0) -> dict[str, Any]:
    return line(at, "load", running=list(running), waiting=[waiting] * len(running))


def write(folder: Path, host: str, *lines: dict[str, Any]) -> None:
    file = folder / "logs" / f"{host}.jsonl"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(b"".join(orjson.dumps(one) + b"\n" for one in lines))


def told(folder: Path, end: float = 100.0) -> JobServers:
    (found,) = read_job_servers(folder, [(0, end)])
    return found


def test_a_server_from_its_start_to_its_end(tmp_path: Path) -> None:
    write(
        tmp_path,
        "n1",
        line(1, "begin", instances=2),
        line(1, "start", 0),
        line(10, "ready", 0),
        load(12, 3, None),
        load(20, 4, None, waiting=2),
        load(30, None, None),  # it did not say: as before
        line(40, "down", 0),
        line(41, "start", 0),
        line(50, "ready", 0),
        load(55, 2, None),
        line(58, "out", 0),
        line(60, "back", 0),
        line(61, "given_up", 1),
        line(90, "end", why="stopped"),
    )
    found = told(tmp_path)
    assert found.has_counts
    assert found.intervals["n1", 0] == [
        Interval(1, 10, "starting"),
        Interval(10, 12),
        Interval(12, 20, "up", 3),
        Interval(20, 40, "up", 4, has_queue=True),
        Interval(40, 50, "down"),
        Interval(50, 55),
        Interval(55, 58, "up", 2),
        Interval(58, 60, "down", 2),
        Interval(60, 90, "up", 2),
        Interval(90, 100, "over"),
    ]
    assert found.intervals["n1", 1] == [
        Interval(1, 61, "starting"),
        Interval(61, 90, "down"),
        Interval(90, 100, "over"),
    ]


@pytest.mark.parametrize(
    ("end", "rest"),
    [
        (100.0, [Interval(20, 100, "up", 4)]),  # it says so once a minute only
        (500.0, [Interval(20, 70, "up", 4), Interval(70, 500, "down")]),
    ],
)
def test_a_lost_node_has_no_end(tmp_path: Path, end: float, rest: list[Interval]) -> None:
    lines = [line(0, "begin", instances=1), line(10, "ready", 0), load(20, 4)]
    write(tmp_path, "n1", *lines, line(70, "alive", ready=1))
    assert told(tmp_path, end).intervals["n1", 0] == [
        Interval(0, 10, "starting"),
        Interval(10, 20),
        *rest,
    ]


def test_a_keeper_that_was_killed_leaves_its_servers_down(tmp_path: Path) -> None:
    lines = [line(0, "begin", instances=1), line(10, "ready", 0), load(20, 4)]
    write(tmp_path, "n1", *lines, line(70, "end", why="supervisor lost"))
    assert told(tmp_path).intervals["n1", 0][-1] == Interval(70, 100, "down")


def test_small_changes_are_one_stretch(tmp_path: Path) -> None:
    lines = [line(0, "begin", instances=1), line(0, "ready", 0)]
    write(tmp_path, "n1", *lines, load(1, 256), load(6, 250), load(11, 254), load(16, 240))
    assert [s.items for s in told(tmp_path).intervals["n1", 0]] == [0, 256, 240]


def test_records_go_to_the_job_in_which_they_began(tmp_path: Path) -> None:
    first = [line(1, "begin", instances=1), line(2, "ready", 0), load(3, 1), line(9, "end")]
    again = [one | {"at": one["at"] + 20} for one in first if one["event"] != "load"]
    other = [one | {"at": one["at"] + 40} for one in first]
    write(tmp_path, "n1", *first, *again, *other)
    one, two, none = read_job_servers(tmp_path, [(0, 15), (20, 35), (70, 80)])
    assert (one.has_counts, two.has_counts, none.has_counts) == (True, False, False)
    assert (one.is_measured, two.is_measured, none.is_measured) == (True, False, False)
    assert (len(one.intervals), len(two.intervals), len(none.intervals)) == (1, 1, 0)


def test_servers_that_were_never_ready_need_no_counts(tmp_path: Path) -> None:
    write(
        tmp_path, "n1", line(1, "begin", instances=1), line(1, "start", 0), line(9, "given_up", 0)
    )
    found = told(tmp_path)
    assert (found.has_counts, found.is_measured) == (False, True)


def test_no_records_and_one_that_cannot_be_read(tmp_path: Path) -> None:
    assert told(tmp_path) == JobServers()
    (tmp_path / "logs" / "n1.jsonl").mkdir(parents=True)
    with pytest.raises(JournalError, match=r"n1\.jsonl: cannot be read: Is a directory"):
        told(tmp_path)


ats = st.floats(0, 400)
counts = st.none() | st.integers(0, 9)
events = st.one_of(
    st.builds(
        line,
        ats,
        st.sampled_from(["start", "ready", "out", "back", "down", "given_up"]),
        st.integers(0, 1),
    ),
    st.builds(load, ats, counts, counts, waiting=st.integers(0, 1)),
    st.builds(line, ats, st.just("alive"), ready=st.integers(0, 2)),
    st.builds(line, ats, st.just("begin"), instances=st.integers(1, 2)),
    st.builds(line, ats, st.just("end"), why=st.sampled_from(["stopped", "supervisor lost"])),
)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(events, max_size=12), st.floats(1, 400))
def test_whatever_is_recorded_makes_up_what_was_paid(
    tmp_path: Path, lines: list[dict[str, Any]], end: float
) -> None:
    lines = sorted(lines, key=lambda one: float(one["at"]))
    write(tmp_path, "n1", line(0, "begin", instances=2), *lines)
    found = told(tmp_path, end)
    did = tuple(tuple(one) for one in found.intervals.values())
    job = JobTime(2, 0, end, 2 * end, 10, 4, was_stopped=False, is_measured=True, intervals=did)
    share = compute_utilization([job], batch_size=4)
    assert share.full_s + sum(share.lost_s.values()) == pytest.approx(share.paid_s, abs=1e-6)
    assert share.paid_s == 2 * end + 10
