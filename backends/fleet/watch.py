"""Follows an endpoints file, so that nodes may join and leave during a run."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from ..contract.errors import ConfigurationError
from .address import NO_KEY, ApiKey, EndpointSpec
from .fleet import Fleet
from .sources import parse_endpoints_file

_LOG: Final = logging.getLogger(__name__)


def read_endpoints_file(path: Path, api_key: ApiKey = NO_KEY) -> list[EndpointSpec]:
    """Read an endpoints file.

    Raises:
        ConfigurationError: The file cannot be read, or a line of it.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"endpoints file {path}: {error}") from error
    return parse_endpoints_file(text, str(path), api_key)


@asynccontextmanager
async def following(
    fleet: Fleet, path: Path, api_key: ApiKey = NO_KEY, every_s: float = 5.0
) -> AsyncIterator[None]:
    """Keep a fleet's members equal to a file's lines while the context lasts.

    A file that is gone or broken changes nothing and is reported once per change; launchers do
    not write theirs atomically.

    Args:
        fleet: The fleet.
        path: The file; a link is followed anew at each look.
        api_key: Key for endpoints that join.
        every_s: Seconds between two looks.
    """
    task = asyncio.create_task(_follow(fleet, path, api_key, every_s))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _follow(fleet: Fleet, path: Path, api_key: ApiKey, every_s: float) -> None:
    seen = await asyncio.to_thread(_stamp, path)
    while True:
        await asyncio.sleep(every_s)
        stamp = await asyncio.to_thread(_stamp, path)
        if stamp == seen:
            continue
        seen = stamp
        try:
            specs = await asyncio.to_thread(read_endpoints_file, path, api_key)
            joined, left = fleet.update(specs)
        except ConfigurationError as error:
            _LOG.warning("members stay as they are: %s", error.message)
        else:
            _LOG.info("endpoints file %s: %d joined, %d left", path, joined, left)


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino
