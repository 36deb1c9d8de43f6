"""What a process reports for the timeline: bins, times in flight, JSON and clocks."""

from __future__ import annotations

import copy
from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.timeline import BinCounts, ClockAlignment, TimelineDelta
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.endpoint import Endpoint, EndpointSpec
from fanfold.backends.fleet.timeline import TimelineRecorder

WALL_S = 1_700_000_000.0


class Clock:
    """The monotonic time, moved by hand."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("fanfold.backends.fleet.stats.time.monotonic", made)
    return made


def make_recorder(clock: Clock, *endpoints: Endpoint, width_ms: int = 250) -> TimelineRecorder:
    members = list(endpoints)
    return TimelineRecorder(
        lambda: members, width_ms, clock=clock, wall=lambda: WALL_S + clock.now - 100
    )


def bins(delta: TimelineDelta) -> dict[tuple[int, str], BinCounts]:
    return {(at - round(1000 * WALL_S), name): one for (at, name), one in delta.cells.items()}


def test_calls_and_time_in_flight_go_to_their_bins(clock: Clock) -> None:
    endpoint, idle = (
        Endpoint(EndpointSpec("http://a:1/v1")),
        Endpoint(EndpointSpec("http://b:1/v1")),
    )
    recorder = make_recorder(clock, endpoint, idle)
    endpoint.flight.begin()
    endpoint.flight.begin()
    for _ in range(4):
        clock.now += 0.25
        recorder.update()
    endpoint.flight.end()
    endpoint.stats.add_answer(1.0, Usage(7, 9))
    endpoint.flight.end()
    endpoint.stats.add_failure("EndpointLostError")
    clock.now += 0.25
    found = bins(recorder.take())
    assert {name for _, name in found} == {endpoint.label}
    assert [found[at, endpoint.label].flight_s for at in (0, 250, 500, 750)] == [0.5] * 4
    assert found[1000, endpoint.label] == BinCounts(2, {"EndpointLostError": 1}, 0.0, 7, 9, 1.0)
    clock.now += 100
    assert not recorder.take()  # idle endpoints cost nothing


def test_a_late_update_spreads_the_time_in_flight(clock: Clock) -> None:
    endpoint = Endpoint(EndpointSpec("http://a:1/v1"))
    recorder = make_recorder(clock, endpoint)
    endpoint.flight.begin()
    clock.now += 1.125  # the loop was busy
    found = bins(recorder.take())
    spread = {at: one.flight_s for (at, _), one in found.items()}
    assert spread == pytest.approx({0: 0.25, 250: 0.25, 500: 0.25, 750: 0.25, 1000: 0.125})
    clock.now += 1e6  # the process was suspended
    found = bins(recorder.take())
    assert sum(one.flight_s for one in found.values()) == pytest.approx(1e6)
    assert len(found) == 1


def test_a_report_that_was_not_sent_is_part_of_the_next_one(clock: Clock) -> None:
    endpoint = Endpoint(EndpointSpec("http://a:1/v1"))
    recorder = make_recorder(clock, endpoint, width_ms=1000)
    endpoint.stats.add_failure("EndpointError")
    unsent = recorder.take()
    endpoint.stats.add_failure("EndpointError")
    recorder.put_back(unsent)
    taken = recorder.take(8000)
    assert sum(one.failures["EndpointError"] for one in taken.cells.values()) == 2
    endpoint.stats.add_failure("EndpointError")
    assert recorder.take().width_ms == 8000


CELLS = st.lists(
    st.tuples(
        st.integers(0, 10_000_000),
        st.sampled_from(["a", "b:8000/v1", "ü\x1b[31m"]),
        st.builds(
            BinCounts,
            calls=st.integers(100, 10_000),
            failures=st.dictionaries(st.sampled_from(["X", "EndpointError"]), st.integers(1, 50)),
            flight_s=st.integers(0, 10**6),
            input_tokens=st.integers(0, 2**40),
            output_tokens=st.integers(0, 2**40),
            latency_s=st.integers(0, 10**6),
        ),
    ),
    max_size=300,
)


def totals(delta: TimelineDelta) -> dict[str, BinCounts]:
    sums: dict[str, BinCounts] = {}
    for (_, name), one in copy.deepcopy(delta.cells).items():
        sums.setdefault(name, BinCounts()).add(one)
    return sums


@given(CELLS, st.integers(500, 50_000))
def test_a_report_keeps_to_its_size_and_loses_nothing(
    cells: list[tuple[int, str, BinCounts]], most: int
) -> None:
    delta = TimelineDelta(1000, 256)
    for at, name, one in cells:
        delta.add(at, name, copy.deepcopy(one))
    wanted = totals(delta)
    assert len({at for at, _ in delta.cells}) <= 256
    data = orjson.dumps(delta.to_json(most))
    assert len(data) <= most + 200 or len({at for at, _ in delta.cells}) == 1
    read = TimelineDelta.from_json(orjson.loads(data))
    assert totals(read) == wanted
    assert read.cells == delta.cells


GOOD: dict[str, Any] = {
    "v": 1,
    "sent": 10,
    "first": 0,
    "width": 250,
    "endpoints": ["a"],
    "rows": [[0, 0, 1, 2, 3, 4, 5, {"EndpointError": 1}]],
}


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"sent": -1},
        {"sent": 1 << 60},
        {"first": 1},
        {"width": 300},
        {"width": [250]},
        {"width": 250 << 60},
        {"endpoints": "a"},
        {"endpoints": [1]},
        {"endpoints": ["a" * 5000]},
        {"rows": {}},
        {"rows": [[0, 1, 1, 2, 3, 4, 5]]},
        {"rows": [[0, 0, 1.5, 2, 3, 4, 5]]},
        {"rows": [[0, 0, True, 2, 3, 4, 5]]},
        {"rows": [[1 << 62, 0, 1, 2, 3, 4, 5]]},
        {"rows": [[0, 0, 1, 2, 3, 4, 5, {"EndpointError": 2}]]},
        {"rows": [[0, 0, 1, 2, 3, 4, 5, {"no class": 1}]]},
        {"rows": [[0, 0, 1, 2, 3, 4, 5, []]]},
        {"rows": [[0, 0, 1]]},
        {"rows": [None]},
    ],
)
def test_foreign_reports_are_checked(change: dict[str, Any]) -> None:
    assert TimelineDelta.from_json(GOOD).cells
    with pytest.raises(ValueError, match=r"\w"):
        TimelineDelta.from_json(GOOD | change)
    with pytest.raises(ValueError, match=r"\w"):
        TimelineDelta.from_json([GOOD])


def sent(first_ms: int, sent_ms: int) -> TimelineDelta:
    delta = TimelineDelta(1000)
    delta.add(first_ms, "a", BinCounts(1))
    delta.sent_ms = sent_ms
    return delta


@pytest.mark.parametrize("skew_ms", [0, 700_000, -700_000])
def test_a_wrong_clock_is_aligned_to_within_the_way_of_a_message(skew_ms: int) -> None:
    """The worker reports every 2 s from its start, and each report takes up to 2 s."""
    alignment = ClockAlignment()
    begin_ms = 10_000_000
    for beat in range(100):
        first = begin_ms + 2000 * beat
        delta = sent(first + skew_ms, first + 2000 + skew_ms)
        shift = alignment.update(delta, begin_ms - 300, first + 2000 + (37 * beat) % 2000)
        assert abs(shift + skew_ms) <= 2000
        assert skew_ms or not shift


def test_a_result_of_an_earlier_session_is_not_later_than_now() -> None:
    assert ClockAlignment().update(sent(5_000, 6_000), None, 900_000) == 0
    assert ClockAlignment().update(sent(905_000, 906_000), None, 900_000) == -6_000
    delta = sent(905_000, 906_000)
    delta.shift(-6_000)
    assert delta.first_ms == 899_000
