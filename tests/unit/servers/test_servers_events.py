"""Node-seconds from the events of a node's servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.servers.events import EventLog, ServerSeconds, read_events, server_seconds


def line(at: float, event: str, instance: int | None = None, **what: Any) -> dict[str, Any]:
    own = {} if instance is None else {"instance": instance}
    return {"v": 1, "at": at, "host": "n", "event": event} | own | what


LIFE = [
    line(0, "begin", instances=2),
    line(0, "start", 0),
    line(0, "start", 1),
    line(10, "ready", 0),
    line(20, "ready", 1),
    line(50, "out", 1),
    line(60, "back", 1),
    line(70, "down", 0),
    line(71, "start", 0),
    line(90, "ready", 0),
    line(100, "end"),
]


def test_a_life_adds_up() -> None:
    """One: 10 to 70 and 90 to 100; the other: 20 to 50 and 60 to 100."""
    assert server_seconds(LIFE) == ServerSeconds(startup=15, down=15, up=70, paid=100)


def test_out_and_then_down_counts_once() -> None:
    lines = [line(0, "begin", instances=1), line(5, "ready", 0), line(6, "out", 0)]
    lines += [line(8, "down", 0), line(9, "given_up", 0), line(10, "end")]
    assert server_seconds(lines) == ServerSeconds(startup=5, down=4, up=1, paid=10)


@pytest.mark.parametrize(("until", "up"), [(None, 80.0), (200.0, 190.0), (50.0, 80.0)])
def test_a_node_that_was_lost(until: float | None, up: float) -> None:
    lines = [line(0, "begin", instances=1), line(10, "ready", 0), line(90, "alive", ready=1)]
    found = server_seconds(lines, until)
    assert (found.startup, found.up, found.paid) == (10, up, 10 + up)


def test_never_ready_and_nothing_at_all() -> None:
    lines = [line(0, "begin", instances=1), line(1, "start", 0), line(30, "end")]
    assert server_seconds(lines) == ServerSeconds(startup=30, down=0, up=0, paid=30)
    assert server_seconds([]) == ServerSeconds(0, 0, 0, 0)


def test_several_times() -> None:
    again = [entry | {"at": entry["at"] + 1000} for entry in LIFE]
    assert server_seconds([*LIFE, *again]) == ServerSeconds(30, 30, 140, 200)


def test_lines_are_read_back_and_torn_ones_left_out(tmp_path: Path) -> None:
    record = EventLog(tmp_path / "n.jsonl", "n")
    record.append("begin", instances=1)
    record.append("ready", instance=0, seconds=1.5)
    record.close()
    with (tmp_path / "n.jsonl").open("a") as file:
        file.write('{"v": 99, "event": "x"}\n{"v": 1, "at": 12, "eve')
    found = read_events(tmp_path / "n.jsonl")
    assert [entry["event"] for entry in found] == ["begin", "ready"]
    assert found[1]["seconds"] == 1.5


def test_a_full_disk_ends_nothing(caplog: pytest.LogCaptureFixture) -> None:
    record = EventLog(Path("/dev/full"), "n")
    record.append("ready", instance=0)
    record.close()
    assert "ready is not recorded: No space left" in caplog.text
