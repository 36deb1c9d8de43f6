"""What a job of a chain is, and whether a scheduler can read it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...configs.site import SiteConfig
from ..core.errors import ConfigurationError

_PLAIN: Final = re.compile(r"[A-Za-z0-9_./+=@,:-]+")
_MINUTE: Final = 60
_MOST_RESERVE: Final = 0.2
"""At most this share of a job is kept for stopping; trials have jobs of a minute."""


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What a job of a chain is.

    Attributes:
        run: The run folder, absolute.
        name: The run's name.
        command: How fanfold is started, e.g. ``[python, -m, fanfold]``.
        site: The site.
        nodes: Nodes of the job.
        walltime_s: Most seconds of the job.
        drain_s: Seconds that a stop waits for items in flight.
        serves: Whether the job starts model servers on its nodes.
        works: Whether the coordinator starts workers on them.
        queue: Queue, partition or quality of service.
        account: Account or project.
        archive: An environment by ``fanfold pack`` to copy to the nodes, absolute.
    """

    run: Path
    name: str
    command: Sequence[str]
    site: SiteConfig
    nodes: int
    walltime_s: int
    drain_s: float
    serves: bool
    works: bool = False
    queue: str | None = None
    account: str | None = None
    archive: Path | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of scripts, logs and servers."""
        return self.run / "cluster"

    @property
    def on_nodes(self) -> bool:
        """Say whether fanfold itself runs on the nodes."""
        return self.serves or self.works

    @property
    def reserve_s(self) -> int:
        """Return the seconds that are kept at the job's end."""
        return min(self.site.reserve_s, int(self.walltime_s * _MOST_RESERVE))

    @property
    def warning_s(self) -> int:
        """Return how many seconds before its end the scheduler signals the job."""
        return min(self.reserve_s + int(self.drain_s), self.walltime_s // 2)

    def check(self) -> None:
        """Check what the site asks for and the scheduler's lines can hold.

        Raises:
            ConfigurationError: An option is missing, or holds what a scheduler cannot read.
        """
        for option in self.site.required:
            if getattr(self, option) is None:
                msg = f"site {self.site.name} needs --{option}; your allocation says which"
                raise ConfigurationError(msg)
        if self.archive is not None and self.site.broadcast is None:
            msg = f"--pack: site {self.site.name} has no 'broadcast' line to copy it to the nodes"
            raise ConfigurationError(msg)
        given = {"--out": str(self.run), "--queue": self.queue, "--account": self.account}
        for name, text in given.items():
            if text is not None and not _PLAIN.fullmatch(text):
                msg = f"{name} {text!r}: schedulers read only letters, digits and _./+=@,:- there"
                raise ConfigurationError(msg)
        if self.walltime_s < _MINUTE:
            raise ConfigurationError(
                f"--walltime: {self.walltime_s} s; a job takes a minute at least"
            )
