"""Records that workers of earlier sessions write late: one decision counts for all readers."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from pathlib import Path
from typing import Any

import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from fanfold.backends.core.checksum import add_crc
from fanfold.backends.storage.journal import Journal
from fanfold.backends.storage.journal_file import JournalDelta, make_header, parse_session_number
from fanfold.tests.conformance.journal_checks import sample

ITEMS, WORKERS = 4, 2
indices, statuses = st.integers(0, ITEMS - 1), st.sampled_from(["done", "failed"])

Record = dict[str, Any]


class Worker:
    """Appends to a file as a worker process does that nobody has stopped."""

    def __init__(self, folder: Path, life: int, name: str) -> None:
        self.life, self.last = life, dict[int, Record]()
        self._path = folder / f"{life:04}-{name}-1-abcdef.jsonl"
        line, self._crc = add_crc(
            make_header(self._path, "journal", {"run": "r", "session": "w"}), 0
        )
        self._path.write_bytes(line)

    def write(self, record: Record) -> None:
        line, self._crc = add_crc(orjson.dumps(record), self._crc)
        with self._path.open("ab") as file:
            file.write(line)
        self.last[record["index"]] = record


class Sessions(RuleBasedStateMachine):
    """A run whose coordinator is killed at any time, while workers of all sessions write on.

    What a session folds outlives it in a checkpoint, unless it folds anew.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(prefix="fanfold-test-"))
        self.workers = list[Worker]()
        self.folded = dict[int, Record]()
        self.clock = self.written = 0

    @initialize()
    def begin(self) -> None:
        self._open()

    def _open(self) -> None:
        self.ledger = Journal(self.folder, "r", ITEMS)
        self.ledger.start_session("test", 60.0, 1 + max((w.life for w in self.workers), default=0))
        names = (f"n{number}" for number in range(WORKERS))
        self.workers += [Worker(self.folder, self.ledger.session_number, name) for name in names]

    def _record(self, index: int, status: Any) -> Record:
        self.written += 1
        at = f"2026-01-01T00:00:{self.clock % 60:02}.000+00:00"
        return sample(index, status, self.written) | {"finished_at": at}

    @rule(index=indices, status=statuses, who=st.integers(0, 99), tick=st.integers(0, 1))
    def a_worker_records(self, index: int, status: str, who: int, tick: int) -> None:
        self.clock += tick
        self.workers[who % len(self.workers)].write(self._record(index, status))

    @rule()
    def the_coordinator_reads_on(self) -> None:
        self.ledger.refresh(JournalDelta(), all_sessions=True)

    @rule(index=indices)
    def it_folds_from_the_journal(self, index: int) -> None:
        if self.ledger.is_finished(index) and index not in self.folded:
            self.folded[index] = self.ledger.read_record(index)

    @rule(index=indices, who=st.integers(0, WORKERS - 1))
    def it_folds_what_a_worker_has_folded(self, index: int, who: int) -> None:
        worker = self.workers[-1 - who]
        if self.ledger.is_finished(index) and index not in self.folded and index in worker.last:
            self.folded[index] = worker.last[index]

    @rule(index=indices, status=statuses)
    def it_records_an_item_itself(self, index: int, status: str) -> None:
        if not self.ledger.is_finished(index):
            record = self._record(index, status)

            async def put() -> None:
                self.ledger.put(record)
                await self.ledger.aclose()

            asyncio.run(put())
            self._reopened(anew=False)

    @rule(anew=st.booleans())
    def it_is_killed_and_resumed(self, anew: bool) -> None:
        self._reopened(anew=anew)

    def _reopened(self, *, anew: bool) -> None:
        self.ledger.close()
        self._open()
        if anew:
            self.folded.clear()

    @rule()
    def failed_items_are_asked_again(self) -> None:
        self._reopened(anew=True)
        self.ledger.reopen_failed(self.ledger.session_number)

    @invariant()
    def aggregate_and_results_agree(self) -> None:
        """At the end of a run, whenever that comes; nobody waits for what comes later."""
        if not hasattr(self, "ledger"):
            return
        folded = dict(self.folded)
        self.ledger.refresh(JournalDelta(), all_sessions=True)  # the last time
        for index in range(ITEMS):
            if self.ledger.is_finished(index):
                folded.setdefault(index, self.ledger.read_record(index))
        results = {record["index"]: record for record in self.ledger.read_records()}
        if self.ledger.duplicates:
            folded = dict(results)
        assert folded == results

    @precondition(lambda self: hasattr(self, "ledger"))
    @rule(index=indices, status=statuses, who=st.integers(0, 99))
    def what_comes_after_the_end_counts_for_nothing(
        self, index: int, status: str, who: int
    ) -> None:
        self.ledger.refresh(JournalDelta(), all_sessions=True)
        results, extents = list(self.ledger.read_records()), self.ledger.extents()
        last = max((parse_session_number(Path(name)) for name in extents), default=0)
        late = [worker for worker in self.workers if worker.life <= last]
        if late:
            late[who % len(late)].write(self._record(index, status))
        with Journal(self.folder, "r", ITEMS, extents) as reader:
            missing = {r["index"] for r in reader.read_records()} - {r["index"] for r in results}
            assert all(not self.ledger.is_finished(n) for n in missing)  # failed, and asked again
            assert [r for r in reader.read_records() if r["index"] not in missing] == results

    def teardown(self) -> None:
        self.ledger.close()
        shutil.rmtree(self.folder)


def test_aggregate_and_results_agree_whatever_comes_late() -> None:
    run_state_machine_as_test(
        Sessions, settings=settings(max_examples=30, stateful_step_count=15, deadline=None)
    )


