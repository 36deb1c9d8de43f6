"""Run a shard in this process: items through the item graph, into the journal, into a part."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable
from contextlib import AsyncExitStack
from contextvars import Context
from typing import Any, Final

from ...backends.core.aio import DETACH_TASKS, create_detached_task, detach_task
from ...backends.core.errors import (
    RUN_ENDING_ERRORS,
    ConfigurationError,
    FanfoldError,
    JournalError,
    RunStoppedError,
)
from ...backends.core.protocols import CURRENT_CALLS, CallLog
from ...backends.core.types import Item, Outcome, Shard
from ..aggregators import State, combine_states
from ..context import RunTools
from ..item.item_state import ItemState
from ..item.prepare import make_item_error
from .gate import Gate
from .record import RecordBuilder, SampleCollector, make_outcome, put_record

_SLICE: Final = 64
"""Number of items read, and of outcomes folded, at a time."""
_MOST_PENDING: Final = 256
"""Number of outcomes folded at a time when nothing else is going on."""
_MOST_FOLDED: Final = 4096
"""Items that have ended, folded in between two looks whether the run must stop."""


class ShardPart:
    """Result of a shard: counts and its part of the aggregate."""

    def __init__(self, tools: RunTools) -> None:
        self._tools = tools
        self._pending: list[Outcome] = []
        self._samples = None if tools.fold is None else SampleCollector(tools.fold)
        self._state = tools.aggregators.empty()
        self._open = tools.aggregators.empty()  # changed in place, so never handed out
        self.tally = {"done": 0, "failed": 0}
        self.pace = dict[str, float]()

    def __len__(self) -> int:
        """Return the number of counted items."""
        return sum(self.tally.values())

    def add(self, record: dict[str, Any], item: Item) -> None:
        """Fold in one finished item; samples once all of their row have ended."""
        self.tally[record["status"]] += 1
        if self._samples is None:
            self._pending.append(make_outcome(record, item))
        elif (outcome := self._samples.add(record, item)) is not None:
            self._pending.append(outcome)
        if len(self._pending) >= _SLICE:
            self._fold()

    def add_all(self, found: Iterable[tuple[Item, dict[str, Any] | None]]) -> None:
        """Fold in those of some items that have ended: the others have no record."""
        ended = [(record, item) for item, record in found if record is not None]
        if self._samples is not None:
            for record, item in ended:
                self.add(record, item)
            return
        done = sum(record["status"] == "done" for record, _ in ended)
        self.tally["done"] += done
        self.tally["failed"] += len(ended) - done
        self._pending += [make_outcome(record, item) for record, item in ended]
        if len(self._pending) >= _MOST_PENDING:
            self._fold()

    def merge(self, tally: dict[str, int], state: State) -> None:
        """Add counts and a state that a worker folded."""
        for status, count in tally.items():
            self.tally[status] += count
        self._state = combine_states(self._state, state)

    def add_timing(self, items: int, seconds: float) -> None:
        """Record how long a remote worker took for a number of items."""
        self.pace = {
            "items": self.pace.get("items", 0) + items,
            "seconds": self.pace.get("seconds", 0.0) + seconds,
        }

    @property
    def has_open_rows(self) -> bool:
        """Return True if items were added that the part lacks: not all samples of their row."""
        return self._samples is not None and self._samples.has_open_rows

    def state(self) -> State:
        """Return the shard's part of the aggregate."""
        self._fold()
        self._state = combine_states(self._state, self._open)
        self._open = self._tools.aggregators.empty()
        return self._state

    def to_update(self) -> dict[str, Any]:
        """Return the update of the graph's state: ``tally``, ``parts``, and ``pace`` if timed."""
        update: dict[str, Any] = {"tally": self.tally, "parts": self.state()}
        return update | ({"pace": self.pace} if self.pace else {})

    def _fold(self) -> None:
        self._tools.aggregators.add(self._open, self._pending)
        self._pending = []


async def run_local_shard(
    shard: Shard, tools: RunTools, stop_reason: Callable[[], str | None]
) -> ShardPart | None:
    """Finish all items of a shard.

    Args:
        shard: The range of items.
        tools: The open run.
        stop_reason: Returns why no further item may begin, or None.

    Returns:
        The part, whose records are all on disk; None if the run was stopped before the shard was
        finished.

    Raises:
        JournalError: An item could not be recorded, or the items cannot be read.
    """
    part = await finish_items(shard, tools, stop_reason)
    return part if len(part) == len(shard) else None


