"""Control files of coordinator and workers, and what they mean."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fanfold.backends.core.errors import JournalError
from fanfold.backends.core.messages import DUPLICATE_REASON, ShardTask
from fanfold.graphs.remote import heartbeat
from fanfold.graphs.remote.heartbeat import MISSED_POLLS, ControlFiles, heartbeat_file, stop_file

SILENCE_S = 2.0
ORDER = ShardTask("0-1", 0, "0", {"token": "t"}, {}, [(0, "i", {}, None)], None, None, 1, 60.0)


@pytest.fixture
def signs(tmp_path: Path) -> ControlFiles:
    made = ControlFiles(tmp_path, "t", SILENCE_S)
    made.open_session()
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return heartbeat_file(tmp_path, "t", "0-1", 0)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Return what lets seconds pass."""
    real, passed = time.monotonic, [0.0]
    monkeypatch.setattr(
        "fanfold.graphs.remote.heartbeat.time.monotonic", lambda: real() + passed[0]
    )

    def let_pass(seconds: float) -> None:
        passed[0] += seconds

    return let_pass


def test_silence_begins_with_the_first_sign(
    signs: ControlFiles, file: Path, later: Callable[[float], None]
) -> None:
    silent = signs.create(file)
    later(100)
    signs.poll()
    assert silent() is None  # not touched yet
    os.utime(file)
    signs.poll()
    assert silent() == 0
    later(0.3)
    signs.poll()
    assert silent() == pytest.approx(0.3, abs=0.1)
    os.utime(file, (1, 1))  # by another clock
    signs.poll()
    assert silent() == 0


def test_a_pause_of_the_coordinator_is_nobodys_silence(
    signs: ControlFiles, file: Path, later: Callable[[float], None]
) -> None:
    """If the file system does not answer for minutes, worker and coordinator both wait."""
    silent = signs.create(file)
    os.utime(file)
    signs.poll()
    for looks in range(1, MISSED_POLLS + 2):
        later(100 * SILENCE_S)
        signs.poll()
        assert silent() == pytest.approx(looks * SILENCE_S / MISSED_POLLS)
    signs.revoke(file)
    signs.poll()
    assert silent() == pytest.approx((MISSED_POLLS + 1) * SILENCE_S / MISSED_POLLS)


def test_what_cannot_be_looked_at_is_told_and_not_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    signs = ControlFiles(folder, "t", SILENCE_S)
    files = [heartbeat_file(folder, "t", "0-1", 0), heartbeat_file(tmp_path, "t", "1-2", 0)]
    beats = [signs.create(file) for file in files]
    for file in files:
        os.utime(file)
    signs.poll()
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("no folder")
    os.utime(files[1], (1, 1))
    for _ in range(3):
        signs.poll()
    assert beats[0]() == 0
    assert caplog.text.count(f"{files[0]}: cannot be read: Not a directory (1 such files)") == 1
    with pytest.raises(
        JournalError, match=r"heartbeat-t-0-1-0: cannot be created: Not a directory; fix"
    ):
        signs.create(files[0])
    signs.revoke(files[0])
    assert f"{files[0]}: cannot be removed: Not a directory" in caplog.text


@pytest.fixture
async def told(
    signs: ControlFiles, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[heartbeat.StopSignal]:
    """Handle a task as its worker does."""
    monkeypatch.setattr(heartbeat, "_BEAT_S", 0.01)
    monkeypatch.setattr(heartbeat, "_STOP_S", 0.01)
    signs.create(file)
    stop = str(stop_file(tmp_path, "t"))
    task = replace(ORDER, journal=str(tmp_path), stop_file=stop)
    async with heartbeat.heartbeat(task, "w:1") as sign:
        yield sign


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.001)


async def test_a_worker_stops_when_its_order_is_taken_back(
    told: heartbeat.StopSignal, signs: ControlFiles, file: Path
) -> None:
    assert file.stat().st_mtime > 0
    assert told.stop_reason() is None
    signs.revoke(file)
    await until(told.stop_reason)
    assert told.stop_reason() == heartbeat.REVOKED
    assert not file.exists()


async def test_a_worker_stops_with_its_coordinators_life(
    told: heartbeat.StopSignal, signs: ControlFiles
) -> None:
    signs.stop_workers()
    await until(told.stop_reason)
    assert told.stop_reason() == heartbeat.STOPPED


async def test_a_worker_survives_a_file_system_that_fails_for_a_while(
    told: heartbeat.StopSignal,
    signs: ControlFiles,
    file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    away = tmp_path.with_name("away")
    tmp_path.rename(away)
    tmp_path.write_text("no folder")
    await until(lambda: "cannot be touched: Not a directory" in caplog.text)
    assert told.stop_reason() is None
    tmp_path.unlink()
    away.rename(tmp_path)
    before = file.stat().st_mtime_ns
    await until(lambda: file.stat().st_mtime_ns > before)
    signs.stop_workers()
    await until(lambda: told.stop_reason() == heartbeat.STOPPED)


async def test_an_order_that_was_taken_back_is_not_begun(tmp_path: Path) -> None:
    async with heartbeat.heartbeat(replace(ORDER, journal=str(tmp_path)), "w:1") as sign:
        assert sign.stop_reason() == heartbeat.REVOKED


async def test_an_order_is_begun_once(told: heartbeat.StopSignal, tmp_path: Path) -> None:
    async with heartbeat.heartbeat(replace(ORDER, journal=str(tmp_path)), "w:1") as sign:
        assert sign.stop_reason() == DUPLICATE_REASON
    assert told.stop_reason() is None


async def test_the_coordinator_knows_the_workers_of_its_tasks(
    signs: ControlFiles, file: Path, tmp_path: Path
) -> None:
    signs.create(file)
    signs.poll()
    assert signs.workers == set()
    async with heartbeat.heartbeat(replace(ORDER, journal=str(tmp_path)), "node1:17"):
        signs.poll()
        assert signs.workers == {"node1:17"}
    signs.revoke(file)
    assert signs.workers == set()
