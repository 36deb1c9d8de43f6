"""What the runs of a pipeline share while a session lasts."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any, Final

import orjson

from ...backends.core.aio import create_detached_task
from ...backends.discovery.connect import ReadyEndpoints
from ...backends.discovery.node_local import ready_endpoints
from ...backends.fleet.memory import FleetMemory
from ...configs.loader import LoadedConfig
from ..remote.coordinator import SharedWorkers

_PROBED_S: Final = 10.0
"""Age up to which a probe of endpoints counts for the next run, too."""


class PipelineResources:
    """What the runs of a pipeline share: each run opens what it is the first to need.

    It belongs to one session and one event loop. Its owner closes it at the end of the session,
    also after an error.

    Args:
        folder: The folder of the pipeline.

    Attributes:
        workers: The backends of runs that workers process.
        fleets: What the fleets of this process have learned.
    """

    def __init__(self, folder: Path) -> None:
        self.workers = SharedWorkers(folder)
        self.fleets = FleetMemory()
        self._endpoints = dict[bytes, tuple[Any, ReadyEndpoints]]()
        self._probed = dict[bytes, tuple[float, ReadyEndpoints]]()

    async def open_endpoints(self, loaded: LoadedConfig) -> ReadyEndpoints | None:
        """Return the endpoints for a run, or None if it has to find its own.

        Simulated fleets are started once. Real endpoints are probed by each run, because they may
        have changed, but see :meth:`find_probed`.
        """
        config = loaded.config
        if config.endpoints.simulated is None or config.backend.node_endpoints:
            return None
        key = orjson.dumps([loaded.plain["endpoints"], loaded.plain["model"]["name"]])
        if key not in self._endpoints:
            opening = ready_endpoints(config, loaded.plain["endpoints"])
            self._endpoints[key] = opening, await opening.__aenter__()
        return self._endpoints[key][1]

    def find_probed(self, loaded: LoadedConfig) -> ReadyEndpoints | None:
        """Return the endpoints of a run if another one probed them a moment ago, or None.

        Small levels of an operator follow each other within milliseconds.
        """
        at, ready = self._probed.get(_make_probe_key(loaded), (0.0, None))
        return ready if time.monotonic() - at < _PROBED_S else None

    def keep_probed(self, loaded: LoadedConfig, ready: ReadyEndpoints) -> None:
        """Keep the endpoints of a run that it has just probed, if they are fixed and all answer."""
        is_fixed = ready.endpoint_set is not None and ready.endpoint_set.is_fixed
        if is_fixed and not ready.absent and not loaded.config.backend.node_endpoints:
            self._probed[_make_probe_key(loaded)] = time.monotonic(), ready

    async def aclose(self) -> None:
        """Close everything; completes even if the caller is cancelled."""
        closing = create_detached_task(self._close(), with_children=True)
        cancelled: asyncio.CancelledError | None = None
        while not closing.done():
            try:
                await asyncio.wait({closing})
            except asyncio.CancelledError as error:  # LangGraph cancels more than once
                cancelled = error
        if cancelled is not None:
            raise cancelled
        closing.result()

    async def _close(self) -> None:
        async with AsyncExitStack() as stack:
            while self._endpoints:
                _, (opening, _) = self._endpoints.popitem()
                stack.push_async_exit(opening)
            stack.push_async_callback(self.fleets.aclose)
            stack.push_async_callback(self.workers.aclose)


def _make_probe_key(loaded: LoadedConfig) -> bytes:
    """Return what two runs must have in common to use the same endpoints, keys included."""
    settings, model = loaded.plain, loaded.plain["model"]["name"]
    return orjson.dumps([settings["endpoints"], loaded.raw.get("endpoints"), model])
