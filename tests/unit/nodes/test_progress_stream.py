from __future__ import annotations

import asyncio
from functools import partial
from typing import Any

import pytest

from fanfold.backends.core.money import UsageTotals
from fanfold.nodes.shard.progress import Progress, ProgressStream, ReadCounts


def counts_of(progress: Progress) -> ReadCounts:
    return partial(progress.to_json, simulated=True, priced=False)


def test_it_tells_once_a_second_and_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told, one = [100.0], list[dict[str, Any]](), ProgressStream()
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    progress = Progress(total=90, done=10, usage=UsageTotals(prompt_tokens=5, completion_tokens=7))
    one.emit(counts_of(progress), told.append)
    one.emit(counts_of(progress), told.append)  # another shard, at once
    now[0], progress.done, progress.failed = 104.0, 48, 2
    one.emit(counts_of(progress), told.append)
    one.emit(counts_of(progress), told.append, last=True)
    assert [(e["done"], e["failed"], e["rate"]) for e in told] == [
        (10, 0, 0.0),
        (48, 2, 10.0),
        (48, 2, 10.0),
    ]
    first = Progress(total=90, done=10, usage=UsageTotals(prompt_tokens=5, completion_tokens=7))
    assert told[0] == counts_of(first)() | {"type": "progress", "v": 1, "rate": 0.0}


def test_the_rate_is_of_the_last_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    now, told, one, progress = [0.0], list[dict[str, Any]](), ProgressStream(), Progress(total=999)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    for second in range(31):
        now[0], progress.done = float(second), second * (1 if second <= 15 else 2)
        one.emit(counts_of(progress), told.append)
    assert told[-1]["rate"] == 2.0


async def test_it_tells_while_the_block_runs_and_not_after() -> None:
    told = list[dict[str, Any]]()
    async with ProgressStream().stream_counts(counts_of(Progress(total=3)), told.append):
        await asyncio.sleep(0)
    assert len(told) == 1
    assert not [t for t in asyncio.all_tasks() if "_again" in repr(t) and not t.cancelling()]