@pytest.mark.parametrize("killed", [False, True], ids=["in one session", "killed between"])
@pytest.mark.parametrize("late", ["done", "failed"])
def test_an_item_that_an_earlier_session_ends_late_and_this_one_too(
    tmp_path: Path, late: str, killed: bool
) -> None:
    """The late record is folded, and then the record of the present session counts."""
    earlier = Worker(tmp_path, 1, "n1")
    ledger = Journal(tmp_path, "r", ITEMS)
    ledger.start_session("test", 60.0)
    now = Worker(tmp_path, ledger.session_number, "n1")
    earlier.write(sample(0, late, "late"))  # type: ignore[arg-type]
    ledger.refresh(JournalDelta(), all_sessions=True)
    folded = ledger.read_record(0)
    now.write(sample(0, "done", "now"))
    if killed:
        ledger.close()
        ledger = Journal(tmp_path, "r", ITEMS)
    else:
        ledger.refresh(JournalDelta(), all_sessions=True)
    assert ledger.read_record(0)["output"] == "now"
    assert folded != ledger.read_record(0)
    assert ledger.duplicates  # so that the aggregate is folded anew
    ledger.close()


@pytest.mark.parametrize("first", ["late", "own"])
def test_two_workers_of_an_earlier_session_end_an_item(tmp_path: Path, first: str) -> None:
    """One of them after the present session has begun; a failure that was folded gives way."""
    one, other = Worker(tmp_path, 1, "n1"), Worker(tmp_path, 1, "n2")
    one.write(sample(0, "failed"))
    ledger = Journal(tmp_path, "r", ITEMS)
    ledger.start_session("test", 60.0)
    assert ledger.read_record(0)["status"] == "failed"
    if first == "own":
        Worker(tmp_path, ledger.session_number, "n1").write(sample(1, "done"))
        ledger.refresh(JournalDelta(), all_sessions=True)
    other.write(sample(0, "done", "answer"))
    ledger.refresh(JournalDelta(), all_sessions=True)
    assert ledger.read_record(0)["output"] == "answer"
    assert (ledger.count_items().done, ledger.count_items().failed, ledger.duplicates) == (
        1 + (first == "own"),
        0,
        1,
    )
    ledger.close()


def test_a_late_record_of_an_item_that_this_session_has_ended_changes_nothing(
    tmp_path: Path,
) -> None:
    earlier = Worker(tmp_path, 1, "n1")
    ledger = Journal(tmp_path, "r", ITEMS)
    ledger.start_session("test", 60.0)
    Worker(tmp_path, ledger.session_number, "n1").write(sample(0, "failed"))
    ledger.refresh(JournalDelta(), all_sessions=True)
    earlier.write(sample(0, "done", "late"))
    ledger.refresh(fresh := JournalDelta(), all_sessions=True)
    assert (fresh.done, fresh.failed) == (0, 0)
    assert ledger.total_usage().requests == 4  # both were paid
    assert (ledger.read_record(0)["status"], ledger.duplicates) == ("failed", 0)
    with Journal(tmp_path, "r", ITEMS) as again:
        assert again.read_record(0)["status"] == "failed"
        assert again.total_usage() == ledger.total_usage()
    ledger.close()


@given(
    found=st.lists(st.tuples(indices, statuses, st.integers(0, 3)), min_size=2, max_size=8),
    data=st.data(),
)
@settings(deadline=None, max_examples=40)
def test_the_order_of_reading_decides_nothing(
    found: list[tuple[int, str, int]], data: st.DataObject
) -> None:
    """Of one session's records the same ones count, whichever file is read first."""
    records = [
        sample(index, status, number) | {"finished_at": f"2026-01-01T00:00:0{at}.000+00:00"}  # type: ignore[arg-type]
        for number, (index, status, at) in enumerate(found)
    ]
    order = data.draw(st.permutations(range(len(records))))
    seen = list[list[Record]]()
    for numbers in (range(len(records)), order):
        folder = Path(tempfile.mkdtemp(prefix="fanfold-test-"))
        try:
            ledger = Journal(folder, "r", ITEMS)
            ledger.start_session("test", 60.0)
            for number in numbers:
                Worker(folder, 1, f"n{number}").write(records[number])
                ledger.refresh(JournalDelta())
            seen.append(list(ledger.read_records()))
            ledger.close()
            with Journal(folder, "r", ITEMS) as again:
                assert list(again.read_records()) == seen[-1]
        finally:
            shutil.rmtree(folder)
    assert seen[0] == seen[1]


@pytest.mark.parametrize("late", ["done", "failed"])
def test_a_late_record_of_a_failed_item_that_is_asked_again_changes_nothing(
    tmp_path: Path, late: str
) -> None:
    """The failure of the later session counts for every reader, until the item ends anew."""
    first = Worker(tmp_path, 1, "n1")
    Worker(tmp_path, 2, "n1").write(sample(0, "failed"))
    ledger = Journal(tmp_path, "r", ITEMS)
    ledger.start_session("test", 60.0)
    ledger.reopen_failed(ledger.session_number)
    first.write(sample(0, late, "late"))  # type: ignore[arg-type]
    ledger.refresh(fresh := JournalDelta(), all_sessions=True)
    assert (fresh.done, fresh.failed, ledger.is_finished(0)) == (0, 0, False)
    with Journal(tmp_path, "r", ITEMS, ledger.extents()) as reader:
        assert [record["error_class"] for record in reader.read_records()] == ["EndpointLostError"]
    Worker(tmp_path, ledger.session_number, "n1").write(sample(0, "done", "now"))
    ledger.refresh(fresh, all_sessions=True)
    assert (fresh.done, ledger.read_record(0)["output"], ledger.duplicates) == (1, "now", 0)
    ledger.close()
