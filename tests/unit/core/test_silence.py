"""Endpoints that answer nothing while others do, in fake time."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from fanfold.backends.core.errors import JournalError
from fanfold.backends.core.silence import SilenceWatch, name_endpoints
from fanfold.backends.core.timeline import BinCounts, TimelineDelta
from fanfold.backends.storage.run_folder import (
    RunFolder,
    read_silent_endpoints,
    write_silent_endpoints,
)

ANSWERS, WAITS, FAILS = BinCounts(2, {"X": 1}, 1.0), BinCounts(flight_s=5.0), BinCounts(3, {"X": 3})


@dataclass
class Lab:
    """A watch whose time passes when something is reported."""

    now: float = 50.0
    watch: SilenceWatch = field(init=False)

    def __post_init__(self) -> None:
        self.watch = SilenceWatch(lambda: self.now, lambda: 1e9 + self.now)

    def work(
        self, seconds: float, did: dict[str, BinCounts], down: tuple[str, ...] = ()
    ) -> set[str]:
        """Report the same every five seconds; return the silent endpoints."""
        for _ in range(round(seconds / 5)):
            self.now += 5
            delta = TimelineDelta()
            for name, counts in did.items():
                copied = BinCounts(counts.calls, dict(counts.failures), counts.flight_s)
                delta.add(int(1000 * self.now), name, copied)
            self.watch.add([delta], down)
        return set(self.watch.find_silent())


@pytest.mark.parametrize("silence", [WAITS, FAILS])
def test_one_that_answers_nothing_is_named_after_ten_minutes(
    silence: BinCounts, caplog: pytest.LogCaptureFixture
) -> None:
    lab = Lab()
    assert lab.work(590, {"a": ANSWERS, "b": silence}) == set()
    assert lab.work(20, {"a": ANSWERS, "b": silence}) == {"b"}
    assert lab.watch.find_silent() == {"b": 1e9 + 55}
    assert lab.work(5, {"a": ANSWERS, "b": ANSWERS}) == set()
    assert [record.message.split(" has answered")[0] for record in caplog.records] == [
        "endpoint b",
        "endpoint b answers again, or has left",
    ]


def test_one_that_is_down_from_the_begin_is_named() -> None:
    assert Lab().work(605, {"a": ANSWERS}, down=("b",)) == {"b"}


def test_none_is_named_if_none_answers() -> None:
    lab = Lab()
    assert lab.work(3600, {"a": WAITS, "b": FAILS}) == set()
    assert lab.work(5, {"a": ANSWERS, "b": FAILS}) == {"b"}


def test_one_that_keeps_the_last_items_waiting_is_named() -> None:
    """The other one has answered since then, and has nothing to do any more."""
    lab = Lab()
    lab.work(30, {"a": ANSWERS, "b": WAITS})
    assert lab.work(600, {"b": WAITS}) == {"b"}


def test_an_idle_endpoint_is_not_silent() -> None:
    lab = Lab()
    lab.work(5, {"a": ANSWERS, "b": ANSWERS})
    assert lab.work(3600, {"a": ANSWERS}) == set()


def test_a_pause_of_the_run_is_no_work() -> None:
    lab = Lab()
    lab.work(300, {"a": ANSWERS, "b": WAITS})
    lab.work(3600, {})
    assert lab.work(150, {"a": ANSWERS, "b": WAITS}) == set()
    assert lab.work(300, {"a": ANSWERS, "b": WAITS}) == {"b"}


def test_a_member_that_leaves_is_forgotten() -> None:
    lab = Lab()
    assert lab.work(700, {"a": ANSWERS, "b": WAITS}) == {"b"}
    lab.watch.add([], left=["b"])
    assert not lab.watch.find_silent()


def test_few_are_named_and_more_are_counted() -> None:
    assert name_endpoints("cab") == "a, b, c"
    assert name_endpoints("edcba") == "a, b, c and 2 more"


def test_the_run_folder_names_those_of_the_last_session(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert read_silent_endpoints(folder) == {}
    write_silent_endpoints(folder, {"b": 5.5})
    assert read_silent_endpoints(folder) == {"b": 5.5}
    write_silent_endpoints(folder, {})
    write_silent_endpoints(folder, {})
    assert not list(tmp_path.iterdir())
    folder.silent_endpoints.write_text('{"v": 1, "since": 3}')
    with pytest.raises(JournalError, match=r"silent.json.*remove it"):
        read_silent_endpoints(folder)