async def finish_items(
    shard: Shard, tools: RunTools, stop_reason: Callable[[], str | None]
) -> ShardPart:
    """Finish the items of a shard until it ends or the run is stopped.

    Cancelling it stops the run like any other stop: no further item begins, and items in flight
    may finish. LangGraph may cancel more than once.

    Returns:
        The finished part; all its records are on disk.

    Raises:
        JournalError: An item could not be recorded, or the items cannot be read.
    """
    runner = _ShardRunner(shard, tools, stop_reason)
    watch = create_detached_task(runner.watch_gate())
    running = create_detached_task(runner.run())
    try:
        await _wait_for_runner(running, tools.gate)
    finally:
        watch.cancel()
    # a checkpoint must not contain items that the journal may lose
    await tools.item_journal.flush()
    return runner.part


async def _wait_for_runner(running: asyncio.Task[None], gate: Gate) -> None:
    """Wait for the runner; if cancelled, wait for the items in flight and then raise that."""
    cancelled: asyncio.CancelledError | None = None
    while not running.done():
        try:
            await asyncio.wait({running})
        except asyncio.CancelledError as error:
            gate.cancel()
            cancelled = error
    if cancelled is not None:
        # an error of the items stops the run through the gate; here it is only the cause
        cause = None if running.cancelled() else running.exception()
        raise cancelled from cause
    running.result()


