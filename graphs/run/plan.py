"""How a batch is cut into shards and supersteps."""

from __future__ import annotations

from typing import Any, Final

from ...configs.models import RunConfig
from ...nodes.context import Prepared
from ...nodes.state import RunKey
from .items import is_small

_LEAST, _MOST = 256, 4096
_SHARDS: Final = 64
_WINDOW: Final = 256
_ROUNDS: Final = 4
"""Items per stream in a worker's smallest shard: at its end streams run dry."""
_FEWEST: Final = 16

UNBOUNDED: Final = 2**31 - 1
"""A recursion limit that no run reaches: every window of shards is sent once, so runs end."""


def cut(run: RunKey, config: RunConfig, total: int, *, singly: bool = False) -> Prepared:
    """Return a run of so many items with its plan.

    Args:
        run: Which run it is.
        config: Its settings.
        total: Its items.
        singly: Whether each item of a small batch shall be a shard of its own.
    """
    here = config.shard.items is None and not config.backend.is_remote
    size = 1 if singly and here and is_small(total) else shard_items(config, total)
    return Prepared(run, total, size, window(config, size), sizing(config))


def shard_items(config: RunConfig, total: int) -> int:
    """Return the items per shard: as configured, or so many that about 64 shards result.

    A superstep's barrier must not show, so few shards of many items beat many of few; below
    256 items the engine's cost per Send shows, above 4,096 the part of a killed shard. Elsewhere
    it is the size of the first shards, which measure how large the others shall be.
    """
    if config.shard.items is not None:
        return config.shard.items
    if config.backend.is_remote:
        workers = config.backend.concurrent_shards
        least = max(_LEAST, _ROUNDS * config.limits.streams // workers)
        return max(_FEWEST, min(least, -(-total // (2 * workers))))
    return min(_MOST, max(_LEAST, config.limits.streams // 4, -(-total // _SHARDS)))


def sizing(config: RunConfig) -> dict[str, Any] | None:
    """Return how shards are sized by what an item takes; None keeps one size."""
    backend = config.backend
    if config.shard.items is not None or not backend.is_remote:
        return None
    return {
        "workers": backend.concurrent_shards,
        "least_s": backend.shard_least_s,
        "most_s": backend.shard_most_s,
    }


def window(config: RunConfig, size: int) -> int:
    """Return the shards per superstep: 256, or more to keep many streams or workers busy."""
    if config.backend.is_remote:
        return max(_WINDOW, 8 * config.backend.concurrent_shards)
    return max(_WINDOW, min(_MOST, 16 * config.limits.streams // size))
