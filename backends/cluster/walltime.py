"""Compute when this process must end, from its settings or the batch job around it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Final

from ..core.errors import ConfigurationError
from ..core.messages import WALLTIME_REASON

if TYPE_CHECKING:
    from ...configs.models import LimitsConfig

END_TIME_ENV: Final = "FANFOLD_END_TIME"
"""Variable with the end of the job, in seconds since 1970; set by job scripts."""


SLURM_END_TIME_ENV: Final = "SLURM_JOB_END_TIME"
"""The same, set by Slurm."""


_WORKER_DELAY_S: Final = 5.0
"""Delay with which workers stop on their own.

Normally the coordinator stops them earlier; only without it do they use this time.
"""

_YEAR_10000: Final = 253_402_300_800
"""The first second, since 1970, that no calendar date of Python expresses."""


@dataclass(frozen=True, slots=True)
class Walltime:
    """When no further item may begin.

    Attributes:
        stop_at: The time, in seconds since 1970.
        workers_stop_at: The same for remote workers.
        reason: The reason, for messages.
    """

    stop_at: float
    workers_stop_at: float
    reason: str

    def remaining_s(self) -> float:
        """Return the seconds until then, 0 if it has passed."""
        return max(0.0, self.stop_at - time.time())


def walltime(
    limits: LimitsConfig, environment: Mapping[str, str], began: float, extra_s: float = 0.0
) -> Walltime | None:
    """Return when a session must begin no further item, or None if nothing limits it.

    Before the end there must be time for the items in flight (``limits.drain_s``) and for closing
    journal and results (``limits.margin_s``).

    Args:
        limits: The settings.
        environment: The process's variables.
        began: When the session began, in seconds since 1970.
        extra_s: Further seconds that the stop takes.

    Raises:
        ConfigurationError: ``FANFOLD_END_TIME`` is not a time.
    """
    ends = list(_ends(limits, environment, began))
    if not ends:
        return None
    end, source = min(ends)
    kept = limits.drain_s + limits.margin_s + extra_s
    clock = datetime.fromtimestamp(end).astimezone().strftime("%H:%M:%S")
    reason = (
        f"{WALLTIME_REASON}: this session ends at {clock} ({source}), {kept:g} s are kept to "
        "close it"
    )
    delay = min(_WORKER_DELAY_S, limits.margin_s / 2)
    return Walltime(end - kept, end - kept + delay, reason)


def _ends(
    limits: LimitsConfig, environment: Mapping[str, str], began: float
) -> Iterator[tuple[float, str]]:
    if limits.walltime_s is not None:
        yield began + limits.walltime_s, "limits.walltime_s"
    if given := environment.get(END_TIME_ENV):
        end = _time(given)
        if end is None:
            msg = (
                f"{END_TIME_ENV} is {given!r}; it must be a time before the year 10000, in seconds "
                "(not milliseconds) since 1970, as date +%s prints"
            )
            raise ConfigurationError(msg)
        yield end, END_TIME_ENV
    if (end := _time(environment.get(SLURM_END_TIME_ENV, ""))) is not None:
        yield end, SLURM_END_TIME_ENV  # Slurm sets other text, or 2^64-2, if a job has no end


def _time(text: str) -> float | None:
    try:
        seconds = float(text)
    except ValueError:
        return None
    return seconds if 0 < seconds < _YEAR_10000 else None
