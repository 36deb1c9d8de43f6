"""A shard's work: its items through the item graph, into the journal, folded into a part."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import replace
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import orjson
from langchain_core.runnables import RunnableConfig
from langchain_core.runnables.config import var_child_runnable_config
from langgraph.errors import (
    EmptyInputError,
    GraphBubbleUp,
    GraphRecursionError,
    InvalidUpdateError,
    NodeCancelledError,
    NodeTimeoutError,
)
from langgraph.runtime import RunControl, Runtime
from langgraph.store.base import BaseStore

from ...backends.core.aio import KEPT, create_kept_task, keep
from ...backends.core.errors import (
    ENDS_RUN,
    ConfigurationError,
    FanfoldError,
    InvalidAnswerError,
    LedgerError,
    RunStoppedError,
)
from ...backends.core.money import Tariff
from ...backends.core.protocols import CURRENT_CALLS, CallLog, Share
from ...backends.core.types import Item, Json, Outcome, Shard
from ...backends.core.values import MOST, bound_counts, writable_text
from ..aggregators import State, combine
from ..context import Ledger, RunTools
from ..item.prepare import failure
from ..state import ItemState
from .gate import Gate

_SLICE: Final = 64
"""Items read at a time, and outcomes folded at a time."""

_NAMING: Final = ("checkpoint_ns", "__pregel_task_id", "__pregel_stream")
"""Keys of LangGraph's configuration by which a stream names the graphs run inside a node."""

_RUNTIME: Final = "__pregel_runtime"
_SCRATCHPAD: Final = "__pregel_scratchpad"

_ENGINE_ERRORS: Final = (
    GraphBubbleUp,
    GraphRecursionError,
    InvalidUpdateError,
    EmptyInputError,
    NodeTimeoutError,
    NodeCancelledError,
)
"""LangGraph's own errors. Those of a user's graph end its item before they get here."""

_MOST_RAW: Final = 16_000
"""Most bytes that a record keeps of an answer's text."""
_CUT: Final = "…"

_SUMS: Final = ("lost_tokens", "useful_tokens", "nano_usd", "useful_nano_usd")


