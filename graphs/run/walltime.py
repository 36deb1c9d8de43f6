"""When a life of a run must end, by its settings or by the batch job that it runs in."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ...backends.cluster.walltime import Walltime
from ...backends.core.errors import RunStoppedError
from ...nodes.shard.gate import Gate

T = TypeVar("T")


@contextmanager
def closing(gate: Gate, end: Walltime | None) -> Iterator[None]:
    """Close a gate in time, while the block runs."""
    if end is None:
        yield
        return
    timer = asyncio.get_running_loop().call_later(end.left(), gate.close, end.reason)
    try:
        yield
    finally:
        timer.cancel()


async def within(work: Awaitable[T], end: Walltime | None) -> T:
    """Do something that comes before the first item, unless there is no time left for it.

    Raises:
        RunStoppedError: There is none.
    """
    try:
        async with asyncio.timeout(None if end is None else end.left()) as timer:
            return await work
    except TimeoutError:
        if end is None or not timer.expired():
            raise
        msg = f"{end.reason}; nothing was asked, the same command goes on in a job with more time"
        raise RunStoppedError(msg) from None
