"""A file that others rely on has its name on disk: its folder is flushed when it is created."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TypeAlias

import pytest

from fanfold.backends.batch.files import BatchFolder, BatchRecord, write_requests
from fanfold.backends.budget.spend_log import SpendLog
from fanfold.backends.storage.journal_writer import JournalWriter
from fanfold.backends.workers.globus.tasks import TASK_LOG_FILE, TaskEntry, TaskLog

Create: TypeAlias = Callable[[Path], Awaitable[None]]
RECORD = BatchRecord(1, 1, "/c/a.jsonl", "/c/a.out", "ab", 0, 100)


async def journal(folder: Path) -> None:
    writer = JournalWriter(folder / "0001.jsonl", {"run": "r"}, 60.0)
    writer.write({"index": 0})
    await writer.flush(at_once=True)
    await writer.close()


async def spend_log(folder: Path) -> None:
    SpendLog(folder / "0001.jsonl", "r").close()


async def task_log(folder: Path) -> None:
    TaskLog(folder / TASK_LOG_FILE).write([], [TaskEntry("s", "t", "g", "e", 1.0)])


async def batch_record(folder: Path) -> None:
    BatchFolder(folder).write(RECORD)


async def requests(folder: Path) -> None:
    write_requests(folder, "r", 1, [b"{}\n"])


@pytest.fixture
def flushed(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return the inodes that were flushed, in order."""
    inodes, fsync = list[int](), os.fsync

    def record(handle: int) -> None:
        inodes.append(os.fstat(handle).st_ino)
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record)
    return inodes


@pytest.mark.parametrize("create", [journal, spend_log, task_log, batch_record, requests])
async def test_the_folder_of_a_new_file_is_flushed(
    tmp_path: Path, flushed: list[int], create: Create
) -> None:
    await create(tmp_path)
    assert tmp_path.stat().st_ino in flushed


async def test_the_name_of_a_new_folder_is_flushed_too(tmp_path: Path, flushed: list[int]) -> None:
    await spend_log(tmp_path / "budget")
    BatchFolder(tmp_path / "batches").write_lines(1, [])
    for path in (tmp_path, tmp_path / "budget"):
        assert path.stat().st_ino in flushed
    assert flushed.count(tmp_path.stat().st_ino) == 2


async def test_a_task_log_flushes_its_folder_once(tmp_path: Path, flushed: list[int]) -> None:
    for _ in range(3):
        await task_log(tmp_path)
    assert flushed.count(tmp_path.stat().st_ino) == 1
