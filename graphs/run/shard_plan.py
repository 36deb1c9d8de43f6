"""The shards of a run: their sizes, and how many are sent at a time."""

from __future__ import annotations

from typing import Any, Final

from ...backends.core.types import RunKey
from ...configs.models import RunConfig
from ...nodes.context import PreparedRun

SHOWN_ITEMS: Final = 200
"""With more items, traces and streams are per shard."""

_LEAST, _MOST = 256, 4096
_SHARDS: Final = 64
_WINDOW: Final = 256
_ROUNDS: Final = 4
"""Items per stream in a worker's smallest shard, because streams idle at the end of a shard."""
_FEWEST: Final = 16

UNBOUNDED_STEPS: Final = 2**31 - 1
"""A recursion limit that no run reaches; runs end because each window is sent once."""


def is_small_batch(total: int) -> bool:
    """Return True if a batch is small enough to show each item."""
    return total <= SHOWN_ITEMS


def plan_shards(run: RunKey, config: RunConfig, total: int, *, singly: bool = False) -> PreparedRun:
    """Return a run with its shard plan.

    Args:
        run: Key of the run.
        config: Its settings.
        total: Number of its items.
        singly: Make each row of a small batch a separate shard.

    A shard has all samples of its rows.
    """
    is_local = config.shard.items is None and not config.backend.is_remote
    size = 1 if singly and is_local and is_small_batch(total) else choose_shard_items(config, total)
    size = -(-size // config.task.samples) * config.task.samples
    return PreparedRun(run, total, size, choose_window(config, size), make_sizing(config))


def choose_shard_items(config: RunConfig, total: int) -> int:
    """Return the items per shard: as configured, or for about 64 shards.

    Few large shards hide the barrier of a superstep better than many small ones. Below 256 items
    the engine's cost per Send is noticeable, above 4,096 the loss of a killed shard. On workers
    it is the size of the first shards, whose measurements determine the size of the others.
    """
    if config.shard.items is not None:
        return config.shard.items
    if config.backend.is_remote:
        workers = config.backend.concurrent_shards
        least = max(_LEAST, _ROUNDS * config.limits.streams // workers)
        return max(_FEWEST, min(least, -(-total // (2 * workers))))
    return min(_MOST, max(_LEAST, config.limits.streams // 4, -(-total // _SHARDS)))


def make_sizing(config: RunConfig) -> dict[str, Any] | None:
    """Return the parameters for sizing shards by the time per item; None keeps one size."""
    backend = config.backend
    if config.shard.items is not None or not backend.is_remote:
        return None
    return {
        "samples": config.task.samples,
        "workers": backend.concurrent_shards,
        "least_s": backend.shard_least_s,
        "most_s": backend.shard_most_s,
    }


def choose_window(config: RunConfig, size: int) -> int:
    """Return the shards per superstep: 256, or more to keep all streams or workers busy."""
    if config.backend.is_remote:
        return max(_WINDOW, 8 * config.backend.concurrent_shards)
    return max(_WINDOW, min(_MOST, 16 * config.limits.streams // size))
