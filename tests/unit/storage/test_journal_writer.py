from __future__ import annotations

import asyncio
import errno
import os
from io import FileIO
from pathlib import Path

import pytest

from fanfold.backends.core.errors import JournalError
from fanfold.backends.storage import journal_writer
from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.journal_file import JournalSource, scan_lines
from fanfold.backends.storage.journal_writer import JournalWriter
from fanfold.tests.conformance.journal_checks import sample


class Disk:
    """Stands for ``os.fsync``: counts, and fails when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self.error: OSError | None = None
        self._real = os.fsync
        monkeypatch.setattr(os, "fsync", self)

    def __call__(self, handle: int) -> None:
        self.calls += 1
        if self.error is not None:
            raise self.error
        self._real(handle)


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Disk:
    return Disk(monkeypatch)


async def test_a_burst_shares_one_flush(tmp_path: Path, disk: Disk) -> None:
    writer = JournalWriter(tmp_path / "0001.jsonl", {"run": "r"}, 60.0)
    for index in range(500):
        writer.write(sample(index))
        await asyncio.sleep(0)
    await writer.close()
    assert disk.calls <= 3  # the folder, and at most two rounds of the file
    assert len(list(scan_lines(JournalSource(tmp_path / "0001.jsonl", ("r",))))) == 500


async def test_flushes_are_bounded_by_time(tmp_path: Path, disk: Disk) -> None:
    loop, fsync_s = asyncio.get_running_loop(), 0.02
    start = loop.time()
    writer = JournalWriter(tmp_path / "0001.jsonl", {"run": "r"}, fsync_s)
    while disk.calls < 4:
        writer.write(sample(0))
        await asyncio.sleep(0)
    await writer.close()
    assert disk.calls <= (loop.time() - start) / fsync_s + 3


async def test_nothing_to_flush_flushes_nothing(tmp_path: Path, disk: Disk) -> None:
    writer = JournalWriter(tmp_path / "0001.jsonl", {"run": "r"}, 0.001)
    await writer.flush()
    calls = disk.calls
    assert not [task for task in asyncio.all_tasks() if task.get_name().startswith("fsync")]
    await writer.flush()
    await writer.close()
    assert disk.calls == calls


async def test_flush_returns_when_it_is_on_disk(tmp_path: Path, disk: Disk) -> None:
    writer = JournalWriter(tmp_path / "0001.jsonl", {"run": "r"}, 0.001)
    writer.write(sample(0))
    await asyncio.gather(writer.flush(), writer.flush())
    assert disk.calls == 2  # folder and file
    writer.write(sample(1))
    await writer.flush()
    assert disk.calls == 3
    await writer.close()


async def test_a_file_system_that_cannot_flush_folders_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fsync(handle: int) -> None:
        if os.fstat(handle).st_mode & 0o040000:
            raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(os, "fsync", fsync)
    writer = JournalWriter(tmp_path / "0001.jsonl", {"run": "r"}, 0.001)
    writer.write(sample(0))
    await writer.close()


async def opened(folder: Path, items: int = 5) -> Journal:
    ledger = Journal(folder, "r", items)
    ledger.start_session("test", 0.001)
    return ledger


async def test_a_failed_flush_surfaces_at_the_next_put(tmp_path: Path, disk: Disk) -> None:
    ledger = await opened(tmp_path)
    ledger.put(sample(0))
    await ledger.flush()
    ledger.put(sample(1))
    disk.error = OSError(errno.EIO, "Input/output error")
    with pytest.raises(JournalError, match="flushed to disk: Input/output error"):
        await ledger.flush()
    with pytest.raises(JournalError, match="1 of 5 items are safe"):
        ledger.put(sample(2))
    disk.error = None  # the kernel tells of a lost page once; that must not be forgotten
    with pytest.raises(JournalError, match="1 of 5 items are safe"):
        ledger.put(sample(3))
    await ledger.aclose()  # somebody knows already


async def test_a_failed_flush_surfaces_at_close(tmp_path: Path, disk: Disk) -> None:
    ledger = await opened(tmp_path)
    ledger.put(sample(0))
    disk.error = OSError(errno.EIO, "Input/output error")
    writer = ledger._writer
    assert writer is not None
    while not writer.failed:  # noqa: ASYNC110 - the writer tells nobody
        await asyncio.sleep(0)
    disk.error = None
    with pytest.raises(JournalError, match="0 of 5 items are safe"):
        await ledger.aclose()


async def test_the_last_flush_counts_too(tmp_path: Path, disk: Disk) -> None:
    ledger = Journal(tmp_path, "r", 5)
    ledger.start_session("test", 60.0)
    ledger.put(sample(0))
    disk.error = OSError(errno.EDQUOT, "Disk quota exceeded")
    with pytest.raises(JournalError, match="Disk quota exceeded"):
        await ledger.aclose()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
async def test_a_full_disk_says_what_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ledger = await opened(tmp_path)
    ledger.put(sample(0))
    ledger.put(sample(1))
    writer = ledger._writer
    assert writer is not None
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, writer._file.fileno())
    os.close(full)
    words = r"cannot be written: No space left on device\. 2 of 5 items are safe; free disk"
    with pytest.raises(JournalError, match=words) as first:
        ledger.put(sample(2))
    with pytest.raises(JournalError) as second:
        ledger.put(sample(3))
    assert second.value is first.value
    assert not ledger.is_finished(2)
    monkeypatch.setattr(os, "fsync", lambda _: None)  # /dev/full cannot be flushed
    await ledger.aclose()


async def test_a_journal_that_cannot_be_begun(tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    folder.mkdir()
    ledger = await opened(folder)
    folder.rmdir()
    with pytest.raises(JournalError, match="cannot be created: No such file or directory"):
        ledger.put(sample(0))
    await ledger.aclose()


async def test_a_header_that_cannot_be_written_leaves_nothing_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(FileIO):
        def write(self, _: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(journal_writer, "FileIO", Full)
    ledger = await opened(tmp_path)
    with pytest.raises(JournalError, match="0 of 5 items are safe"):
        ledger.put(sample(0))
    await ledger.aclose()
    monkeypatch.undo()
    again = await opened(tmp_path)
    again.put(sample(0))
    await again.aclose()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["0001.jsonl", "0002.jsonl"]
