"""What the service says of an endpoint, and which of its tasks are lost by that.

An endpoint takes tasks off its queue as they come; one that is killed loses them all, and nobody
says so. It shows by silence, and after a restart by the report that it has nothing to do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final, Self

from ...core.errors import FanfoldError
from .errors import forgot, offline, overdue

_COUNTING: Final = {"GlobusComputeEngine", "GlobusMPIEngine"}
"""Engines that count their tasks; others always report none."""
_UNQUEUED: Final = {"ThreadPoolEngine", "ProcessPoolEngine"}
"""Engines that begin at once; behind others there may be a batch system's queue."""
_BEAT_S: Final = 30.0
_BEATS: Final = 3
_AHEAD: Final = 2


@dataclass(frozen=True, slots=True)
class Health:
    """An endpoint's state.

    Attributes:
        online: Whether it can be reached.
        holds: Tasks that it has, or None where it does not count.
        queued: Whether a task may wait before it begins.
        beat_s: Seconds between its reports.
    """

    online: bool
    holds: int | None = None
    queued: bool = True
    beat_s: float = _BEAT_S

    @classmethod
    def from_json(cls, status: Mapping[str, Any]) -> Self:
        """Read the service's answer."""
        details = status.get("details") or {}
        engine = details.get("engine_type")
        holds = details.get("outstanding_tasks") if engine in _COUNTING else None
        beat_s = float(details.get("heartbeat_period") or _BEAT_S)
        return cls(status.get("status") == "online", holds, engine not in _UNQUEUED, beat_s)

    @property
    def idle(self) -> bool:
        """Say whether it reports to have no task at all."""
        return self.holds == 0

    def lost(
        self, endpoint: str, age_s: float, deadline_s: float, idle: bool
    ) -> FanfoldError | None:
        """Return why a task is lost, or None.

        Args:
            endpoint: The endpoint's id.
            age_s: Seconds since the task was posted.
            deadline_s: Seconds that a worker may take for it.
            idle: Whether the endpoint was idle when last looked at, too.
        """
        if not self.online:
            return offline(endpoint)
        if self.idle and idle and age_s > _BEATS * self.beat_s:
            return forgot(endpoint)
        if not self.queued and age_s > _AHEAD * deadline_s:
            return overdue(endpoint)
        return None
