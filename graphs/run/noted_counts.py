"""Note the counts of a run while a session goes on, so that ``fanfold ls`` reads no journal."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from typing import Any, Final

from ...backends.core.errors import JournalError
from ...backends.core.money import NANO_PER_USD
from ...backends.storage.run_folder import RunFolder, write_noted_counts
from ...nodes.context import RunTools

logger = logging.getLogger(__name__)

_NOTE_S: Final = 10.0
"""Seconds between two notes: what a kill costs a list of runs, but no record."""


def count_for_list(tools: RunTools) -> dict[str, Any]:
    """Return what a list shows of a run: items done and failed, and dollars, over all sessions."""
    progress = tools.progress
    nano = progress.usage.nano_usd + progress.node_time.nano_usd
    usd = nano / NANO_PER_USD if nano else None
    return {"done": progress.done, "failed": progress.failed, "usd": usd}


@asynccontextmanager
async def note_counts(
    folder: RunFolder, tools: RunTools, *, at_end: bool = True
) -> AsyncIterator[None]:
    """Write the counts of a run to its folder every few seconds while the block runs.

    A failure is a warning, once: the journal has the items.

    Args:
        folder: The folder.
        tools: The open run.
        at_end: Whether to write them at the end, too.
    """
    failed, ended = False, asyncio.Event()

    async def write() -> None:
        nonlocal failed
        counts = count_for_list(tools)
        try:
            await asyncio.to_thread(write_noted_counts, folder, counts)
        except JournalError as error:
            if not failed:
                logger.warning("%s", error.message)
            failed = True

    async def follow() -> None:
        while not ended.is_set():
            with suppress(TimeoutError):
                async with asyncio.timeout(_NOTE_S):
                    await ended.wait()
            if at_end or not ended.is_set():
                await write()

    following = asyncio.create_task(follow())
    try:
        yield
    finally:
        ended.set()  # not cancelled: its thread would go on writing
        await following
