"""A shard's work: its items through the item graph, into the journal, folded into a part."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from typing import Any, Final

import orjson

from ..backends.contract.calls import CURRENT_CALLS, CallLog
from ..backends.contract.errors import (
    ConfigurationError,
    FanfoldError,
    LedgerError,
    RunStoppedError,
)
from ..backends.contract.types import Item, Json, Outcome, Shard
from .aggregators import combine
from .context import RunTools
from .state import ItemState

_SLICE: Final = 64
"""Items read at a time, and outcomes folded at a time."""


class Part:
    """What a shard brings home: counts and its part of the aggregate."""

    def __init__(self, tools: RunTools) -> None:
        self._tools = tools
        self._pending: list[Outcome] = []
        self._state = tools.aggregate.empty()
        self._tally = {"done": 0, "failed": 0}

    def add(self, record: dict[str, Any], item: Item) -> None:
        """Fold one finished item in."""
        self._tally[record["status"]] += 1
        self._pending.append(_outcome(record, item))
        if len(self._pending) >= _SLICE:
            self._fold()

    def summary(self) -> dict[str, Any]:
        """Return the update of the graph's state: ``tally`` and ``parts``."""
        self._fold()
        return {"tally": self._tally, "parts": self._state}

    def _fold(self) -> None:
        self._state = combine(self._state, self._tools.aggregate.lift(self._pending))
        self._pending = []


async def work(shard: Shard, tools: RunTools, drain: Callable[[], str | None]) -> Part | None:
    """Finish all items of a shard.

    Args:
        shard: Its range of items.
        tools: The open run.
        drain: Tells why no further item shall begin, or None.

    Returns:
        The part; None when the run was stopped before the shard was finished.

    Raises:
        LedgerError: An item could not be recorded.
    """
    part, tasks = Part(tools), set[asyncio.Task[None]]()
    try:
        async with asyncio.TaskGroup() as group:
            complete = await _feed(shard, tools, part, group, tasks, drain)
            if not complete and not await tools.gate.drained():
                for task in tasks:
                    task.cancel()
    except* LedgerError as errors:
        raise errors.exceptions[0] from None
    return part if complete and not tools.gate.error else None


async def _feed(  # noqa: PLR0913 - the shard's own parts, used here alone
    shard: Shard,
    tools: RunTools,
    part: Part,
    group: asyncio.TaskGroup,
    tasks: set[asyncio.Task[None]],
    drain: Callable[[], str | None],
) -> bool:
    """Begin the shard's items as places come free; False when the run was stopped."""
    for item in _items(shard, tools):
        if tools.ledger.finished(item.index):
            part.add(tools.ledger.record(item.index), item)
            if item.index % _SLICE == 0:
                await asyncio.sleep(0)  # a replay of a million items must not hold up the loop
            continue
        if reason := drain():
            tools.gate.close(reason)
        if not await tools.gate.enter():
            return False
        task = group.create_task(_finish(item, tools, part))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        task.add_done_callback(lambda _: tools.gate.leave())
    return True


def _items(shard: Shard, tools: RunTools) -> Iterator[Item]:
    for lo in range(shard.lo, shard.hi, _SLICE):
        yield from tools.store.read(lo, min(lo + _SLICE, shard.hi))


async def _finish(item: Item, tools: RunTools, part: Part) -> None:
    """Take one item to its end and record it; what ends the run closes the gate."""
    calls = CallLog()
    CURRENT_CALLS.set(calls)  # this task's own context: the log reaches all that it starts
    started = time.perf_counter()
    try:
        state = await tools.run_item(item)
    except (RunStoppedError, ConfigurationError) as error:
        tools.gate.close(error.message, error)
        return
    except Exception as error:  # noqa: BLE001 - the item boundary: whatever a user's graph raises is the item's end
        state = _unexpected(error)
    record = _record(item, state, calls, time.perf_counter() - started, tools)
    tools.ledger.put(record)
    tools.progress.count(record)
    part.add(record, item)


def _unexpected(error: Exception) -> ItemState:
    text = error.message if isinstance(error, FanfoldError) else str(error) or repr(error)
    writable = text.encode(errors="replace").decode()  # JSON has no lone surrogates
    return {"error": {"class": type(error).__name__, "text": writable}}


def _record(
    item: Item, state: ItemState, calls: CallLog, latency_s: float, tools: RunTools
) -> dict[str, Json]:
    error = state.get("error")
    return {
        "index": item.index,
        "id": item.id,
        "status": "failed" if error else "done",
        "output": None if error else state.get("output"),
        "error_class": error["class"] if error else None,
        "error": error["text"] if error else None,
        "endpoint": calls.endpoint,
        "model": calls.model,
        "attempts": calls.requests,
        "repairs": state.get("repairs", 0),
        "prompt_tokens": calls.usage.prompt,
        "completion_tokens": calls.usage.completion,
        "latency_s": round(latency_s, 4),
        "finished_at": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "simulated": tools.simulated,
        "fingerprint": _fingerprint(item, tools.fingerprint),
    }


def _fingerprint(item: Item, asked: bytes) -> str:
    digest = hashlib.blake2b(asked, digest_size=12)
    digest.update(orjson.dumps([item.id, item.row]))
    return digest.hexdigest()


def _outcome(record: dict[str, Any], item: Item) -> Outcome:
    return Outcome(
        item.index, item.id, record["status"], record["output"], record["error_class"], item.row
    )
