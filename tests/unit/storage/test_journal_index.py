from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from fanfold.backends.core.errors import JournalError
from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.journal_file import ItemCounts
from fanfold.tests.conformance.journal_checks import sample


async def written(folder: Path, *records: dict[str, object]) -> None:
    ledger = Journal(folder, "r", 10)
    ledger.start_session("test", 0.001)
    for record in records:
        ledger.put(record)
    await ledger.aclose()


async def test_counts_and_what_was_spent(tmp_path: Path) -> None:
    await written(tmp_path, sample(0), sample(1, "failed"), sample(1))
    await written(tmp_path, sample(1) | {"requests": None, "completion_tokens": 7})
    with Journal(tmp_path, "r", 10) as ledger:
        assert ledger.count_items() == ItemCounts(done=2, failed=0, open=8)
        spent = ledger.total_usage()
    assert (spent.requests, spent.prompt_tokens, spent.completion_tokens) == (6, 40, 7)


async def test_memory_per_item_is_small(tmp_path: Path) -> None:
    ledger = Journal(tmp_path, "r", 100_000)
    index = (ledger._state, ledger._file, ledger._start, ledger._length)
    assert sum(map(sys.getsizeof, index)) <= 20 * 100_000


async def test_one_life_without_items_leaves_no_file(tmp_path: Path) -> None:
    await written(tmp_path)
    assert list(tmp_path.iterdir()) == []


async def test_reading_only_means_that(tmp_path: Path) -> None:
    with Journal(tmp_path, "r", 1) as ledger, pytest.raises(JournalError, match="reading only"):
        ledger.put(sample(0))


async def test_a_journal_that_changes_under_our_feet(tmp_path: Path) -> None:
    await written(tmp_path, sample(0), sample(1))
    with Journal(tmp_path, "r", 10) as ledger:
        path = tmp_path / "0001.jsonl"
        content = path.read_bytes()
        path.write_bytes(content[5:])
        with pytest.raises(JournalError, match="changed while the run was using it"):
            ledger.read_record(1)
        path.unlink()
        with Journal(tmp_path, "r", 10) as other:
            assert other.count_items().open == 10


async def test_threads_may_read_at_the_same_time(tmp_path: Path) -> None:
    await written(tmp_path, *(sample(n) for n in range(10)))
    with Journal(tmp_path, "r", 10) as ledger:
        found = await asyncio.gather(*(asyncio.to_thread(ledger.read_record, n) for n in range(10)))
        assert [record["index"] for record in found] == list(range(10))
        assert len(ledger._handles) == 1
