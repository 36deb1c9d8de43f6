"""What one job of a chain is to do, from which its scripts and directives are written."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ..core.errors import ConfigurationError

if TYPE_CHECKING:
    from ...configs.site import SiteConfig

_PLAIN: Final = re.compile(r"[A-Za-z0-9_./+=@,:-]+")
_MINUTE: Final = 60
_MAX_RESERVE: Final = 0.2
"""Largest share of a job that is reserved for stopping; trials have jobs of a minute."""


@dataclass(frozen=True, slots=True)
class JobPlan:
    """Plan of a job of a chain.

    Attributes:
        run: The run folder, absolute.
        name: The run's name.
        command: Command that starts fanfold, e.g. ``[python, -m, fanfold]``.
        site: The site.
        nodes: Number of nodes.
        walltime_s: Most seconds of the job.
        drain_s: Seconds that a stop waits for items in flight.
        starts_servers: Whether the job starts model servers on its nodes.
        starts_workers: Whether the coordinator starts workers on them.
        queue: Queue, partition or quality of service.
        account: Account or project.
        archive: An environment from ``fanfold pack`` to copy to the nodes, absolute.
    """

    run: Path
    name: str
    command: Sequence[str]
    site: SiteConfig
    nodes: int
    walltime_s: int
    drain_s: float
    starts_servers: bool
    starts_workers: bool = False
    queue: str | None = None
    account: str | None = None
    archive: Path | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of scripts, logs and servers."""
        return self.run / "cluster"

    @property
    def runs_on_nodes(self) -> bool:
        """Return True if fanfold itself runs on the nodes."""
        return self.starts_servers or self.starts_workers

    @property
    def reserve_s(self) -> int:
        """Return the seconds that are reserved at the job's end."""
        return min(self.site.reserve_s, int(self.walltime_s * _MAX_RESERVE))

    @property
    def warning_s(self) -> int:
        """Return how many seconds before its end the scheduler signals the job."""
        return min(self.reserve_s + int(self.drain_s), self.walltime_s // 2)

    def check(self) -> None:
        """Check the options that the site requires and the scheduler's directives can contain.

        Raises:
            ConfigurationError: An option is missing, or contains characters that a scheduler cannot
                read.
        """
        for option in self.site.required:
            if getattr(self, option) is None:
                msg = f"site {self.site.name} requires --{option}; see your allocation"
                raise ConfigurationError(msg)
        if self.archive is not None and self.site.broadcast is None:
            msg = f"--pack: site {self.site.name} has no 'broadcast' line to copy it to the nodes"
            raise ConfigurationError(msg)
        given = {"--out": str(self.run), "--queue": self.queue, "--account": self.account}
        for name, text in given.items():
            if text is not None and not _PLAIN.fullmatch(text):
                msg = f"{name} {text!r}: only letters, digits and _./+=@,:- are allowed"
                raise ConfigurationError(msg)
        if self.walltime_s < _MINUTE:
            raise ConfigurationError(
                f"--walltime: {self.walltime_s} s is too short; a job takes at least a minute"
            )


def format_hms(seconds: int) -> str:
    """Return seconds as ``HH:MM:SS``."""
    return f"{seconds // 3600:02}:{seconds % 3600 // 60:02}:{seconds % 60:02}"
