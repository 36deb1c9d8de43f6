from __future__ import annotations

import asyncio
import gc
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.backends.core.errors import JournalError
from fanfold.backends.storage.journal import OTHER_CLASSES, Journal
from fanfold.backends.storage.journal_file import ItemCounts
from fanfold.tests.conformance.journal_checks import sample
from fanfold.tests.journals import write_journal


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


@pytest.mark.parametrize("ended", [0, 2_000])
def test_memory_is_17_bytes_per_item(tmp_path: Path, ended: int) -> None:
    items = 400_000
    records = (sample(n) if n % 9 else sample(n, "failed") for n in range(ended))
    write_journal(tmp_path / "0001.jsonl", records)
    Journal(tmp_path, "r", 10_000).close()  # what is allocated once
    tracemalloc.start()
    try:
        with Journal(tmp_path, "r", items) as ledger:
            gc.collect()
            size, _ = tracemalloc.get_traced_memory()
            assert ledger.count_items().open == items - ended
    finally:
        tracemalloc.stop()
    assert size <= 17 * items + 100_000  # a constant part, whatever the number of items


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


CLASSES = ["EndpointError", "ValueError", "TruncatedAnswerError"]


@given(st.lists(st.tuples(st.integers(0, 9), st.sampled_from([None, *CLASSES])), max_size=30))
@settings(max_examples=50)
def test_failures_are_counted_by_class(ended: list[tuple[int, str | None]]) -> None:
    """Each item counts once, with the class of the record that counts, also after a retry."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        latest = dict[int, str | None]()
        for session, (index, error_class) in enumerate(ended, start=1):
            record = sample(index, "failed" if error_class else "done")
            record["error_class"] = error_class
            write_journal(folder / f"{session:04}.jsonl", [record])
            latest[index] = error_class
        failed = [error_class for error_class in latest.values() if error_class]
        with Journal(folder, "r", 10) as ledger:
            counted = ledger.count_failures()
            assert counted == Counter(failed)
            assert list(counted.values()) == sorted(counted.values(), reverse=True)
            assert ledger.count_items().failed == len(failed)
            for one in CLASSES:
                indices = sorted(index for index, found in latest.items() if found == one)
                assert list(ledger.find_failed(one)) == indices
            assert [r["error_class"] for r in ledger.read_records("failed")] == [
                latest[index] for index in sorted(latest) if latest[index]
            ]
            assert ledger.reopen_failed() == len(failed)
            assert ledger.count_failures() == {}


def test_more_classes_than_a_byte_holds(tmp_path: Path) -> None:
    records = [sample(n, "failed") | {"error_class": f"E{n:04}"} for n in range(600)]
    records.append(sample(600, "failed") | {"error_class": ["no", "text"]})
    write_journal(tmp_path / "0001.jsonl", records)
    with Journal(tmp_path, "r", 601) as ledger:
        counted = ledger.count_failures()
        assert sum(counted.values()) == ledger.count_items().failed == 601
        assert next(iter(counted)) == OTHER_CLASSES
        assert len(list(ledger.find_failed(OTHER_CLASSES))) == counted[OTHER_CLASSES]
        assert len(list(ledger.read_records("failed"))) == 601


def test_a_record_without_a_class_is_counted(tmp_path: Path) -> None:
    write_journal(tmp_path / "0001.jsonl", [sample(0, "failed") | {"error_class": 5}])
    with Journal(tmp_path, "r", 1) as ledger:
        assert ledger.count_failures() == {"unknown class": 1}
