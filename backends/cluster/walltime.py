"""When this process must end, by its settings or by the batch job around it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Final

from ...configs.models import LimitsConfig
from ..core.errors import ConfigurationError
from ..core.messages import WALLTIME_REASON

END_TIME_ENV: Final = "FANFOLD_END_TIME"
"""Variable with the time at which the job ends, in seconds since 1970; for job scripts."""


SLURM_END_TIME_ENV: Final = "SLURM_JOB_END_TIME"
"""The same, as Slurm sets it."""


_LATER_S: Final = 5.0
"""Workers hear of a stop from their coordinator first; only without one do they stop by
themselves, so much later."""


@dataclass(frozen=True, slots=True)
class Walltime:
    """When no further item may begin.

    Attributes:
        stop_at: The time, in seconds since 1970.
        workers_stop_at: The same for workers elsewhere.
        reason: Why, in words.
    """

    stop_at: float
    workers_stop_at: float
    reason: str

    def remaining_s(self) -> float:
        """Return the seconds until then, 0 when it has passed."""
        return max(0.0, self.stop_at - time.time())


def walltime(
    limits: LimitsConfig, environment: Mapping[str, str], began: float, extra_s: float = 0.0
) -> Walltime | None:
    """Return when a life must take no further item, or None when nothing bounds it.

    Before the end there must be time for the items in flight (``limits.drain_s``) and for
    closing journal and results (``limits.margin_s``).

    Args:
        limits: The settings.
        environment: The process's variables.
        began: When the life began, in seconds since 1970.
        extra_s: Seconds that the stop takes beside these.

    Raises:
        ConfigurationError: ``FANFOLD_END_TIME`` is no time.
    """
    ends = list(_ends(limits, environment, began))
    if not ends:
        return None
    end, source = min(ends)
    kept = limits.drain_s + limits.margin_s + extra_s
    clock = datetime.fromtimestamp(end).astimezone().strftime("%H:%M:%S")
    reason = (
        f"{WALLTIME_REASON}: this life ends at {clock} ({source}), {kept:g} s are kept to close it"
    )
    later = min(_LATER_S, limits.margin_s / 2)
    return Walltime(end - kept, end - kept + later, reason)


def _ends(
    limits: LimitsConfig, environment: Mapping[str, str], began: float
) -> Iterator[tuple[float, str]]:
    if limits.walltime_s is not None:
        yield began + limits.walltime_s, "limits.walltime_s"
    if given := environment.get(END_TIME_ENV):
        end = _time(given)
        if end is None:
            msg = (
                f"{END_TIME_ENV} is {given!r}; it must be a time in seconds since 1970, as date "
                "+%s prints"
            )
            raise ConfigurationError(msg)
        yield end, END_TIME_ENV
    if (end := _time(environment.get(SLURM_END_TIME_ENV, ""))) is not None:
        yield end, SLURM_END_TIME_ENV  # Slurm has other words where a job has no end


def _time(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None
