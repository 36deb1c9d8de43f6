"""Run a shard on workers: wait for it, and fold in the results."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import aclosing
from typing import Final

from tenacity import wait_exponential

from ...backends.core.aio import wait_first
from ...backends.core.errors import (
    BudgetExhaustedError,
    ConfigurationError,
    JournalError,
    RunStoppedError,
)
from ...backends.core.messages import ShardResult, ShardTask
from ...backends.core.types import Item, Shard
from ...backends.core.waits import pause_after
from ..context import RunTools, ShardCoordinator
from .local import ShardPart, read_items

logger = logging.getLogger(__name__)

_SLICE: Final = 256
_VISIBLE_S: Final = 90.0
"""Maximum seconds until a network file system shows what another node has written."""
_VISIBLE_WAIT: Final = wait_exponential(0.05, 5.0)
"""Pauses between two looks at such a file."""


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
    """A shard that workers run: which of its items are open, and its part of the aggregate."""

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

    async def run(self) -> ShardPart | None:
        """Have workers finish the shard; return its part, or None if the run was stopped.

        Once the run is being stopped, wait only as long as items in flight may take.
        """
        gate = self._tools.gate
        work = asyncio.create_task(self._fold_answers())
        try:
            with gate.poll_stop(self._stop_reason):
                await wait_first(work, gate.wait_closed(float("inf")))
            if not work.done():
                self._coordinator.stop()
                await wait_first(work, gate.wait_drained())
        finally:
            work.cancel()
        if work.done():
            work.result()
        await self._fold_finished()
        if self._open:
            return None
        await self._tools.item_journal.flush()
        return self._part

    async def _fold_answers(self) -> None:
        """Fold in what workers answer until all items have ended or the run is being stopped."""
        await self._fold_finished()
        if not self._open or self._is_stopped():
            return
        answers = self._coordinator.run_shard(self._shard, self._read_remaining)
        async with aclosing(answers):
            async for task, result in answers:
                if task is not None:
                    await self._wait_visible(task, result)
                    self._fold_part(task, result)
                await self._fold_finished()
                if not self._open or self._is_stopped():
                    return

    async def _read_remaining(self) -> list[Item]:
        """Read the items that have not ended yet."""
        tools, finished, spans = (
            self._tools,
            self._tools.item_journal.is_finished,
            [*self._open_slices()],
        )

        def read() -> list[Item]:
            items = (item for lo, hi in spans for item in tools.read(lo, hi))
            return [item for item in items if not finished(item.index)]

        return await asyncio.to_thread(read)

    def _is_stopped(self) -> bool:
        gate = self._tools.gate
        if not gate.is_closed and (reason := self._stop_reason()):
            gate.close(reason)
        return gate.is_closed

    async def _wait_visible(self, task: ShardTask, result: ShardResult) -> None:
        """Wait until this process can read the records that the worker reports to have written."""
        indices, reported = [item[0] for item in task.items], sum((result.tally or {}).values())
        waited, polls = 0.0, 0
        finished = self._tools.item_journal.is_finished
        while sum(map(finished, indices)) < reported:
            if waited >= _VISIBLE_S:
                text = "shard %s: records of %s did not show up in the journal within %.0f s"
                logger.warning(text, task.shard, result.worker, waited)
                return
            pause = pause_after(_VISIBLE_WAIT, polls) if polls else 0.0
            await asyncio.sleep(pause)
            await self._coordinator.refresh(result.worker)
            waited, polls = waited + pause, polls + 1

    def _fold_part(self, task: ShardTask, result: ShardResult) -> None:
        """Merge a worker's part if it covers the whole task and the journal has all its records.

        If two copies of a shard ended one item, the part may come from a copy that the journal
        does not keep; the node ``reduce`` then folds everything again.
        """
        indices, ended = [item[0] for item in task.items], sum((result.tally or {}).values())
        self._part.add_timing(ended, result.seconds)
        if result.parts is None or ended != len(indices):
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
            if not any(map(finished, self._tools.indices(lo, hi))):
                continue
            for item, record in await asyncio.to_thread(read_items, self._tools, lo, hi):
                if record is not None and self._is_open(item.index):
                    self._part.add(record, item)
                    self._close([item.index])

    def _is_open(self, index: int) -> bool:
        return not self._folded[self._tools.position(index) - self._shard.lo]

    def _close(self, indices: Sequence[int]) -> None:
        folded, lo, position = self._folded, self._shard.lo, self._tools.position
        for index in indices:
            folded[position(index) - lo] = 1
        self._open -= len(indices)

    def _open_slices(self) -> Iterator[tuple[int, int]]:
        """Yield the slices of the shard that contain open items."""
        for lo in range(self._shard.lo, self._shard.hi, _SLICE):
            hi = min(lo + _SLICE, self._shard.hi)
            if self._folded.find(0, lo - self._shard.lo, hi - self._shard.lo) >= 0:
                yield lo, hi
