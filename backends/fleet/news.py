"""What endpoints did, told in pieces: by a worker with each of its orders, added up at home."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from .endpoint import Endpoint
from .stats import QUANTILES, Stats


class Teller:
    """Tells what the endpoints of a fleet did since it was last asked; each call is told once.

    Args:
        endpoints: Returns the fleet's members, present and past.
    """

    def __init__(self, endpoints: Callable[[], Sequence[Endpoint]]) -> None:
        self._endpoints = endpoints
        self._told: dict[Endpoint, tuple[Stats, int]] = {}

    def news(self) -> list[dict[str, Any]]:
        """Return, as plain data, what is new of each endpoint of which anything is."""
        return [told for endpoint in self._endpoints() if (told := self._of(endpoint))]

    def _of(self, endpoint: Endpoint) -> dict[str, Any] | None:
        before, opened = self._told.get(endpoint, (Stats(), 0))
        fresh, reopened = endpoint.stats - before, endpoint.breaker.opened - opened
        if not (fresh.calls or fresh.hedges or fresh.useful_tokens or reopened):
            return None
        self._told[endpoint] = before + fresh, endpoint.breaker.opened
        about = {"endpoint": endpoint.label, "state": endpoint.state, "opened": reopened}
        return about | fresh.to_json()


class Gathered:
    """What all workers have told of the endpoints, added up."""

    def __init__(self) -> None:
        self._stats: dict[str, Stats] = {}
        self._about: dict[str, dict[str, Any]] = {}

    def add(self, news: Iterable[Mapping[str, Any]]) -> None:
        """Add what a worker has told; of an endpoint's states the last one is kept."""
        for told in news:
            name = told["endpoint"]
            self._stats.setdefault(name, Stats()).merge(Stats.from_json(told))
            opened = self._about.get(name, {"opened": 0})["opened"] + told["opened"]
            self._about[name] = {"endpoint": name, "state": told["state"], "opened": opened}

    def reports(self) -> list[dict[str, Any]]:
        """Return one row per endpoint, as for the run folder's table."""
        return [self._about[name] | _row(stats) for name, stats in self._stats.items()]


def _row(stats: Stats) -> dict[str, Any]:
    return stats.to_json() | {name: stats.latency_s(q) for name, q in QUANTILES.items()}
