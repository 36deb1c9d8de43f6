"""Reports of workers for the timeline: by heartbeat files and by results."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.core.messages import ShardResult, ShardTask
from fanfold.backends.core.silence import SilenceWatch
from fanfold.backends.core.timeline import BinCounts, TimelineDelta
from fanfold.backends.fleet.endpoint import Endpoint, EndpointSpec
from fanfold.backends.fleet.timeline import TimelineRecorder
from fanfold.backends.storage.run_folder import RunFolder
from fanfold.backends.storage.timeline import read_timeline
from fanfold.graphs.remote import heartbeat
from fanfold.graphs.remote.heartbeat import ControlFiles, heartbeat_file
from fanfold.graphs.run.timeline import write_timeline

TASK = ShardTask("0-1", 0, "0", {"token": "t"}, {}, [(0, "i", {}, None)], None, None, 1, 60.0)


@pytest.fixture
def control(tmp_path: Path) -> ControlFiles:
    made = ControlFiles(tmp_path, "t", 60.0)
    made.open_session()
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return heartbeat_file(tmp_path, "t", "0-1", 0)


def report(calls: int) -> bytes:
    delta = TimelineDelta(1000)
    delta.add(int(1000 * time.time()), "a", BinCounts(calls))
    return orjson.dumps(delta.to_json(10_000))


def calls(control: ControlFiles) -> list[int]:
    return [sum(one.calls for one in got.delta.cells.values()) for got in control.take_reports()]


async def test_a_worker_reports_with_each_heartbeat(
    control: ControlFiles, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_BEAT_S", 0.01)
    endpoint = Endpoint(EndpointSpec("http://a:1/v1"))
    recorder = TimelineRecorder(lambda: [endpoint], 1000)
    control.create(file)
    seen, reported = 0, list[heartbeat.TimelineReport]()
    async with heartbeat.heartbeat(replace(TASK, journal=str(tmp_path)), "node:1") as signal:
        signal.recorder = recorder
        for number in range(1, 4):
            endpoint.stats.add_failure("EndpointError")
            while seen < number:
                await asyncio.sleep(0.01)
                control.poll()
                reported += control.take_reports()
                seen = sum(one.calls for got in reported for one in got.delta.cells.values())
        assert control.workers == {"node:1"}
        endpoint.stats.add_failure("EndpointError")
    rest = recorder.take()
    control.revoke(file)  # reads what came last
    reported += control.take_reports()
    total = sum(one.calls for got in reported for one in got.delta.cells.values())
    assert total + sum(one.calls for one in rest.cells.values()) == 4
    assert {got.worker for got in reported} == {"node:1"}
    assert not file.exists()


def test_reports_are_read_once_and_in_whole_lines(control: ControlFiles, file: Path) -> None:
    control.create(file)
    with file.open("ab") as opened:

        def add(data: bytes) -> None:
            opened.write(data)
            opened.flush()
            os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))
            control.poll()

        add(b"begun node:1\n\n" + report(1) + b"\n")
        assert calls(control) == [1]
        add(b"\n" + report(2)[:40])
        assert calls(control) == []
        add(report(2)[40:] + b"\n\n" + report(3) + b"\n")
        found = calls(control)
        assert found[-1] == 3
        control.poll()
        assert calls(control) == []


def test_damaged_reports_are_left_out_with_one_warning(
    control: ControlFiles, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    control.create(file)
    lines = [b"begun node:1", b"no JSON", b"[]", report(1)[:-5], b"\xff\xfe", report(7)]
    file.write_bytes(b"\n".join(lines) + b"\n")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1_000_000))
    control.poll()
    assert calls(control) == [7]
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "left out" in caplog.text


async def test_a_report_that_cannot_be_written_comes_with_the_next_one(
    control: ControlFiles, file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(heartbeat, "_BEAT_S", 0.01)
    real: Callable[..., None] = heartbeat._append
    refusals = [3]

    def append(*arguments: Any, **named: Any) -> None:
        if refusals[0]:
            refusals[0] -= 1
            raise OSError(28, "No space left on device")
        real(*arguments, **named)

    monkeypatch.setattr(heartbeat, "_append", append)
    endpoint = Endpoint(EndpointSpec("http://a:1/v1"))
    recorder = TimelineRecorder(lambda: [endpoint], 1000)
    endpoint.stats.add_failure("EndpointError")
    control.create(file)
    found = list[int]()
    async with heartbeat.heartbeat(replace(TASK, journal=str(tmp_path)), "node:1") as signal:
        signal.recorder = recorder
        while not found:
            await asyncio.sleep(0.01)
            control.poll()
            found += calls(control)
    assert found == [1]
    assert refusals == [0]


async def test_a_timeline_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    delta = TimelineDelta()
    delta.add(1_700_000_000_000, "a", BinCounts(5))
    blocked = tmp_path / ".timeline.arrow.partial"
    blocked.mkdir()
    reports = [[delta], []]
    async with write_timeline(
        RunFolder(tmp_path), lambda _: reports.pop() if reports else [], SilenceWatch()
    ):
        reports.reverse()
    assert "timeline.arrow" in caplog.text
    assert not (tmp_path / "timeline.arrow").exists()


async def test_a_damaged_timeline_is_named_and_begun_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "timeline.arrow").write_bytes(b"damaged")
    delta = TimelineDelta()
    delta.add(1_700_000_000_000, "a", BinCounts(5))
    async with write_timeline(RunFolder(tmp_path), lambda _: [delta], SilenceWatch()):
        pass
    assert "begins a new one" in caplog.text
    assert read_timeline(tmp_path / "timeline.arrow")["calls"].to_pylist() == [5]


@pytest.mark.parametrize(
    ("failures", "is_run", "writes"),
    [({}, False, False), ({"EndpointError": 1}, False, True), ({}, True, True)],
    ids=["all answered", "a failure", "no level"],
)
async def test_a_short_level_has_a_timeline_only_of_failures(
    tmp_path: Path, failures: dict[str, int], is_run: bool, writes: bool
) -> None:
    delta, reports = TimelineDelta(), list[list[TimelineDelta]]()
    delta.add(1_700_000_000_000, "a", BinCounts(5, failures))
    async with write_timeline(
        RunFolder(tmp_path),
        lambda _: reports.pop() if reports else [],
        SilenceWatch(),
        may_lack=not is_run,
    ):
        reports.append([delta])
    file = tmp_path / "timeline.arrow"
    assert file.exists() is writes
    assert not writes or read_timeline(file)["calls"].to_pylist() == [5]


def test_a_result_keeps_its_report_as_plain_json() -> None:
    delta = TimelineDelta(1000)
    delta.add(5_000, "a", BinCounts(2, {"EndpointError": 1}, 1.5, 3, 4, 0.5))
    result = ShardResult("0-1", 0, "0", "node:1", timeline=delta.to_json(1000))
    read = ShardResult.from_json(orjson.loads(orjson.dumps(result.to_json())))
    assert TimelineDelta.from_json(read.timeline).cells == delta.cells
