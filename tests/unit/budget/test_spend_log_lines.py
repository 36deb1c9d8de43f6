"""Lines of a spend log: whole and in order, also if a caller is cancelled or the disk is full."""

from __future__ import annotations

import asyncio
import resource
import threading
from io import FileIO
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.budget import spend_log
from fanfold.backends.budget.cost import read_cost
from fanfold.backends.budget.spend_log import SpendLogs, open_spend_logs
from fanfold.backends.core.errors import JournalError
from fanfold.backends.core.money import NO_PRICES, Amount, NodeTime
from fanfold.backends.core.protocols import CallLog
from fanfold.backends.storage.run_folder import RunFolder
from fanfold.graphs.run.node_time import open_time_log
from fanfold.graphs.run.open_calls import record_worker_calls

RUN = "run"


class SlowFile(FileIO):
    """A file whose second line lets the third one pass, if its writer does not wait for it."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._lines = 0
        self.has_begun, self._passed = threading.Event(), threading.Event()
        FILES.append(self)

    def write(self, data: Any, /) -> int:
        self._lines += 1
        if self._lines == 2:
            self.has_begun.set()
            self._passed.wait(0.2)
        count = super().write(data)
        if self._lines == 3:
            self._passed.set()
        return count


FILES = list[SlowFile]()


@pytest.fixture
def slow_files(monkeypatch: pytest.MonkeyPatch) -> list[SlowFile]:
    FILES.clear()
    monkeypatch.setattr(spend_log, "FileIO", SlowFile)
    return FILES


async def test_a_line_follows_the_one_whose_caller_was_cancelled(
    tmp_path: Path, slow_files: list[SlowFile]
) -> None:
    logs = SpendLogs(tmp_path / "budget", RUN)
    async with open_time_log(None, logs, 1) as write:
        first = asyncio.ensure_future(write({"open": {"requests": 1}}))
        await asyncio.to_thread(slow_files[0].has_begun.wait)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        await write({"open": {"requests": 2}})
        assert logs.read_sessions()[1].open_calls == Amount(requests=2)


async def test_a_log_without_lines_is_closed(tmp_path: Path, slow_files: list[SlowFile]) -> None:
    async with open_time_log(None, SpendLogs(tmp_path / "budget", RUN), 1):
        (file,) = slow_files
        assert not file.closed
    async with asyncio.timeout(30):
        while not file.closed:  # noqa: ASYNC110 - it is closed in another thread
            await asyncio.sleep(0.001)


async def test_the_last_line_of_a_worker_has_its_open_calls(
    tmp_path: Path, slow_files: list[SlowFile]
) -> None:
    """Also if the line before it is being written when the block ends."""
    logs = SpendLogs(tmp_path / "budget", RUN)
    calls = {1: CallLog(index=1, requests=1)}
    async with record_worker_calls(calls, NO_PRICES, logs, 1, "node:7"):
        while not slow_files:  # noqa: ASYNC110 - the file is created in another thread
            await asyncio.sleep(0.001)
        await asyncio.to_thread(slow_files[0].has_begun.wait)
        calls[1].requests = 5
    assert logs.read_sessions()[1].open_calls == Amount(requests=5)


def test_lines_go_on_where_the_disk_was_full(tmp_path: Path) -> None:
    """A part of a line is removed: behind it no reader could go on."""
    logs = SpendLogs(tmp_path, RUN)
    path = logs.session_path(1)
    log = logs.create(path)
    log.write({"open": {"requests": 1}}, sync=True)
    size = path.stat().st_size
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, before[1]))
    try:
        for _ in range(2):
            with pytest.raises(JournalError, match=r"the spend log cannot be written"):
                log.write({"open": {"requests": 2}}, sync=True)
            assert path.stat().st_size == size
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write({"open": {"requests": 3}}, sync=True)
    log.close()
    assert logs.read_sessions()[1].open_calls == Amount(requests=3)


def test_a_reader_of_a_running_session_takes_what_has_arrived(tmp_path: Path) -> None:
    """A network file system shows zeros first; without a session they are damage."""
    folder = RunFolder(tmp_path)
    folder.journal.mkdir(parents=True)
    log = open_spend_logs(folder, RUN).create(open_spend_logs(folder, RUN).session_path(1))
    log.write({"held": {"node_ms": 5}}, sync=True)
    log.close()
    with open_spend_logs(folder, RUN).session_path(1).open("ab") as file:
        file.write(bytes(40))
    with folder.lock():
        assert read_cost(folder, RUN, {}).node_time == NodeTime(node_ms=5)
    with pytest.raises(JournalError, match="40 NUL bytes"):
        read_cost(folder, RUN, {})
    with folder.lock(), pytest.raises(JournalError, match="40 NUL bytes"):
        open_spend_logs(folder, RUN).read_sessions()
