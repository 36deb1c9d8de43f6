"""The small files by which coordinator and workers know of each other, and what they mean."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fanfold.backends.core.errors import LedgerError
from fanfold.backends.core.messages import REPEATED, Order
from fanfold.graphs.remote import heartbeat
from fanfold.graphs.remote.heartbeat import LOOKS, Signs, beat_file, stop_file

SILENCE_S = 2.0
ORDER = Order("0-1", 0, "0", {"token": "t"}, {}, [(0, "i", {}, None)], None, None, 1, 60.0)


@pytest.fixture
def signs(tmp_path: Path) -> Signs:
    made = Signs(tmp_path, "t", SILENCE_S)
    made.begin()
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return beat_file(tmp_path, "t", "0-1", 0)


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
    signs: Signs, file: Path, later: Callable[[float], None]
) -> None:
    silent = signs.of(file)
    signs.allow(file)
    later(100)
    signs.look()
    assert silent() is None  # nobody has touched it yet
    os.utime(file)
    signs.look()
    assert silent() == 0
    later(0.3)
    signs.look()
    assert silent() == pytest.approx(0.3, abs=0.1)
    os.utime(file, (1, 1))  # by another clock
    signs.look()
    assert silent() == 0


def test_a_pause_of_the_coordinator_is_nobodys_silence(
    signs: Signs, file: Path, later: Callable[[float], None]
) -> None:
    """As where the file system answers nobody for minutes: worker and coordinator both wait."""
    silent = signs.of(file)
    signs.allow(file)
    os.utime(file)
    signs.look()
    for looks in range(1, LOOKS + 2):
        later(100 * SILENCE_S)
        signs.look()
        assert silent() == pytest.approx(looks * SILENCE_S / LOOKS)
    signs.forget(file)
    signs.look()
    assert silent() == pytest.approx((LOOKS + 1) * SILENCE_S / LOOKS)


def test_what_cannot_be_looked_at_is_told_and_not_silent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "journal"
    folder.mkdir()
    signs = Signs(folder, "t", SILENCE_S)
    files = [beat_file(folder, "t", "0-1", 0), beat_file(tmp_path, "t", "1-2", 0)]
    beats = [signs.of(file) for file in files]
    for file in files:
        signs.allow(file)
        os.utime(file)
    signs.look()
    folder.rename(tmp_path / "elsewhere")
    folder.write_text("no folder")
    os.utime(files[1], (1, 1))
    for _ in range(3):
        signs.look()
    assert beats[0]() == 0
    assert (
        caplog.text.count(f"{files[0]}: cannot be looked at: Not a directory (1 such files)") == 1
    )
    with pytest.raises(LedgerError, match=r"beat-t-0-1-0: cannot be made: Not a directory; mend"):
        signs.allow(files[0])
    signs.withdraw(files[0])
    assert f"{files[0]}: cannot be removed: Not a directory" in caplog.text


@pytest.fixture
async def told(
    signs: Signs, tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[heartbeat.StopSign]:
    """Attend to an order as its worker does."""
    monkeypatch.setattr(heartbeat, "_BEAT_S", 0.01)
    monkeypatch.setattr(heartbeat, "_STOP_S", 0.01)
    signs.allow(file)
    stop = str(stop_file(tmp_path, "t"))
    async with heartbeat.attending(replace(ORDER, journal=str(tmp_path), stop_file=stop)) as sign:
        yield sign


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - what is waited for sets no event
            await asyncio.sleep(0.001)


async def test_a_worker_stops_when_its_order_is_taken_back(
    told: heartbeat.StopSign, signs: Signs, file: Path
) -> None:
    assert file.stat().st_mtime > 0
    assert told.reason() is None
    signs.withdraw(file)
    await until(told.reason)
    assert told.reason() == heartbeat.WITHDRAWN
    assert not file.exists()


async def test_a_worker_stops_with_its_coordinators_life(
    told: heartbeat.StopSign, signs: Signs
) -> None:
    signs.stop()
    await until(told.reason)
    assert told.reason() == heartbeat.STOPPED


async def test_a_worker_survives_a_file_system_that_fails_for_a_while(
    told: heartbeat.StopSign,
    signs: Signs,
    file: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    away = tmp_path.with_name("away")
    tmp_path.rename(away)
    tmp_path.write_text("no folder")
    await until(lambda: "cannot be touched: Not a directory" in caplog.text)
    assert told.reason() is None
    tmp_path.unlink()
    away.rename(tmp_path)
    before = file.stat().st_mtime_ns
    await until(lambda: file.stat().st_mtime_ns > before)
    signs.stop()
    await until(lambda: told.reason() == heartbeat.STOPPED)


async def test_an_order_that_was_taken_back_is_not_begun(tmp_path: Path) -> None:
    async with heartbeat.attending(replace(ORDER, journal=str(tmp_path))) as sign:
        assert sign.reason() == heartbeat.WITHDRAWN


async def test_an_order_is_begun_once(told: heartbeat.StopSign, tmp_path: Path) -> None:
    async with heartbeat.attending(replace(ORDER, journal=str(tmp_path))) as sign:
        assert sign.reason() == REPEATED
    assert told.reason() is None
