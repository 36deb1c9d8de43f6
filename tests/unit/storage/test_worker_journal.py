"""What a worker keeps of its task."""

from __future__ import annotations

from pathlib import Path

import pytest

from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.journal_file import (
    JournalDelta,
    JournalSource,
    make_worker_path,
    scan_lines,
)
from fanfold.backends.storage.journal_writer import JournalWriter
from fanfold.backends.storage.worker_journal import ResultJournal, WorkerJournal
from fanfold.tests.conformance.journal_checks import sample


def test_records_stop_before_the_bound() -> None:
    """Items in flight still arrive after the journal is full."""
    ledger, count = ResultJournal(max_bytes=20_000, streams=8), 0
    while ledger.full_reason is None:
        ledger.put(sample(count, output="x" * 500))
        count += 1
    for _ in range(8):
        ledger.put(sample(count, output="x" * 500))
    assert ledger._bytes <= 21_000
    assert count > 8
    assert not ledger.altered


def test_a_record_above_the_bound_is_a_failure() -> None:
    ledger = ResultJournal(max_bytes=2_000)
    ledger.put(sample(0, output="x" * 3_000))
    (kept,) = ledger.records_to_send
    assert (kept["status"], kept["output"]) == ("failed", None)
    assert "shared_folder: true" in kept["error"]
    assert ledger.altered


async def test_a_filed_ledger_is_on_disk_at_its_end(tmp_path: Path) -> None:
    path = make_worker_path(tmp_path, 3, "node17:4242")
    assert path != make_worker_path(tmp_path, 3, "node17:4242")  # containers may share both
    assert path.name.startswith("0003-node17-4242-")
    writer = JournalWriter(path, {"run": "r"}, fsync_s=60.0)
    ledger = WorkerJournal(writer)
    for index in range(3):
        ledger.put(sample(index))
        await ledger.flush()  # at once, again and again, however long the rounds are
        assert writer._flushed == writer._written
    await writer.close()
    assert [line.record["index"] for line in scan_lines(JournalSource(path, ("r",)))] == [0, 1, 2]
    assert ledger.find_open(0, 3) == 0  # a task's items are open when it begins
    assert ledger.read_answers(0, 3) == [None, None, None]


@pytest.mark.parametrize("first", ["done", "failed"])
async def test_an_answer_counts_before_a_failure(first: str, tmp_path: Path) -> None:
    """Of two copies, whichever is read first and ended first."""
    ledger = Journal(tmp_path, "r", 2)
    ledger.start_session("test", 1.0)
    for at, status in enumerate([first, "failed" if first == "done" else "done"]):
        writer = JournalWriter(make_worker_path(tmp_path, 1, f"w:{at}"), {"run": "r"}, 60.0)
        record = sample(1, status) | {"finished_at": f"2026-01-01T00:00:0{at}.000+00:00"}  # type: ignore[arg-type]
        writer.write(record)
        await writer.close()
        ledger.refresh(JournalDelta())
    assert ledger.duplicates == 1
    assert ledger.read_record(1)["status"] == "done"
    assert (ledger.count_items().done, ledger.count_items().failed) == (1, 0)
    ledger.close()


async def test_workers_may_outlive_their_coordinator(tmp_path: Path) -> None:
    """Their records are read in a later session, but never replace that session's own."""
    writer = JournalWriter(make_worker_path(tmp_path, 1, "w:1"), {"run": "r"}, 60.0)
    writer.write(sample(0))
    ledger = Journal(tmp_path, "r", 3)
    ledger.start_session("test", 1.0)
    assert ledger.session_number == 2
    ledger.put(own := sample(1, output="newer"))
    for index in (1, 2):
        writer.write(sample(index, output="older"))
    await writer.close()
    fresh = JournalDelta()
    ledger.refresh(fresh)
    assert fresh == JournalDelta()
    assert not ledger.is_finished(2)
    ledger.refresh(fresh, all_sessions=True)
    assert (fresh.done, fresh.failed, fresh.usage.requests) == (1, 0, 2)
    assert ledger.is_finished(2)
    ledger.refresh(again := JournalDelta(), all_sessions=True)
    assert again == JournalDelta()
    assert (ledger.count_items().done, ledger.duplicates) == (3, 0)
    assert ledger.read_record(1) == own
    await ledger.aclose()
    anew = Journal(tmp_path, "r", 3)
    assert anew.read_record(1) == own
    assert anew.total_usage() == ledger.total_usage()
    anew.close()
