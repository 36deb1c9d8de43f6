"""A shard that is worked on elsewhere: sent, waited for, and folded in."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, Final

from ..backends.contract.errors import ConfigurationError, LedgerError, RunStoppedError
from ..backends.contract.types import Item, Shard
from ..backends.contract.wire import Order, Summary
from .context import Crew, RunTools
from .work import Part, read_items

_POLL_S: Final = 0.25
_SLICE: Final = 256


async def work_elsewhere(
    shard: Shard, tools: RunTools, crew: Crew, drain: Callable[[], str | None]
) -> Part | None:
    """Have all items of a shard finished elsewhere.

    Returns:
        The part; None when the run was stopped before the shard was finished.

    Raises:
        RunStoppedError: The shard was lost too often, or a worker says that going on is hopeless.
        ConfigurationError: A worker cannot do its work.
        LedgerError: A record could not be written or read.
    """
    if not await tools.gate.enter():
        return None
    try:
        return await _Errand(shard, tools, crew, drain).done()
    except (RunStoppedError, ConfigurationError, LedgerError) as error:
        tools.gate.close(error.message, error)
        raise
    finally:
        tools.gate.leave()


class _Errand:
    """One shard on its way."""

    def __init__(
        self, shard: Shard, tools: RunTools, crew: Crew, drain: Callable[[], str | None]
    ) -> None:
        self._shard, self._tools, self._crew, self._drain = shard, tools, crew, drain
        self._part = Part(tools)
        self._open: dict[int, Item] = {}

    async def done(self) -> Part | None:
        await self._read()
        name = f"{self._shard.lo}-{self._shard.hi}"
        while self._open and not self._stopped():
            before = len(self._open)
            outcome = await self._until_closed(self._crew.work(name, self._remaining))
            await self._fold(outcome)
            if outcome is not None and len(self._open) == before and not self._stopped():
                msg = f"a worker came back from shard {name} without having finished one item"
                raise RunStoppedError(f"{msg}: {outcome[1].stopped}")
        if self._open:
            return None
        await self._tools.ledger.flush()
        return self._part

    async def _read(self) -> None:
        """Fold in what has ended before, and keep the rest."""
        for lo in range(self._shard.lo, self._shard.hi, _SLICE):
            hi = min(lo + _SLICE, self._shard.hi)
            for item, record in await asyncio.to_thread(read_items, self._tools, lo, hi):
                if record is None:
                    self._open[item.index] = item
                else:
                    self._part.add(record, item)

    def _remaining(self) -> list[Item]:
        ledger = self._tools.ledger
        return [item for item in self._open.values() if not ledger.finished(item.index)]

    def _stopped(self) -> bool:
        gate = self._tools.gate
        if not gate.closed and (reason := self._drain()):
            gate.close(reason)
        return gate.closed

    async def _until_closed(self, work: Any) -> tuple[Order, Summary] | None:
        """Wait for a worker; once the run is being stopped, only for a while."""
        task = asyncio.ensure_future(work)
        stopping: float | None = None
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=_POLL_S)
                if stopping is None and self._stopped():
                    stopping = time.monotonic()
                    await self._crew.stop()
                if stopping is not None and time.monotonic() - stopping > self._tools.gate.drain_s:
                    return None
            outcome: tuple[Order, Summary] | None = task.result()
            return outcome
        finally:
            task.cancel()

    async def _fold(self, outcome: tuple[Order, Summary] | None) -> None:
        """Record and fold in what a worker has finished, and what lost ones had recorded."""
        ledger, twice = self._tools.ledger, self._tools.ledger.twice
        summary = outcome[1] if outcome is not None else None
        for record in (summary.records or []) if summary is not None else []:
            if not ledger.finished(record["index"]):
                ledger.put(record)
                self._tools.progress.count(record)
        await self._crew.refresh()
        if outcome is not None and ledger.twice == twice:
            self._fold_parts(*outcome)
        for index, item in list(self._open.items()):
            if ledger.finished(index):
                self._part.add(await asyncio.to_thread(ledger.record, index), item)
                del self._open[index]
        if summary is not None and summary.error is not None:
            raise _as_error(summary)

    def _fold_parts(self, order: Order, summary: Summary) -> None:
        """Take over a worker's part if it covers its whole order."""
        indices = [index for index, *_ in order.items]
        if summary.parts is None or sum((summary.tally or {}).values()) != len(indices):
            return
        if not all(index in self._open for index in indices):
            return
        self._part.merge(summary.tally or {}, summary.parts)
        for index in indices:
            del self._open[index]


def _as_error(summary: Summary) -> Exception:
    error = summary.error or {}
    kinds = {"RunStoppedError": RunStoppedError, "LedgerError": LedgerError}
    kind = kinds.get(error.get("class", ""), ConfigurationError)
    return kind(f"worker {summary.worker}: {error.get('text')}")
