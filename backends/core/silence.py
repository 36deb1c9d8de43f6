"""Find endpoints that answer nothing while others do."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from typing import Final

from .timeline import TimelineDelta

logger = logging.getLogger(__name__)

SILENT_S: Final = 600.0
"""Seconds of work without an answer after which an endpoint is named."""

_MOST_GAP_S: Final = 120.0
"""Longest time between two reports that counts as work; workers report every few seconds."""

_SHOWN: Final = 3
"""Endpoints that a line names."""


class SilenceWatch:
    """Knows which endpoints have answered nothing for a time of work in which others answered.

    Work is the time in which requests of the run are in flight, so that a pause counts for no
    endpoint. The silence of an endpoint begins with a request that it does not answer, or when it
    is down. An endpoint that has no request after an answer is idle, not silent.

    Args:
        clock: Returns a monotonic time in seconds.
        wall: Returns the time in seconds since 1970.
    """

    def __init__(
        self,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        self._clock, self._wall = clock, wall
        self._work_s, self._reported_at = 0.0, clock()
        self._began = dict[str, tuple[float, float]]()
        """By endpoint, the work and the time since 1970 at which its silence began, in seconds."""
        self._answered_at = -1.0
        self._named = set[str]()

    def add(
        self, deltas: Iterable[TimelineDelta], down: Iterable[str] = (), left: Iterable[str] = ()
    ) -> None:
        """Add what endpoints have done since the last call; log changes.

        Args:
            deltas: What processes report for the timeline.
            down: Endpoints to which no request is sent because they do not work.
            left: Endpoints that are members no more.
        """
        before, now = self._work_s, self._clock()
        tried, answered = set[str](), set[str]()
        for delta in deltas:
            for (_, endpoint), counts in delta.cells.items():
                has_answer = counts.calls > sum(counts.failures.values())
                (answered if has_answer else tried).add(endpoint)
        if tried or answered:
            self._work_s += min(now - self._reported_at, _MOST_GAP_S)
            self._reported_at = now
        for endpoint in answered.union(left):
            self._began.pop(endpoint, None)
        for endpoint in (tried - answered).union(down).difference(left):
            self._began.setdefault(endpoint, (before, self._wall()))
        if answered:
            self._answered_at = self._work_s
        self._log()

    def find_silent(self) -> dict[str, float]:
        """Return the silent endpoints, each with the begin of its silence in s since 1970."""
        return {
            endpoint: since
            for endpoint, (work_s, since) in self._began.items()
            if self._work_s - work_s >= SILENT_S and self._answered_at > work_s
        }

    def _log(self) -> None:
        """Log each endpoint once when it becomes silent, and when it answers again."""
        silent = self.find_silent()
        for endpoint in sorted(silent.keys() - self._named):
            logger.warning(
                "endpoint %s has answered nothing for %.0f minutes of work, and others have; if "
                "its job has not ended, look at its server",
                endpoint,
                SILENT_S / 60,
            )
        for endpoint in sorted(self._named - self._began.keys()):
            logger.warning("endpoint %s answers again, or has left", endpoint)
        self._named = (self._named & self._began.keys()) | silent.keys()


def name_endpoints(endpoints: Iterable[str]) -> str:
    """Return the first endpoints by name, and how many more there are."""
    names = sorted(endpoints)
    more = f" and {len(names) - _SHOWN:,} more" if len(names) > _SHOWN else ""
    return f"{', '.join(names[:_SHOWN])}{more}"
