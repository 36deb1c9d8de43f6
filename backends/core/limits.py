"""How many files, hence sockets, the process may open."""

from __future__ import annotations

import resource
from typing import Final

_WANTED: Final = 65_536


def raise_file_limit(wanted: int = _WANTED) -> int:
    """Raise the soft limit on open files, as far as the hard limit lets it.

    Args:
        wanted: The limit wished for; a higher one stays as it is.

    Returns:
        The soft limit afterwards.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    most = wanted if hard == unlimited else min(wanted, hard)
    if soft == unlimited or soft >= most:
        return soft
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    return most
