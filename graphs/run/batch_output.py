"""Output of a run in OpenAI's batch format, written while the run goes on."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from ...backends.core.aio import create_detached_task
from ...backends.core.errors import JournalError
from ...backends.storage.batch_files import BatchFiles
from ...backends.storage.run_folder import RunFolder
from ...configs.models import BatchConfig
from .accounting import OpenRun

_WRITE_S: Final = 0.25
"""Seconds between two writes of lines."""


@asynccontextmanager
async def write_batch_output(
    folder: RunFolder, batch: BatchConfig, tools: OpenRun
) -> AsyncIterator[None]:
    """Write the lines of items as they end, while the block runs.

    The files are repaired first; at the end they contain each item of the journal once. If they
    cannot be written, the run stops.

    Args:
        folder: The run's folder.
        batch: The files; without an output nothing is written.
        tools: The open run.

    Raises:
        ConfigurationError: A file has content that is not of this run.
        JournalError: A file cannot be written.
    """
    if batch.output is None:
        yield
        return
    journal, ended = tools.item_journal, deque[int]()
    files = BatchFiles(
        journal,
        await asyncio.to_thread(folder.read_provenance),
        len(tools.store),
        Path(batch.output),
        None if batch.errors is None else Path(batch.errors),
    )
    journal.on_record = ended.append
    stop = asyncio.Event()
    try:
        await asyncio.to_thread(files.open)
        writing = create_detached_task(_write_until(stop, files, ended, tools))
        try:
            yield
        finally:
            stop.set()
            await asyncio.wait({writing})
            error = writing.exception()
        if error is not None:
            raise error
        await asyncio.to_thread(files.close)
    finally:
        journal.on_record = None


async def _write_until(
    stop: asyncio.Event, files: BatchFiles, ended: deque[int], tools: OpenRun
) -> None:
    """Write lines periodically, the last ones after ``stop``; close the gate at an error."""
    stopped = False
    try:
        while not stopped:
            try:
                await asyncio.wait_for(stop.wait(), _WRITE_S)
                stopped = True
            except TimeoutError:
                pass
            if ended:
                new = [ended.popleft() for _ in range(len(ended))]
                await asyncio.to_thread(files.write, new)
    except JournalError as error:
        tools.gate.close(error.message, error)
        raise
