"""What a worker keeps of its order."""

from __future__ import annotations

from pathlib import Path

import pytest

from fanfold.backends.core.errors import LedgerError
from fanfold.backends.storage.journal import Fresh, JournalWriter, Source, scan
from fanfold.backends.storage.journal_index import Ledger
from fanfold.backends.storage.worker_journal import FiledLedger, SentLedger, worker_file
from fanfold.tests.conformance.journal_checks import sample


def test_records_stop_before_the_bound() -> None:
    """Items in flight still come when the ledger says that it is full."""
    ledger, count = SentLedger(carry=20_000, streams=8), 0
    while ledger.full is None:
        ledger.put(sample(count, output="x" * 500))
        count += 1
    for _ in range(8):
        ledger.put(sample(count, output="x" * 500))
    assert ledger._bytes <= 21_000
    assert count > 8
    assert not ledger.altered


def test_a_record_above_the_bound_is_a_failure() -> None:
    ledger = SentLedger(carry=2_000)
    ledger.put(sample(0, output="x" * 3_000))
    (kept,) = ledger.sent
    assert (kept["status"], kept["output"]) == ("failed", None)
    assert "shared_folder: true" in kept["error"]
    assert ledger.altered


async def test_a_filed_ledger_is_on_disk_at_its_end(tmp_path: Path) -> None:
    path = worker_file(tmp_path, 3, "node17:4242")
    assert path != worker_file(tmp_path, 3, "node17:4242")  # containers may share both
    assert path.name.startswith("0003-node17-4242-")
    writer = JournalWriter(path, {"run": "r"}, fsync_s=60.0)
    ledger = FiledLedger(writer)
    for index in range(3):
        ledger.put(sample(index))
        await ledger.flush()  # at once, again and again, however long the rounds are
        assert writer._flushed == writer._written
    await writer.close()
    assert [line.record["index"] for line in scan(Source(path, ("r",)))] == [0, 1, 2]
    for read in (ledger.record, ledger.records):
        with pytest.raises(LedgerError, match="not read"):
            read(None)  # type: ignore[arg-type]


@pytest.mark.parametrize("first", ["done", "failed"])
async def test_an_answer_counts_before_a_failure(first: str, tmp_path: Path) -> None:
    """Of two copies, whichever is read first and ended first."""
    ledger = Ledger(tmp_path, "r", 2)
    ledger.begin("test", 1.0)
    for at, status in enumerate([first, "failed" if first == "done" else "done"]):
        writer = JournalWriter(worker_file(tmp_path, 1, f"w:{at}"), {"run": "r"}, 60.0)
        record = sample(1, status) | {"finished_at": f"2026-01-01T00:00:0{at}.000+00:00"}  # type: ignore[arg-type]
        writer.write(record)
        await writer.close()
        ledger.refresh(Fresh())
    assert ledger.twice == 1
    assert ledger.record(1)["status"] == "done"
    assert (ledger.counts().done, ledger.counts().failed) == (1, 0)
    ledger.close()


async def test_workers_may_outlive_their_coordinator(tmp_path: Path) -> None:
    """What they write in a later life is read there, but never in place of that life's own."""
    writer = JournalWriter(worker_file(tmp_path, 1, "w:1"), {"run": "r"}, 60.0)
    writer.write(sample(0))
    ledger = Ledger(tmp_path, "r", 3)
    ledger.begin("test", 1.0)
    assert ledger.life == 2
    ledger.put(own := sample(1, output="newer"))
    for index in (1, 2):
        writer.write(sample(index, output="older"))
    await writer.close()
    fresh = Fresh()
    ledger.refresh(fresh)
    assert fresh == Fresh()
    assert not ledger.finished(2)
    ledger.refresh(fresh, earlier=True)
    assert (fresh.done, fresh.failed, fresh.spent.requests) == (1, 0, 2)
    assert ledger.finished(2)
    ledger.refresh(again := Fresh(), earlier=True)
    assert again == Fresh()
    assert (ledger.counts().done, ledger.twice) == (3, 0)
    assert ledger.record(1) == own
    await ledger.aclose()
    anew = Ledger(tmp_path, "r", 3)
    assert anew.record(1) == own
    assert anew.total() == ledger.total()
    anew.close()
