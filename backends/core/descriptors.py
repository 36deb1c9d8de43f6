"""File descriptors: every connection holds one, and systems are set up for few."""

from __future__ import annotations

import logging
import sys
from typing import Final

from .errors import ConfigurationError

_LOG: Final = logging.getLogger(__name__)
_RESERVE: Final = 256
"""For files, pipes, and connections that idle."""


def make_room(
    streams: int, what: str = "requests in flight", setting: str = "limits.streams"
) -> None:
    """Raise this process' soft limit of open files so that ``streams`` connections fit.

    Args:
        streams: How many there are at most.
        what: What needs one each.
        setting: What bounds them.

    Raises:
        ConfigurationError: The hard limit is too low.
    """
    if sys.platform == "win32":
        return
    import resource  # noqa: PLC0415 - Windows has none

    wanted = streams + _RESERVE
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise ConfigurationError(
            f"{streams} {what} need {wanted} open files, but this process may have {hard} at "
            f"most (ulimit -Hn): set {setting} to {max(1, hard - _RESERVE)} or less, use more "
            "processes or jobs, or have the hard limit raised"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    _LOG.info("raised the limit of open files from %d to %d", soft, wanted)
