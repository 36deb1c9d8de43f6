"""From settings to the answers that equal requests share."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from ...configs.models import RunConfig
from ..core.errors import ConfigurationError
from ..fleet.cache import Reuse
from ..storage.response_cache import AnswerStore

_LOOK_S: Final = 2.0
_SHARE: Final = 10.0

logger = logging.getLogger(__name__)


def check_cache(config: RunConfig) -> None:
    """Check, without writing, that answers can be kept where the settings say.

    Raises:
        ConfigurationError: They cannot. Nothing is said of a folder that only workers reach.
    """
    remote = config.backend.is_remote and not config.backend.workers_share_folder
    if config.cache in ("off", "run") or remote:
        return
    path = Path(config.cache)
    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise ConfigurationError(f"cache: {there} is no folder; name another, or say cache: off")
    if not os.access(there, os.W_OK | os.X_OK):
        msg = f"cache: {there} cannot be written to; name another folder, or say cache: off"
        raise ConfigurationError(msg)


@asynccontextmanager
async def reusing(
    config: RunConfig, simulated: bool, own: Path | None
) -> AsyncIterator[Reuse | None]:
    """Open the answers that the settings name; None when each request is to be sent.

    Args:
        config: The settings.
        simulated: Whether the fleet is.
        own: The run's own folder for them; None where it cannot be reached: a worker then keeps
            them as long as it lives.

    Raises:
        ConfigurationError: The folder cannot be used.
    """
    if config.cache == "off":
        yield None
        return
    async with AsyncExitStack() as stack:
        shared = config.cache != "run"
        contested = shared or (own is not None and config.backend.is_remote)
        folder = Path(config.cache) if shared else own
        if folder is None:
            made = await asyncio.to_thread(tempfile.TemporaryDirectory, prefix="fanfold-")
            stack.push_async_callback(asyncio.to_thread, made.cleanup)
            folder = Path(made.name)
        writer = f"{socket.gethostname()}-{os.getpid()}"
        store = AnswerStore(folder, simulated=simulated, writer=writer, contested=contested)
        stack.push_async_callback(asyncio.to_thread, store.close)
        await asyncio.to_thread(store.open)
        if contested:
            await stack.enter_async_context(_followed(store))
        reuse = Reuse(
            store,
            simulated=simulated,
            sampled=config.cache_sampled,
            patience_s=config.limits.request_timeout_s,
        )
        stack.push_async_callback(reuse.aclose)
        yield reuse


@asynccontextmanager
async def _followed(store: AnswerStore) -> AsyncIterator[None]:
    """Read on what other processes keep while the block runs."""
    following = asyncio.create_task(_follow(store), name="follow kept answers")
    try:
        yield
    finally:
        following.cancel()
        await asyncio.wait({following})


async def _follow(store: AnswerStore) -> None:
    """Read what other processes keep, again and again; less often where that takes long."""
    took, warned = 0.0, False
    while True:
        await asyncio.sleep(max(_LOOK_S, _SHARE * took))
        began = time.monotonic()
        try:
            await asyncio.to_thread(store.refresh)
        except OSError as error:  # a cleared folder, or a file system that is away for a while
            if not warned:
                logger.warning("cache: others' answers cannot be read at the moment: %s", error)
            warned = True
        took = time.monotonic() - began
