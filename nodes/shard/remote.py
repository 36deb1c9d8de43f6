"""Run a shard on a worker: send it, wait for it, and fold in its result."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final

from ...backends.core.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    JournalError,
    RunStoppedError,
)
from ...backends.core.messages import DUPLICATE_REASON, WALLTIME_REASON, ShardResult, ShardTask
from ...backends.core.types import Item, Shard
from ..context import AnsweredTask, RunTools, ShardCoordinator
from .local import ShardPart, read_items

logger = logging.getLogger(__name__)

_SLICE: Final = 256
_VISIBLE_S: Final = 90.0
"""Maximum seconds until a network file system shows what another node has written."""
_BOUNCES: Final = 240
_BOUNCE_S: Final = 5.0
"""A worker whose job is about to end returns shards; meanwhile other workers take them."""
_FORGIVEN: Final = 2
"""How often the endpoints of a node may fail a shard before the run stops."""


async def run_remote_shard(
    shard: Shard,
    tools: RunTools,
    coordinator: ShardCoordinator,
    stop_reason: Callable[[], str | None],
) -> ShardPart | None:
    """Finish all items of a shard on workers.

    Returns:
        The part; None if the run was stopped before the shard was finished.

    Raises:
        RunStoppedError: The shard was lost too often, or a worker reports that the run must stop.
        ConfigurationError: A worker cannot run the shard.
        JournalError: A record could not be written or read.
    """
    if not await tools.gate.acquire():
        return None
    try:
        return await RemoteShard(shard, tools, coordinator, stop_reason).run()
    except BudgetExhaustedError as error:
        tools.gate.close(error.message, error)
        return None
    except (RunStoppedError, ConfigurationError, JournalError) as error:
        tools.gate.close(error.message, error)
        failure = error
    except asyncio.CancelledError:
        tools.gate.cancel()
        raise
    finally:
        tools.gate.release()
    # A failing Send cancels the others: wait until their results have arrived.
    await tools.gate.wait_drained()
    raise failure


class RemoteShard:
    """One shard that is sent to workers."""

    def __init__(
        self,
        shard: Shard,
        tools: RunTools,
        coordinator: ShardCoordinator,
        stop_reason: Callable[[], str | None],
    ) -> None:
        self._shard, self._tools = shard, tools
        self._coordinator, self._stop_reason = coordinator, stop_reason
        self._part = ShardPart(tools)
        self._folded = bytearray(len(shard))  # hundreds of shards wait: a byte per item
        self._open = len(shard)
        self._forgiven = self._bounced = 0

    async def run(self) -> ShardPart | None:
        """Have workers finish the shard; return its part, or None if the run was stopped."""
        await self._fold_finished()
        while self._open and not self._is_stopped():
            before = self._open
            outcome = await self._wait_for_worker(
                self._coordinator.run_shard(self._shard, self._read_remaining)
            )
            if outcome is not None:
                await self._fold_result(outcome)
            await self._fold_finished()
            if outcome is not None and self._open == before and not self._is_stopped():
                await self._check_progress(*outcome)
        if self._open:
            return None
        await self._tools.item_journal.flush()
        return self._part

    async def _read_remaining(self) -> list[Item]:
        """Read the items that have not ended yet."""
        store, finished, spans = (
            self._tools.store,
            self._tools.item_journal.is_finished,
            [*self._open_slices()],
        )

        def read() -> list[Item]:
            items = (item for lo, hi in spans for item in store.read(lo, hi))
            return [item for item in items if not finished(item.index)]

        return await asyncio.to_thread(read)

    def _is_stopped(self) -> bool:
        gate = self._tools.gate
        if not gate.is_closed and (reason := self._stop_reason()):
            gate.close(reason)
        return gate.is_closed

    async def _wait_for_worker(self, work: Any) -> AnsweredTask | None:
        """Wait for a worker; once the run is being stopped, only as long as for items in flight."""
        gate = self._tools.gate
        task = asyncio.ensure_future(work)
        closing: asyncio.Future[Any] = asyncio.ensure_future(gate.wait_closed(float("inf")))
        try:
            with gate.poll_stop(self._stop_reason):
                await asyncio.wait({task, closing}, return_when=asyncio.FIRST_COMPLETED)
            if not task.done():
                await self._wait_for_drain(task)
            found: AnsweredTask | None = task.result() if task.done() else None
            return found
        finally:
            closing.cancel()
            task.cancel()

    async def _wait_for_drain(self, task: asyncio.Future[Any]) -> None:
        """Stop the workers, and wait as long as items in flight may take."""
        stopping: asyncio.Future[Any] = asyncio.ensure_future(self._coordinator.stop())
        over: asyncio.Future[Any] = asyncio.ensure_future(self._tools.gate.wait_drained())
        try:
            await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()  # the coordinator continues it
            over.cancel()

    async def _fold_result(self, outcome: AnsweredTask) -> None:
        """Record and fold in the items that a worker has finished."""
        task, result = outcome
        only_copy = True
        check_record_indices(result, len(self._tools.store))
        for record in result.records or ():
            if self._tools.item_journal.is_finished(record["index"]):
                only_copy = False  # another copy's record counts, which this part lacks
                continue
            self._tools.item_journal.put(record)
            self._tools.progress.add_record(record)
        if task is not None:
            await self._wait_visible(task, result)
            if only_copy:
                self._fold_parts(task, result)
            self._part.add_timing(sum((result.tally or {}).values()), result.seconds)
        if result.error is not None:
            await self._fold_finished()
            self._forgive_or_raise(result)

    async def _wait_visible(self, task: ShardTask, result: ShardResult) -> None:
        """Wait until this process can read the records that the worker reports to have written."""
        indices, reported = [item[0] for item in task.items], sum((result.tally or {}).values())
        pause = waited = 0.0
        finished = self._tools.item_journal.is_finished
        while sum(map(finished, indices)) < reported:
            if waited >= _VISIBLE_S:
                text = "shard %s: records of %s did not show up in the journal within %.0f s"
                logger.warning(text, task.shard, result.worker, waited)
                return
            await asyncio.sleep(pause)
            await self._coordinator.refresh(result.worker)
            waited, pause = waited + pause, min(max(0.05, 2 * pause), 5.0)

    def _fold_parts(self, task: ShardTask, result: ShardResult) -> None:
        """Merge a worker's part if it covers the whole task and the journal has all its records.

        If two copies of a shard ended one item, the part may come from a copy that the journal
        does not keep; the node ``reduce`` then folds everything again.
        """
        indices = [item[0] for item in task.items]
        if result.parts is None or sum((result.tally or {}).values()) != len(indices):
            return
        if all(map(self._is_open, indices)) and all(
            map(self._tools.item_journal.is_finished, indices)
        ):
            self._part.merge(result.tally or {}, result.parts)
            self._close(indices)

    async def _fold_finished(self) -> None:
        """Fold in, from the journal, items that have ended and are not folded yet."""
        finished = self._tools.item_journal.is_finished
        for lo, hi in list(self._open_slices()):
            if not any(map(finished, range(lo, hi))):
                continue
            for item, record in await asyncio.to_thread(read_items, self._tools, lo, hi):
                if record is not None and self._is_open(item.index):
                    self._part.add(record, item)
                    self._close([item.index])

    def _is_open(self, index: int) -> bool:
        return not self._folded[index - self._shard.lo]

    def _close(self, indices: Sequence[int]) -> None:
        folded, lo = self._folded, self._shard.lo
        for index in indices:
            folded[index - lo] = 1
        self._open -= len(indices)

    def _open_slices(self) -> Iterator[tuple[int, int]]:
        """Yield the slices of the shard that contain open items."""
        for lo in range(self._shard.lo, self._shard.hi, _SLICE):
            hi = min(lo + _SLICE, self._shard.hi)
            if self._folded.find(0, lo - self._shard.lo, hi - self._shard.lo) >= 0:
                yield lo, hi

    async def _check_progress(self, task: ShardTask | None, result: ShardResult) -> None:
        if result.error is not None or task is None:  # forgiven; stopped by this session
            return
        if result.short:  # the next lease is larger
            return
        if result.stopped == DUPLICATE_REASON and self._bounced < _BOUNCES:
            self._bounced += 1  # the next task omits the items that the first copy recorded
            return
        if (result.stopped or "").startswith(WALLTIME_REASON) and self._bounced < _BOUNCES:
            self._bounced += 1
            await self._tools.gate.wait_closed(_BOUNCE_S)
            return
        msg = (
            f"worker {result.worker} returned shard {result.shard} without a finished item: "
            f"{result.stopped}"
        )
        raise RunStoppedError(msg)

    def _forgive_or_raise(self, result: ShardResult) -> None:
        """Let another node try a shard that the endpoints of one node could not finish."""
        error = _result_error(result)
        hopeless = not (self._coordinator.has_node_endpoints and isinstance(error, RunStoppedError))
        if hopeless or self._forgiven >= _FORGIVEN:
            raise error
        self._forgiven += 1
        logger.warning("shard %s: %s", result.shard, error)


def check_record_indices(result: ShardResult, items: int) -> None:
    """Check that a worker's records are of items of the run.

    Raises:
        RunStoppedError: One is not; no record of the result is kept.
    """
    for record in result.records or ():
        if record["index"] >= items:
            msg = (
                f"worker {result.worker}: a record of shard {result.shard} has index "
                f"{record['index']}, and this run has {items:,} items; is it of another run?"
            )
            raise RunStoppedError(msg)


def _result_error(result: ShardResult) -> Exception:
    error = result.error or {}
    kinds = {"RunStoppedError": RunStoppedError, "JournalError": JournalError}
    kind = kinds.get(error.get("class", ""), ConfigurationError)
    return kind(f"worker {result.worker}: {error.get('text')}")
