"""The event log of a node's servers."""

from __future__ import annotations

from pathlib import Path

import pytest

from fanfold.backends.servers.events import EventLog, read_events


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
