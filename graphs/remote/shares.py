"""What of a run's limits is a worker's share."""

from __future__ import annotations

import copy
from typing import Any, Final

from ...configs.loader import Loaded

_OF_THE_RUN: Final = ("requests_per_s", "tokens_per_min")
_OF_AN_ENDPOINT: Final = ("endpoint_requests_per_s", "endpoint_tokens_per_min")


def worker_streams(loaded: Loaded) -> int:
    """Return the most items in flight in one worker."""
    config = loaded.config
    return max(1, -(-config.limits.streams // config.backend.concurrent_shards))


def worker_settings(loaded: Loaded) -> dict[str, Any]:
    """Return the settings that travel: rates divided by the workers, nothing served twice.

    Limits of an endpoint are divided as well, unless each worker has endpoints of its own.
    """
    settings = copy.deepcopy(loaded.plain)
    backend, limits = loaded.config.backend, settings["limits"]
    workers = backend.concurrent_shards
    keys = _OF_THE_RUN if backend.node_endpoints else (*_OF_THE_RUN, *_OF_AN_ENDPOINT)
    for key in keys:
        if limits.get(key) is not None:
            limits[key] = limits[key] / workers
    if limits.get("endpoint_streams") is not None and not backend.node_endpoints:
        limits["endpoint_streams"] = max(1, limits["endpoint_streams"] // workers)
    gateway = settings["endpoints"].get("first")
    if gateway and gateway.get("requests_per_s") is not None:
        gateway["requests_per_s"] = gateway["requests_per_s"] / workers
    settings["backend"]["user_endpoint_config"] = None  # for the endpoint, not for its workers
    if settings.get("metrics"):
        settings["metrics"] = {"port": None}  # the coordinator serves them
    return settings