class Part:
    """What a shard brings home: counts and its part of the aggregate."""

    def __init__(self, tools: RunTools) -> None:
        self._tools = tools
        self._pending: list[Outcome] = []
        self._state = tools.aggregate.empty()
        self.tally = {"done": 0, "failed": 0}
        self.pace = dict[str, float]()

    def __len__(self) -> int:
        """Return how many items it counts."""
        return sum(self.tally.values())

    def add(self, record: dict[str, Any], item: Item) -> None:
        """Fold one finished item in."""
        self.tally[record["status"]] += 1
        self._pending.append(_outcome(record, item))
        if len(self._pending) >= _SLICE:
            self._fold()

    def merge(self, tally: dict[str, int], state: State) -> None:
        """Take over what a worker has folded."""
        for status, count in tally.items():
            self.tally[status] += count
        self._state = combine(self._state, state)

    def timed(self, items: int, seconds: float) -> None:
        """Note how long a worker elsewhere took for so many items."""
        self.pace = {
            "items": self.pace.get("items", 0) + items,
            "seconds": self.pace.get("seconds", 0.0) + seconds,
        }

    def state(self) -> State:
        """Return the items' part of the aggregate."""
        self._fold()
        return self._state

    def summary(self) -> dict[str, Any]:
        """Return the update of the graph's state: ``tally``, ``parts``, and ``pace`` if timed."""
        update: dict[str, Any] = {"tally": self.tally, "parts": self.state()}
        return update | ({"pace": self.pace} if self.pace else {})

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
        The part, everything in it on disk; None when the run was stopped before the shard was
        finished.

    Raises:
        LedgerError: An item could not be recorded, or the items cannot be read.
    """
    part = await finish_some(shard, tools, drain)
    return part if len(part) == len(shard) else None


async def finish_some(shard: Shard, tools: RunTools, drain: Callable[[], str | None]) -> Part:
    """Finish the items of a shard until it ends or the run is stopped.

    Cancelling it, however often, stops the run: no further item begins, and those in flight are
    waited for as in any other stop. LangGraph cancels more than once.

    Returns:
        What was finished, everything in it on disk.

    Raises:
        LedgerError: An item could not be recorded, or the items cannot be read.
    """
    worker = _Worker(shard, tools, drain)
    watch = create_kept_task(worker.watch())
    working = create_kept_task(worker.work())
    try:
        await _ended(working, tools.gate)
    finally:
        watch.cancel()
    await tools.ledger.flush()  # a checkpoint must not know of items that the journal may lose
    return worker.part


async def _ended(working: asyncio.Task[None], gate: Gate) -> None:
    """Wait for the work; if cancelled, for the items in flight before that goes on."""
    cancelled: asyncio.CancelledError | None = None
    while not working.done():
        try:
            await asyncio.wait({working})
        except asyncio.CancelledError as error:
            gate.cancel()
            cancelled = error
    if cancelled is not None:
        raise cancelled
    working.result()


class _Worker:
    """Works on one shard."""

    def __init__(self, shard: Shard, tools: RunTools, drain: Callable[[], str | None]) -> None:
        self.part = Part(tools)
        self._shard, self._tools, self._drain = shard, tools, drain
        self._recorder = Recorder(tools)
        self._tasks = set[asyncio.Task[None]]()

    async def watch(self) -> None:
        """Close the gate when the run shall stop, and cut off items that take too long then."""
        gate = self._tools.gate
        with gate.heeding(self._drain):
            await gate.wait_closed(float("inf"))
        if not await gate.drained():
            for task in self._tasks:
                task.cancel()

    async def work(self) -> None:
        """Finish the shard's items, until the run is stopped.

        Raises:
            LedgerError: An item could not be recorded, or the items cannot be read.
        """
        try:
            async with asyncio.TaskGroup() as group:
                await self.feed(group)
        except* FanfoldError as errors:
            raise errors.exceptions[0] from None

    async def feed(self, group: asyncio.TaskGroup) -> None:
        """Begin the shard's items as places come free, until the run is stopped."""
        surroundings, gate = _surroundings(), self._tools.gate
        for lo in range(self._shard.lo, self._shard.hi, _SLICE):
            if gate.closed:
                return
            hi = min(lo + _SLICE, self._shard.hi)
            for item, record in await asyncio.to_thread(read_items, self._tools, lo, hi):
                if record is not None:
                    self._fold(record, item)
                    continue
                if not await self._admitted():
                    return
                task = keep(group.create_task(self._finish(item), context=surroundings.copy()))
                self._tasks.add(task)
                task.add_done_callback(self._left)

    async def _admitted(self) -> bool:
        """Wait for a place; most shards wait here when the run shall stop."""
        gate = self._tools.gate
        if not await gate.enter():
            return False
        self._heed()
        if gate.closed:
            gate.leave()
        return not gate.closed

    def _heed(self) -> None:
        if not self._tools.gate.closed and (reason := self._drain()):
            self._tools.gate.close(reason)

    def _left(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        self._tools.gate.leave()

    async def _finish(self, item: Item) -> None:
        """Take one item to its end and record it; what ends the run closes the gate."""
        account = self._tools.account()
        calls = CallLog(account=account)
        CURRENT_CALLS.set(calls)  # this task's own context: the log reaches all that it starts
        started = time.perf_counter()
        try:
            state = await _end_of(item, self._tools)
        except ENDS_RUN as error:
            self._tools.gate.close(error.message, error)
            return
        finally:
            calls.close_streams()
            if account is not None:
                account.close()
        record = self._recorder.record(item, state, calls, time.perf_counter() - started)
        try:
            record = put_record(self._tools.ledger, record)
        except LedgerError as error:
            self._tools.gate.close(error.message, error)
            raise  # cuts the others off: they could not be recorded either
        self._tools.progress.count(record)
        self._fold(record, item)

    def _fold(self, record: dict[str, Any], item: Item) -> None:
        try:
            self.part.add(record, item)
        except ConfigurationError as error:  # more different values than a histogram counts
            self._tools.gate.close(error.message, error)


def read_items(tools: RunTools, lo: int, hi: int) -> list[tuple[Item, dict[str, Any] | None]]:
    """Return items with the records of those that have ended; blocks."""
    ledger = tools.ledger
    return [
        (item, ledger.record(item.index) if ledger.finished(item.index) else None)
        for item in tools.store.read(lo, hi)
    ]


def _surroundings() -> Context:
    """Return the context for items' tasks, in which LangGraph finds :func:`item_config`."""
    context = copy_context()
    context.run(KEPT.set, True)
    config = var_child_runnable_config.get()
    if config is not None:
        context.run(var_child_runnable_config.set, item_config(config))
    return context


def item_config(outer: RunnableConfig, store: BaseStore | None = None) -> RunnableConfig:
    """Return what an item inherits from the invocation around it: who watches, and no more.

    Callbacks, metadata and the place in the stream stay. LangGraph would also hand down recursion
    limit, concurrency, durability, tags, thread, saver, cache, store, context, the request to
    drain and the answers to interrupts. None of them may change what an item ends with, and an
    item that runs in another process has none of them.

    Args:
        outer: The configuration of the node around the item.
        store: The store of the graph that is to run.
    """
    given = outer.get("configurable", {})
    kept: dict[str, Any] = {key: given[key] for key in _NAMING if key in given}
    if isinstance(runtime := given.get(_RUNTIME), Runtime):
        kept[_RUNTIME] = Runtime(
            store=store,
            stream_writer=runtime.stream_writer,
            heartbeat=runtime.heartbeat,
            server_info=runtime.server_info,
            control=RunControl(),
        )
    if (scratchpad := given.get(_SCRATCHPAD)) is not None:
        # It numbers the graphs run inside the node, and holds the answers to the node's interrupts.
        kept[_SCRATCHPAD] = replace(scratchpad, resume=[], get_null_resume=lambda _=False: None)
    config = RunnableConfig(configurable=kept)
    if outer.get("callbacks") is not None:
        config["callbacks"] = outer["callbacks"]
    if outer.get("metadata"):
        config["metadata"] = outer["metadata"]
    return config


async def _end_of(item: Item, tools: RunTools) -> ItemState:
    """Take an item to its end; what is no fault of the item's is raised, and stops the run."""
    try:
        return await tools.run_item(item)
    except ENDS_RUN:
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        msg = f"item {item.id!r}: its work was cancelled from outside the run; resume the run"
        raise RunStoppedError(msg) from error
    except _ENGINE_ERRORS as error:
        msg = f"item {item.id!r}: LangGraph stopped it ({type(error).__name__}: {error})"
        raise RunStoppedError(f"{msg}; the item is not recorded, resume the run") from error
    except Exception as error:  # noqa: BLE001 - the item boundary
        return {"error": failure(error)}


class Recorder:
    """Makes the journal's records of a run; ``docs/resume.md`` describes them."""

    def __init__(self, tools: RunTools) -> None:
        self._tools = tools
        self._question = hashlib.sha256(tools.asked)
        self._fingerprint = hashlib.blake2b(tools.fingerprint, digest_size=12)

    def record(
        self, item: Item, state: ItemState, calls: CallLog, latency_s: float
    ) -> dict[str, Json]:
        """Return the record of an item that has ended."""
        tools, error = self._tools, state.get("error")
        calls.close(done=error is None)
        usage = calls.usage
        raw = state.get("raw") if error is not None or tools.keep_raw else None
        record = {
            "stage": "",
            "index": item.index,
            "id": item.id,
            "sample": 0,
            "status": "failed" if error else "done",
            "question": self._question_of(state),
            "output": None if error else state.get("output"),
            "error_class": error["class"] if error else None,
            "error": error["text"] if error else None,
            "raw": raw,
            "endpoint": calls.endpoint,
            "model": calls.model,
            "requests": calls.requests,
            "attempts": calls.attempts,
            "repairs": state.get("repairs", 0),
            "reused": calls.reused,
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "completion_tokens": usage.completion,
            "lost_tokens": 0,
            "useful_tokens": 0,
            "nano_usd": 0,
            "useful_nano_usd": 0,
            "latency_s": round(latency_s, 4),
            "finished_at": _now(),
            "simulated": tools.simulated,
            "fingerprint": self._fingerprint_of(item),
            "origin": None,
        }
        if raw is not None:
            record |= _raw(raw)
        shares = list(calls.shares.values())
        if len(shares) == 1:
            record |= _paid(shares[0], tools.tariff)
        elif shares:
            told = [_share(share, tools.tariff) for share in shares]
            sums = {name: min(MOST, sum(one[name] for one in told)) for name in _SUMS}
            record |= sums | {"shares": told}
            for one in told:
                bound_counts(one)
        bound_counts(record)
        return record

    def _question_of(self, state: ItemState) -> str | None:
        """Return the digest of what was asked first; repairs ask it again."""
        messages = state.get("messages")
        if not messages:
            return None
        first = messages[0] if messages[0]["role"] == "user" else messages[1]
        digest = self._question.copy()
        digest.update(first["content"].encode(errors="replace"))
        return digest.hexdigest()[:32]

    def _fingerprint_of(self, item: Item) -> str:
        digest = self._fingerprint.copy()
        digest.update(orjson.dumps([item.id, item.row]))
        return digest.hexdigest()


def put_record(ledger: Ledger, record: dict[str, Any]) -> dict[str, Any]:
    """Record how an item ended; where JSON has no form for its answer, it has failed.

    Returns:
        The record that was put.

    Raises:
        LedgerError: It could not be written.
    """
    try:
        ledger.put(record)
    except TypeError as error:
        record = _without_answer(record, error)
        ledger.put(record)
    return record


def _without_answer(record: dict[str, Any], error: TypeError) -> dict[str, Any]:
    """Return a record without the value that JSON has no form for; what it cost stays."""
    if record["status"] != "failed":
        text = f"the answer cannot be recorded as JSON: {error}"
        failed = {"status": "failed", "output": None, "error_class": InvalidAnswerError.__name__}
        record = record | failed | {"error": text}
    return {name: _writable(value) for name, value in record.items()}


def _writable(value: Any) -> Any:
    """Return plain data whose texts UTF-8 can write."""
    if isinstance(value, str):
        return writable_text(value)
    if isinstance(value, list):
        return [_writable(one) for one in value]
    if isinstance(value, dict):
        return {key: _writable(one) for key, one in value.items()}
    return value


def _raw(text: str) -> dict[str, Json]:
    """Return what a record keeps of an answer's text."""
    if 4 * len(text) <= _MOST_RAW:
        return {"raw": text}
    data = text.encode(errors="replace")
    if len(data) <= _MOST_RAW:
        return {"raw": text}
    kept = data[: _MOST_RAW - len(_CUT.encode())].decode(errors="ignore")
    return {"raw": kept + _CUT, "raw_bytes": len(data)}


def _now() -> str:
    """Return the present time as ISO 8601 text in UTC."""
    seconds, ms = divmod(time.time_ns() // 1_000_000, 1000)
    return f"{_second(seconds)}.{ms:03}+00:00"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:19]


def _share(share: Share, tariff: Tariff) -> dict[str, Json]:
    """Return what one endpoint did for an item; an item's record has the same names."""
    return {
        "endpoint": share.endpoint,
        "model": share.model,
        "requests": share.requests,
        "prompt_tokens": share.usage.prompt,
        "cached_tokens": share.usage.cached,
        "completion_tokens": share.usage.completion,
        **_paid(share, tariff),
    }


def _paid(share: Share, tariff: Tariff) -> dict[str, int]:
    """Return what one endpoint's answers cost, and what of it was useful."""
    usage, lost, useful = share.usage, share.lost, share.useful
    nano = tariff.nano_usd(usage)
    useful_nano = nano if useful is usage else tariff.nano_usd(useful)
    lost_tokens = lost.tokens
    if lost_tokens:
        nano += tariff.nano_usd(lost)
    if nano > MOST or lost_tokens > MOST:  # prices and limits without bounds
        nano, lost_tokens = min(MOST, nano), min(MOST, lost_tokens)
        useful_nano = min(MOST, useful_nano)
    return {
        "lost_tokens": lost_tokens,
        "useful_tokens": useful.tokens,
        "nano_usd": nano,
        "useful_nano_usd": useful_nano,
    }


def _outcome(record: dict[str, Any], item: Item) -> Outcome:
    return Outcome(
        item.index, item.id, record["status"], record["output"], record["error_class"], item.row
    )
