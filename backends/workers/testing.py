"""Conformance checks for backends of one's own (documented for users)."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeAlias

import orjson
from langchain_core.runnables import Runnable, RunnableLambda

from ..core.errors import SiteError
from ..core.messages import CARRY, Order, Summary, own_version
from ..core.protocols import Backend
from ..core.types import Json, Row

GRAPH: Final = f"{__name__}:actor"
"""What to write in ``task.graph``."""


async def play(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Do what an item says.

    ``answer`` answers with the item's ``text``; ``fail`` raises; ``large`` answers with ``bytes``
    bytes; ``die`` kills the process; ``hang`` blocks the event loop for ``seconds``. With ``once``,
    the name of a file, the last two happen at most once. ``seconds`` is slept before an answer.
    """
    do = columns.get("do", "answer")
    if do in ("die", "hang") and _first_time(columns.get("once")):
        if do == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(columns["seconds"])  # noqa: ASYNC251 - a hang is what is wanted
    elif do == "fail":
        raise ValueError(f"item {columns.get('text')!r} fails as it was told")
    elif do == "large":
        return {"output": "x" * columns["bytes"]}
    await asyncio.sleep(columns.get("seconds", 0) if do == "answer" else 0)
    return {"output": columns.get("text", "")}


def _first_time(file: str | None) -> bool:
    if file is None:
        return True
    try:
        Path(file).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def actor(model: object) -> Runnable[Any, Any]:  # noqa: ARG001 - every item graph's factory is given the model
    """Return the graph; the model is not called."""
    return RunnableLambda(play)


@dataclass(frozen=True, slots=True)
class Subject:
    """A backend to check.

    Attributes:
        make: Makes the backend; each check starts and closes one of its own.
        folder: An empty folder; workers must reach it where ``shares`` is true.
        isolated: Whether workers are processes of their own, which may be killed.
        shares: Whether workers reach ``folder``.
        patience_s: Seconds that anything may take, the start of the engine included.
    """

    make: Callable[[], Backend]
    folder: Path
    isolated: bool = True
    shares: bool = True
    patience_s: float = 60.0


Check: TypeAlias = Callable[[Subject], Awaitable[None]]


def order(name: str, rows: Sequence[Row], journal: Path | None = None, **changes: Any) -> Order:
    """Return an order whose items do what their rows say.

    Args:
        name: Name of the shard.
        rows: One per item; see :class:`~fanfold.backends.workers.testing.play`.
        journal: Folder for the worker's journal; None has the records sent home.
        changes: Fields of the order to replace.
    """
    made = Order(
        shard=name,
        attempt=0,
        fanfold=own_version(),
        run={"id": "rehearsal", "model": "none", "simulated": True, "fingerprint": "00", "life": 1},
        settings={
            "task": {"prompt": "{text}", "graph": GRAPH},
            "endpoints": {"urls": ["http://127.0.0.1:9"]},
            "limits": {"drain_s": 5},
            "reduce": [{"op": "count"}],
        },
        items=[(n, f"{name}-{n}", {"text": f"{n}", **row}, None) for n, row in enumerate(rows)],
        urls=None,
        journal=None if journal is None else str(journal),
        streams=4,
        deadline_s=600.0,
    )
    return replace(made, **changes)


async def answers_in_any_order(subject: Subject) -> None:
    """Each summary is its order's, whichever order ends first."""
    delays = (0.3, 0.0, 0.2, 0.1, 0.0, 0.05)
    orders = [order(f"s{n}", [{"seconds": delay}] * (n + 1)) for n, delay in enumerate(delays)]
    async with _open(subject) as backend:
        summaries = await asyncio.gather(*(_done(subject, backend, one) for one in orders))
    for asked, summary in zip(orders, summaries, strict=True):
        _equal(summary.shard, asked.shard, "the summary's shard")
        _equal(summary.tally, {"done": len(asked.items), "failed": 0}, f"tally of {asked.shard}")
        names = sorted(record["id"] for record in summary.records or [])
        _equal(names, sorted(item[1] for item in asked.items), f"records of {asked.shard}")


