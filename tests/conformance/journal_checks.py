"""Checks that every journal must pass.

Example, with pytest::

    @pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
    async def test_my_journal(check: Check, tmp_path: Path) -> None:
        await check(Subject(open=lambda items: my_journal(tmp_path, items), tear=my_tear))
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias

from fanfold.backends.core.types import Json, Status


class Tally(Protocol):
    """How many items are done, failed and open."""

    @property
    def done(self) -> int:
        """Return the items with an answer."""
        ...

    @property
    def failed(self) -> int:
        """Return the items without."""
        ...

    @property
    def open(self) -> int:
        """Return the items that have not ended."""
        ...


class LedgerLike(Protocol):
    """What is checked: the journal of finished items, open for writing."""

    def put(self, record: dict[str, Json]) -> None:
        """Record how an item ended."""
        ...

    def is_finished(self, index: int) -> bool:
        """Say whether an item has ended."""
        ...

    def read_record(self, index: int) -> dict[str, Any]:
        """Return the record of a finished item."""
        ...

    def read_records(self, status: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the records in input order."""
        ...

    def count_items(self) -> Tally:
        """Count the items by state."""
        ...

    def reopen_failed(self) -> int:
        """Treat failed items as open again."""
        ...

    async def flush(self) -> None:
        """Wait until everything recorded so far is on disk."""
        ...


@dataclass(frozen=True, slots=True)
class Subject:
    """A journal to check.

    Attributes:
        open: Opens the ledger of one and the same run, of so many items, for another life.
        tear: Cuts the record that was written last in half, as the end of a process may; None
            where a record is never half written.
    """

    open: Callable[[int], AbstractAsyncContextManager[LedgerLike]]
    tear: Callable[[], None] | None = None


Check: TypeAlias = Callable[[Subject], Awaitable[None]]

_ITEMS: Final = 7


def sample(index: int, status: Status = "done", output: Json = None) -> dict[str, Json]:
    """Return a record as the journal carries it."""
    failed = status == "failed"
    return {
        "stage": "",
        "index": index,
        "id": f"item-{index}",
        "sample": 0,
        "status": status,
        "output": None if failed else output,
        "error_class": "EndpointLostError" if failed else None,
        "error": "line 1\nline 2 é \u2028" if failed else None,
        "endpoint": "127.0.0.1:8000",
        "model": "m",
        "requests": 2,
        "attempts": [],
        "repairs": 0,
        "prompt_tokens": 10,
        "completion_tokens": None,
        "latency_s": 0.25,
        "finished_at": "2026-01-01T00:00:00.000+00:00",
        "simulated": True,
        "fingerprint": "00",
        "origin": None,
    }


async def begins_empty(subject: Subject) -> None:
    """A new run has no finished item."""
    async with subject.open(_ITEMS) as ledger:
        _equal(_states(ledger), [False] * _ITEMS, "finished() before any put()")
        _equal(list(ledger.read_records()), [], "records() before any put()")
        _equal(_numbers(ledger), (0, 0, _ITEMS), "counts() before any put()")


async def reads_what_it_wrote(subject: Subject) -> None:
    """A record can be read back at once, value for value, also across lines and scripts."""
    record = sample(3, output={"a": [1, 2.5, None, True, {"b": "x\ny\0é\U0001f9ea"}]})
    async with subject.open(_ITEMS) as ledger:
        ledger.put(record)
        _equal(ledger.read_record(3), record, "record() after put()")
        _equal(_states(ledger), [n == 3 for n in range(_ITEMS)], "finished() after put()")


async def keeps_over_lives(subject: Subject) -> None:
    """A session finds the records of the one before, and adds to them."""
    async with subject.open(_ITEMS) as ledger:
        ledger.put(sample(5, output="first"))
        await ledger.flush()
    async with subject.open(_ITEMS) as ledger:
        ledger.put(sample(2, "failed"))
    async with subject.open(_ITEMS) as ledger:
        _equal([r["index"] for r in ledger.read_records()], [2, 5], "records() of two lives")
        _equal(ledger.read_record(5), sample(5, output="first"), "record() of the first life")


async def orders_by_input(subject: Subject) -> None:
    """Records come in input order, whatever order the items ended in, and by status."""
    async with subject.open(_ITEMS) as ledger:
        for index in (6, 0, 4, 1):
            ledger.put(sample(index, "failed" if index == 4 else "done"))
        _equal([r["index"] for r in ledger.read_records()], [0, 1, 4, 6], "records()")
        _equal([r["index"] for r in ledger.read_records("done")], [0, 1, 6], "records('done')")
        _equal([r["index"] for r in ledger.read_records("failed")], [4], "records('failed')")
        _equal(_numbers(ledger), (3, 1, _ITEMS - 4), "counts()")


async def later_records_win(subject: Subject) -> None:
    """Of two records of one item the later counts, within a session and over sessions."""
    async with subject.open(_ITEMS) as ledger:
        ledger.put(sample(1, "failed"))
        ledger.put(sample(1, output="second"))
        _equal(ledger.read_record(1)["output"], "second", "record() after a second put()")
    async with subject.open(_ITEMS) as ledger:
        ledger.put(sample(1, output="third"))
    async with subject.open(_ITEMS) as ledger:
        _equal([r["output"] for r in ledger.read_records()], ["third"], "records() of three puts")
        _equal(_numbers(ledger), (1, 0, _ITEMS - 1), "counts() of three puts")


async def reopens_failed(subject: Subject) -> None:
    """Failed items can be reopened for this session; an answer then replaces them."""
    async with subject.open(_ITEMS) as ledger:
        ledger.put(sample(0))
        ledger.put(sample(1, "failed"))
        ledger.put(sample(2, "failed"))
    async with subject.open(_ITEMS) as ledger:
        _equal(ledger.reopen_failed(), 2, "reopen_failed()")
        _equal(_states(ledger)[:3], [True, False, False], "finished() after reopen_failed()")
        ledger.put(sample(1, output="at last"))
    async with subject.open(_ITEMS) as ledger:
        found = [r["status"] for r in ledger.read_records()]
        _equal(found, ["done", "done", "failed"], "records() after a retry")


async def survives_a_torn_tail(subject: Subject) -> None:
    """A record cut in half never was; all before it are there, and writing goes on."""
    if subject.tear is None:
        return
    async with subject.open(_ITEMS) as ledger:
        for index in range(3):
            ledger.put(sample(index))
    subject.tear()
    async with subject.open(_ITEMS) as ledger:
        _equal(_states(ledger)[:3], [True, True, False], "finished() after a torn record")
        ledger.put(sample(2, output="again"))
        _equal(ledger.read_record(2)["output"], "again", "record() after a torn record")
    async with subject.open(_ITEMS) as ledger:
        _equal(_numbers(ledger), (3, 0, _ITEMS - 3), "counts() after a torn record")


CHECKS: Final[tuple[Check, ...]] = (
    begins_empty,
    reads_what_it_wrote,
    keeps_over_lives,
    orders_by_input,
    later_records_win,
    reopens_failed,
    survives_a_torn_tail,
)
"""All checks; each needs a run of its own."""


def _states(ledger: LedgerLike) -> list[bool]:
    return [ledger.is_finished(index) for index in range(_ITEMS)]


def _numbers(ledger: LedgerLike) -> tuple[int, int, int]:
    counts = ledger.count_items()
    return counts.done, counts.failed, counts.open


def _equal(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what}: expected {expected!r}, found {found!r}")