class _ShardRunner:
    """Runs one shard."""

    def __init__(
        self, shard: Shard, tools: RunTools, stop_reason: Callable[[], str | None]
    ) -> None:
        self.part = ShardPart(tools)
        self._shard, self._tools, self._stop_reason = shard, tools, stop_reason
        self._recorder = RecordBuilder(tools)
        self._tasks = dict[asyncio.Task[None], CallLog]()
        self._finished = list[tuple[int, int]]()  # ranges to fold in once all others have begun

    async def watch_gate(self) -> None:
        """Close the gate when the run must stop, and cancel items that then take too long."""
        gate = self._tools.gate
        with gate.poll_stop(self._stop_reason):
            await gate.wait_closed(float("inf"))
        if not await gate.wait_drained(self._cancel_waiting):
            for task in self._tasks:
                task.cancel()

    def _cancel_waiting(self) -> None:
        """Cancel items that wait for an endpoint while none is alive: nothing is in flight."""
        for task, calls in self._tasks.items():
            if calls.waits_in_vain and not task.cancelling():
                task.cancel()

    async def run(self) -> None:
        """Finish the shard's items until the run is stopped.

        Raises:
            JournalError: An item could not be recorded, or the items cannot be read.
        """
        try:
            async with asyncio.TaskGroup() as group:
                await self.start_items(group)
        except* FanfoldError as errors:
            raise errors.exceptions[0] from None

    async def start_items(self, group: asyncio.TaskGroup) -> None:
        """Start items as slots become free, until the run is stopped."""
        context, gate = self._tools.make_item_variables(), self._tools.gate
        context.run(DETACH_TASKS.set, True)
        async with AsyncExitStack() as stack:
            await self._start_slices(group, context, gate, stack)
        await self._fold_finished()

    async def _start_slices(
        self, group: asyncio.TaskGroup, context: Context, gate: Gate, stack: AsyncExitStack
    ) -> None:
        has_turn = self._tools.order is None
        samples = 1 if self._tools.fold is None else self._tools.fold.samples
        step = -(-_SLICE // samples) * samples  # the samples of a row stay together
        hi = self._shard.lo
        while hi < self._shard.hi:
            if gate.is_closed:
                return
            lo = self._skip_finished(hi)
            if lo == self._shard.hi:
                return
            hi = min(lo + step, self._shard.hi)
            for item, record in await asyncio.to_thread(read_items, self._tools, lo, hi):
                if record is not None:
                    self._fold(record, item)
                    continue
                if not has_turn:
                    # Items that share a prefix start one after the other, over all shards.
                    await stack.enter_async_context(gate.turns.take(self._shard.lo))
                    has_turn = True
                if not await self._acquire_slot():
                    return
                calls = CallLog(index=item.index, sample=item.sample)
                running = self._run_item(item, calls)
                task = detach_task(group.create_task(running, context=context.copy()))
                self._tasks[task] = calls
                task.add_done_callback(self._on_item_done)

    def _skip_finished(self, lo: int) -> int:
        """Leave out the items from ``lo`` on that have ended; return the first that was not."""
        tools = self._tools
        if tools.order is not None:  # those that have ended are anywhere in the input
            return lo
        end = tools.item_journal.find_open(lo, self._shard.hi)
        samples = 1 if tools.fold is None else tools.fold.samples
        end -= (end - self._shard.lo) % samples  # the samples of a row stay together
        if end - lo < _SLICE and end < self._shard.hi:
            return lo
        self._finished.append((lo, end))
        return end

    async def _fold_finished(self) -> None:
        """Fold in the items that were left out, while others are in flight."""
        tools = self._tools
        for lo, hi in self._finished:
            part = ShardPart(tools)
            for start in range(lo, hi, _MOST_FOLDED):
                async with tools.folding:
                    if tools.gate.is_closed:
                        return
                    end = min(start + _MOST_FOLDED, hi)
                    try:
                        await asyncio.to_thread(fold_range, part, tools, start, end)
                    except ConfigurationError as error:  # a histogram has too many values
                        tools.gate.close(error.message, error)
                        return
            self.part.merge(part.tally, part.state())

    async def _acquire_slot(self) -> bool:
        """Wait for a slot; most shards wait here when the run must stop."""
        gate = self._tools.gate
        if not await gate.acquire(self._shard.lo):
            return False
        self._check_stop()
        if gate.is_closed:
            gate.release()
        return not gate.is_closed

    def _check_stop(self) -> None:
        if not self._tools.gate.is_closed and (reason := self._stop_reason()):
            self._tools.gate.close(reason)

    def _on_item_done(self, task: asyncio.Task[None]) -> None:
        del self._tasks[task]
        self._tools.gate.release()

    async def _run_item(self, item: Item, calls: CallLog) -> None:
        """Run one item and record it; an error that ends the run closes the gate."""
        calls.account = account = self._tools.open_account()
        self._tools.open_calls[id(calls)] = calls
        CURRENT_CALLS.set(
            calls
        )  # in this task's context, so that everything it starts uses the log
        started = time.perf_counter()
        try:
            state = await _run_item_graph(item, self._tools)
        except RUN_ENDING_ERRORS as error:
            self._tools.gate.close(error.message, error)
            return
        finally:
            calls.close_streams()
            if account is not None:
                account.close()
        record = self._recorder.build(item, state, calls, time.perf_counter() - started)
        try:
            record = put_record(self._tools.item_journal, record)
        except JournalError as error:
            self._tools.gate.close(error.message, error)
            raise  # cancels the others: they could not be recorded either
        del self._tools.open_calls[id(calls)]
        self._tools.progress.add_record(record)
        self._fold(record, item)

    def _fold(self, record: dict[str, Any], item: Item) -> None:
        try:
            self.part.add(record, item)
        except ConfigurationError as error:  # a histogram has too many different values
            self._tools.gate.close(error.message, error)


def read_items(tools: RunTools, lo: int, hi: int) -> list[tuple[Item, dict[str, Any] | None]]:
    """Return the items at positions, each with its record if it has ended; blocks."""
    items, read = tools.read(lo, hi), tools.item_journal.read_answers
    if tools.order is None:
        records = read(lo, hi)
    else:
        records = [read(item.index, item.index + 1)[0] for item in items]
    return list(zip(items, records, strict=True))


def has_ended(shard: Shard, tools: RunTools) -> bool:
    """Return True if all items of a shard have ended; of shards on workers this is not known."""
    journal = tools.item_journal
    if tools.coordinator is not None:
        return False
    if tools.order is None:
        return journal.find_open(shard.lo, shard.hi) == shard.hi
    return all(map(journal.is_finished, tools.indices(shard.lo, shard.hi)))


def fold_range(part: ShardPart, tools: RunTools, lo: int, hi: int) -> None:
    """Fold the items of a range that have ended into a part; blocks.

    Raises:
        ConfigurationError: A histogram has too many different values.
        JournalError: An item cannot be read.
    """
    for start in range(lo, hi, _MOST_PENDING):
        part.add_all(read_items(tools, start, min(start + _MOST_PENDING, hi)))
    part.state()


async def _run_item_graph(item: Item, tools: RunTools) -> ItemState:
    """Run an item; raise an error that is not the item's fault, which stops the run."""
    try:
        return await tools.run_item(item)
    except RUN_ENDING_ERRORS:
        raise
    except asyncio.CancelledError as error:
        task = asyncio.current_task()
        if task is None or task.cancelling():
            raise
        msg = f"item {item.id!r}: its work was cancelled from outside the run; resume the run"
        raise RunStoppedError(msg) from error
    except Exception as error:  # noqa: BLE001 - the item boundary
        return {"error": make_item_error(error)}
