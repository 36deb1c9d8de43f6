"""File descriptors: every request in flight holds one, and systems are set up for few."""

from __future__ import annotations

import logging
import sys
from typing import Final

from ..contract.errors import ConfigurationError

_LOG: Final = logging.getLogger(__name__)
_RESERVE: Final = 256
"""For files, pipes, and connections that idle."""


def make_room(streams: int) -> None:
    """Raise this process' soft limit of open files so that ``streams`` connections fit.

    Args:
        streams: Most requests in flight.

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
            f"{streams} requests in flight need {wanted} open files, but this process may have "
            f"{hard} at most (ulimit -Hn): set limits.streams to {max(1, hard - _RESERVE)} or "
            "less, use more processes, or have the hard limit raised"
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    _LOG.info("raised the limit of open files from %d to %d", soft, wanted)
