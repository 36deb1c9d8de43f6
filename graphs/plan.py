"""How a batch is cut into shards and supersteps."""

from __future__ import annotations

from typing import Final

from ..configs.models import RunConfig

_LEAST, _MOST = 256, 4096
_SHARDS: Final = 64
_WINDOW: Final = 256


def shard_items(config: RunConfig, total: int) -> int:
    """Return the items per shard: as configured, or so many that about 64 shards result.

    A superstep's barrier must not show, so few shards of many items beat many of few; below
    256 items the engine's cost per Send shows, above 4,096 the part of a killed shard.
    """
    if config.shard.items is not None:
        return config.shard.items
    return min(_MOST, max(_LEAST, config.limits.streams // 4, -(-total // _SHARDS)))


def window(config: RunConfig, size: int) -> int:
    """Return the shards per superstep: 256, or for tiny shards enough to keep the streams busy."""
    return max(_WINDOW, min(_MOST, 16 * config.limits.streams // size))