async def item_errors_are_data(subject: Subject) -> None:
    """An item that raises is a failed item; its shard and the backend go on."""
    rows: list[Row] = [{}, {"do": "fail"}, {}]
    async with _open(subject) as backend:
        for _ in range(2):
            summary = await _done(subject, backend, order("s", rows))
            _equal(summary.tally, {"done": 2, "failed": 1}, "tally with an item that raises")
            failed = [r for r in summary.records or [] if r["status"] == "failed"]
            _equal([r["error_class"] for r in failed], ["ValueError"], "class of the item's error")


async def survives_a_dead_worker(subject: Subject) -> None:
    """``submit`` says that the worker died; the backend works on, rebuilt if it must be."""
    if not subject.isolated:
        return
    async with _open(subject) as backend:
        try:
            await _submitted(subject, backend, order("deadly", [{"do": "die"}]))
        except SiteError:
            pass
        else:
            raise AssertionError("submit() must raise SiteError when its worker is killed")
        await _works_again(subject, backend)


async def survives_a_hung_worker(subject: Subject) -> None:
    """A worker that hangs holds up nothing but itself; ``rebuild`` and ``close`` are bounded."""
    if not subject.isolated:
        return
    async with _open(subject) as backend:
        hung = order("hung", [{"do": "hang", "seconds": 60.0}])
        task = asyncio.ensure_future(backend.submit(hung.to_json()))
        done, _ = await asyncio.wait({task}, timeout=1.5)
        _equal(bool(done), False, "an answer of a worker that hangs")
        task.cancel()
        await asyncio.wait({task}, timeout=5.0)
        await asyncio.wait_for(backend.rebuild(), subject.patience_s)
        await _works_again(subject, backend)


async def heeds_a_stop(subject: Subject) -> None:
    """Once the stop file is there, no further item begins, and the summary says so."""
    if not subject.shares:
        return
    stop = subject.folder / "stop-me"
    slow = order("slow", [{"seconds": 0.2}] * 400, stop_file=str(stop), streams=2)
    async with _open(subject) as backend:
        await _done(subject, backend, order("warm", [{}]))
        task = asyncio.ensure_future(backend.submit(slow.to_json()))
        await asyncio.sleep(1.0)
        stop.touch()
        summary = Summary.from_json(await asyncio.wait_for(task, subject.patience_s))
    _equal(summary.stopped is not None, True, "Summary.stopped after a stop")
    _equal(_ended(summary) < len(slow.items), True, "a stop before all items began")
    _equal(len(summary.records or []), _ended(summary), "records of what had ended")


