"""Conformance checks for your own backends (documented for users)."""

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

from ..core.errors import BackendError
from ..core.messages import MAX_MESSAGE_BYTES, ShardResult, ShardTask, own_version
from ..core.protocols import Backend
from ..core.types import Json, Row

_LOOK_S: Final = 0.01
"""Seconds between two looks for a file."""

GRAPH: Final = f"{__name__}:actor"
"""Value for ``task.graph``."""


async def run_scripted_item(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Do what the columns of an item ask for.

    ``answer`` returns the item's ``text``; ``fail`` raises; ``large`` returns ``bytes`` bytes;
    ``die`` kills the process; ``hang`` blocks the event loop for ``seconds``, or until the file
    ``until`` exists. With ``once``, a file path, ``die`` and ``hang`` happen at most once.
    ``answer`` sleeps for ``seconds`` first.
    """
    do = columns.get("do", "answer")
    if do in ("die", "hang") and _is_first_time(columns.get("once")):
        if do == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        _hang(columns)
    elif do == "fail":
        raise ValueError(f"item {columns.get('text')!r} fails as scripted")
    elif do == "large":
        return {"output": "x" * columns["bytes"]}
    await asyncio.sleep(columns.get("seconds", 0) if do == "answer" else 0)
    return {"output": columns.get("text", "")}


def _hang(columns: Mapping[str, Any]) -> None:
    if (until := columns.get("until")) is None:
        time.sleep(columns["seconds"])
        return
    while not Path(until).exists():
        time.sleep(_LOOK_S)


def _is_first_time(file: str | None) -> bool:
    if file is None:
        return True
    try:
        Path(file).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def actor(model: object) -> Runnable[Any, Any]:  # noqa: ARG001 - every item graph's factory is given the model
    """Return the graph; the model is not called."""
    return RunnableLambda(run_scripted_item)


@dataclass(frozen=True, slots=True)
class BackendCase:
    """A backend to check.

    Attributes:
        make_backend: Makes the backend; each check starts and closes a new one.
        folder: An empty folder; workers must reach it if ``shares_folder`` is true.
        isolated: Whether workers are separate processes, which may be killed.
        shares_folder: Whether workers reach ``folder``.
        timeout_s: Seconds that any step may take, including the start of the engine.
    """

    make_backend: Callable[[], Backend]
    folder: Path
    isolated: bool = True
    shares_folder: bool = True
    timeout_s: float = 60.0


Check: TypeAlias = Callable[[BackendCase], Awaitable[None]]


def make_task(
    name: str, rows: Sequence[Row], journal: Path | None = None, **changes: Any
) -> ShardTask:
    """Return a task whose items do what their rows ask for.

    Args:
        name: Name of the shard.
        rows: One per item; see :class:`~fanfold.backends.workers.testing.run_scripted_item`.
        journal: Folder for the worker's journal; None returns the records in the result.
        changes: Fields of the task to replace.
    """
    made = ShardTask(
        shard=name,
        attempt=0,
        fanfold=own_version(),
        run={
            "id": "rehearsal",
            "model": "none",
            "simulated": True,
            "fingerprint": "00",
            "session": 1,
        },
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


async def check_answer_order(subject: BackendCase) -> None:
    """Check that each result belongs to its task, whichever task ends first."""
    delays = (0.3, 0.0, 0.2, 0.1, 0.0, 0.05)
    tasks = [make_task(f"s{n}", [{"seconds": delay}] * (n + 1)) for n, delay in enumerate(delays)]
    async with _open_backend(subject) as backend:
        results = await asyncio.gather(*(_run_task(subject, backend, task) for task in tasks))
    for task, result in zip(tasks, results, strict=True):
        _check_equal(result.shard, task.shard, "shard of the result")
        _check_equal(result.tally, {"done": len(task.items), "failed": 0}, f"tally of {task.shard}")
        names = sorted(record["id"] for record in result.records or [])
        _check_equal(names, sorted(item[1] for item in task.items), f"records of {task.shard}")


async def check_item_errors(subject: BackendCase) -> None:
    """Check that an item that raises is a failed item; its shard and the backend go on."""
    rows: list[Row] = [{}, {"do": "fail"}, {}]
    async with _open_backend(subject) as backend:
        for _ in range(2):
            result = await _run_task(subject, backend, make_task("s", rows))
            _check_equal(result.tally, {"done": 2, "failed": 1}, "tally with an item that raises")
            failed = [r for r in result.records or [] if r["status"] == "failed"]
            _check_equal(
                [r["error_class"] for r in failed], ["ValueError"], "class of the item's error"
            )


async def check_dead_worker(subject: BackendCase) -> None:
    """Check that ``submit`` raises when the worker dies; the backend works on or is rebuilt."""
    if not subject.isolated:
        return
    async with _open_backend(subject) as backend:
        try:
            await _submit(subject, backend, make_task("deadly", [{"do": "die"}]))
        except BackendError:
            pass
        else:
            raise AssertionError("submit() must raise BackendError when its worker is killed")
        await _check_recovery(subject, backend)


async def check_hung_worker(subject: BackendCase) -> None:
    """Check that a hung worker blocks only itself; ``rebuild`` and ``close`` are bounded."""
    if not subject.isolated:
        return
    async with _open_backend(subject) as backend:
        hung = make_task("hung", [{"do": "hang", "seconds": 60.0}])
        task = asyncio.ensure_future(backend.submit(hung.to_json()))
        done, _ = await asyncio.wait({task}, timeout=1.5)
        _check_equal(bool(done), False, "an answer of a worker that hangs")
        task.cancel()
        await asyncio.wait({task}, timeout=5.0)
        await asyncio.wait_for(backend.rebuild(), subject.timeout_s)
        await _check_recovery(subject, backend)


async def check_stop(subject: BackendCase) -> None:
    """Check that no further item begins once the stop file exists; the result reports it."""
    if not subject.shares_folder:
        return
    stop = subject.folder / "stop-me"
    slow = make_task("slow", [{"seconds": 0.2}] * 400, stop_file=str(stop), streams=2)
    async with _open_backend(subject) as backend:
        await _run_task(subject, backend, make_task("warm", [{}]))
        task = asyncio.ensure_future(backend.submit(slow.to_json()))
        await asyncio.sleep(1.0)
        stop.touch()
        result = ShardResult.from_json(await asyncio.wait_for(task, subject.timeout_s))
    _check_equal(result.stopped is not None, True, "ShardResult.stopped after a stop")
    _check_equal(_count_ended(result) < len(slow.items), True, "a stop before all items began")
    _check_equal(len(result.records or []), _count_ended(result), "records of what had ended")


async def check_large_results(subject: BackendCase) -> None:
    """Check that records above the size limit come in several results; none is lost."""
    rows: list[Row] = [{"do": "large", "bytes": MAX_MESSAGE_BYTES // 5}] * 9
    whole = make_task("large", rows, streams=1)
    left, rounds = {item[0]: item for item in whole.items}, 0
    async with _open_backend(subject) as backend:
        while left and rounds < len(rows):
            part = replace(whole, items=list(left.values()), attempt=rounds)
            data = await _submit(subject, backend, part)
            _check_equal(
                len(orjson.dumps(data)) < 2 * MAX_MESSAGE_BYTES,
                True,
                "size of a result within bounds",
            )
            for record in ShardResult.from_json(data).records or []:
                del left[record["index"]]
            rounds += 1
    _check_equal(sorted(left), [], "items without a record")
    _check_equal(rounds > 1, True, "several tasks for a large result")


async def check_oversized_item(subject: BackendCase) -> None:
    """Check that a record too large for any result is a failed item, with the reason."""
    rows: list[Row] = [{"do": "large", "bytes": 3 * MAX_MESSAGE_BYTES}, {}]
    async with _open_backend(subject) as backend:
        result = await _run_task(subject, backend, make_task("huge", rows, streams=2))
        left = {0, 1} - {record["index"] for record in result.records or []}
        if left:  # what did not fit comes with the next task
            rest = make_task("huge", rows)
            again = replace(rest, items=[rest.items[n] for n in left])
            more = await _run_task(subject, backend, again)
            result = replace(result, records=[*(result.records or []), *(more.records or [])])
    found = {record["index"]: record["status"] for record in result.records or []}
    _check_equal(found, {0: "failed", 1: "done"}, "an item whose result is too large")


async def check_duplicate_task(subject: BackendCase) -> None:
    """Check that a shard delivered twice is answered twice; a copy records each item once."""
    if not subject.shares_folder:
        return
    journal = subject.folder / "journal"
    journal.mkdir(exist_ok=True)
    task = make_task("twice", [{"seconds": 0.1}] * 10, journal)
    async with _open_backend(subject) as backend:
        copies = [replace(task, attempt=n) for n in range(2)]
        results = await asyncio.gather(*(_run_task(subject, backend, copy) for copy in copies))
    for result in results:
        _check_equal(result.tally, {"done": 10, "failed": 0}, "tally of a copy")
        _check_equal(result.records, None, "records, where a journal is shared")
    lines = [line for file in journal.glob("*.jsonl") for line in file.read_bytes().splitlines()]
    found = [record["index"] for record in map(orjson.loads, lines) if "index" in record]
    _check_equal(sorted(found), sorted([*range(10)] * 2), "items in the shared journal")


async def check_version_mismatch(subject: BackendCase) -> None:
    """Check that a worker of another fanfold or wire version reports it and does no work."""
    other = make_task("other", [{}], fanfold="0.0.0")
    async with _open_backend(subject) as backend:
        result = await _run_task(subject, backend, other)
        text = (result.error or {}).get("text", "")
        _check_equal("0.0.0" in text and own_version() in text, True, f"both versions in {text!r}")
        _check_equal(
            (result.tally, result.records), (None, None), "no work in spite of the mismatch"
        )
        strange = other.to_json() | {"v": 99, "fanfold": own_version()}
        data = await asyncio.wait_for(backend.submit(strange), subject.timeout_s)
        _check_equal(
            "99" in (data.get("error") or {}).get("text", ""), True, "the wire version in the error"
        )


async def check_close_timeout(subject: BackendCase) -> None:
    """Check that ``close`` is bounded by its grace time and a little more."""
    seconds = 40.0 if subject.isolated else 3.0
    backend = subject.make_backend()
    await asyncio.wait_for(backend.start(), subject.timeout_s)
    _check_equal(backend.capacity() > 0, True, "capacity after the start")
    slow = make_task("slow", [{"seconds": seconds}])
    task = asyncio.ensure_future(backend.submit(slow.to_json()))
    await asyncio.sleep(0.5)
    await asyncio.wait_for(backend.close(1.0), 20.0)
    task.cancel()
    await asyncio.wait({task}, timeout=5.0)
    _check_equal(backend.capacity(), 0, "capacity after the end")


CHECKS: Final[tuple[Check, ...]] = (
    check_answer_order,
    check_item_errors,
    check_dead_worker,
    check_hung_worker,
    check_stop,
    check_large_results,
    check_oversized_item,
    check_duplicate_task,
    check_version_mismatch,
    check_close_timeout,
)
"""All checks; each makes a new backend."""


@asynccontextmanager
async def _open_backend(subject: BackendCase) -> AsyncIterator[Backend]:
    backend = subject.make_backend()
    await asyncio.wait_for(backend.start(), subject.timeout_s)
    try:
        yield backend
    finally:
        await backend.close(2.0)


async def _submit(subject: BackendCase, backend: Backend, task: ShardTask) -> dict[str, Json]:
    return await asyncio.wait_for(backend.submit(task.to_json()), subject.timeout_s)


async def _run_task(subject: BackendCase, backend: Backend, task: ShardTask) -> ShardResult:
    return ShardResult.from_json(await _submit(subject, backend, task))


async def _check_recovery(subject: BackendCase, backend: Backend) -> None:
    """Run a task after a failure: rebuild a backend without capacity, then submit again."""
    for _ in range(5):
        if backend.capacity() == 0:
            await asyncio.wait_for(backend.rebuild(), subject.timeout_s)
        try:
            result = await _run_task(subject, backend, make_task("again", [{}]))
        except BackendError:
            continue
        _check_equal(result.tally, {"done": 1, "failed": 0}, "work after a failure")
        return
    raise AssertionError("the backend does not work again after a failure")


def _count_ended(result: ShardResult) -> int:
    return sum((result.tally or {}).values())


def _check_equal(found: object, expected: object, what: str) -> None:
    if found != expected:
        raise AssertionError(f"{what}: expected {expected!r}, found {found!r}")