async def sends_large_results_in_parts(subject: Subject) -> None:
    """Records above the bound come home in several summaries; none is lost."""
    rows: list[Row] = [{"do": "large", "bytes": CARRY // 5}] * 9
    whole = order("large", rows, streams=1)
    left, rounds = {item[0]: item for item in whole.items}, 0
    async with _open(subject) as backend:
        while left and rounds < len(rows):
            part = replace(whole, items=list(left.values()), attempt=rounds)
            data = await _submitted(subject, backend, part)
            _equal(len(orjson.dumps(data)) < 2 * CARRY, True, "a summary's size within bounds")
            for record in Summary.from_json(data).records or []:
                del left[record["index"]]
            rounds += 1
    _equal(sorted(left), [], "items without a record")
    _equal(rounds > 1, True, "several orders for a large result")


async def fails_an_item_that_is_too_large(subject: Subject) -> None:
    """A single record that nothing carries is a failed item, with the reason."""
    rows: list[Row] = [{"do": "large", "bytes": 3 * CARRY}, {}]
    async with _open(subject) as backend:
        summary = await _done(subject, backend, order("huge", rows, streams=2))
        left = {0, 1} - {record["index"] for record in summary.records or []}
        if left:  # what did not fit beside it comes with the next order
            rest = order("huge", rows)
            again = replace(rest, items=[rest.items[n] for n in left])
            more = await _done(subject, backend, again)
            summary = replace(summary, records=[*(summary.records or []), *(more.records or [])])
    found = {record["index"]: record["status"] for record in summary.records or []}
    _equal(found, {0: "failed", 1: "done"}, "an item whose result nothing carries")


async def works_twice_on_one_order(subject: Subject) -> None:
    """A shard that is delivered twice is answered twice; each copy records each item once."""
    if not subject.shares:
        return
    journal = subject.folder / "journal"
    journal.mkdir(exist_ok=True)
    asked = order("twice", [{"seconds": 0.1}] * 10, journal)
    async with _open(subject) as backend:
        copies = [replace(asked, attempt=n) for n in range(2)]
        summaries = await asyncio.gather(*(_done(subject, backend, one) for one in copies))
    for summary in summaries:
        _equal(summary.tally, {"done": 10, "failed": 0}, "tally of a copy")
        _equal(summary.records, None, "records, where a journal is shared")
    lines = [line for file in journal.glob("*.jsonl") for line in file.read_bytes().splitlines()]
    found = [record["index"] for record in map(orjson.loads, lines) if "index" in record]
    _equal(sorted(found), sorted([*range(10)] * 2), "items in the shared journal")


async def refuses_another_version(subject: Subject) -> None:
    """A worker of another fanfold, or of another wire, says so as data and does nothing."""
    other = order("other", [{}], fanfold="0.0.0")
    async with _open(subject) as backend:
        summary = await _done(subject, backend, other)
        text = (summary.error or {}).get("text", "")
        _equal("0.0.0" in text and own_version() in text, True, f"both versions in {text!r}")
        _equal((summary.tally, summary.records), (None, None), "work in spite of it")
        strange = other.to_json() | {"v": 99, "fanfold": own_version()}
        data = await asyncio.wait_for(backend.submit(strange), subject.patience_s)
        _equal("99" in (data.get("error") or {}).get("text", ""), True, "the wire's version told")


async def closes_in_time(subject: Subject) -> None:
    """``close`` is bounded by its grace and a little more, whatever still runs."""
    seconds = 40.0 if subject.isolated else 3.0
    backend = subject.make()
    await asyncio.wait_for(backend.start(), subject.patience_s)
    _equal(backend.capacity() > 0, True, "capacity after the start")
    slow = order("slow", [{"seconds": seconds}])
    task = asyncio.ensure_future(backend.submit(slow.to_json()))
    await asyncio.sleep(0.5)
    await asyncio.wait_for(backend.close(1.0), 20.0)
    task.cancel()
    await asyncio.wait({task}, timeout=5.0)
    _equal(backend.capacity(), 0, "capacity after the end")


CHECKS: Final[tuple[Check, ...]] = (
    answers_in_any_order,
    item_errors_are_data,
    survives_a_dead_worker,
    survives_a_hung_worker,
    heeds_a_stop,
    sends_large_results_in_parts,
    fails_an_item_that_is_too_large,
    works_twice_on_one_order,
    refuses_another_version,
    closes_in_time,
)
"""All checks; each makes a backend of its own."""


@asynccontextmanager
async def _open(subject: Subject) -> AsyncIterator[Backend]:
    backend = subject.make()
    await asyncio.wait_for(backend.start(), subject.patience_s)
    try:
        yield backend
    finally:
        await backend.close(2.0)


async def _submitted(subject: Subject, backend: Backend, asked: Order) -> dict[str, Json]:
    return await asyncio.wait_for(backend.submit(asked.to_json()), subject.patience_s)


async def _done(subject: Subject, backend: Backend, asked: Order) -> Summary:
    return Summary.from_json(await _submitted(subject, backend, asked))


async def _works_again(subject: Subject, backend: Backend) -> None:
    """Work after a failure: the coordinator rebuilds what has no capacity, and sends again."""
    for _ in range(5):
        if backend.capacity() == 0:
            await asyncio.wait_for(backend.rebuild(), subject.patience_s)
        try:
            summary = await _done(subject, backend, order("again", [{}]))
        except SiteError:
            continue
        _equal(summary.tally, {"done": 1, "failed": 0}, "work after a failure")
        return
    raise AssertionError("the backend does not work again after a failure")


def _ended(summary: Summary) -> int:
    return sum((summary.tally or {}).values())


def _equal(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what}: expected {expected!r}, found {found!r}")
