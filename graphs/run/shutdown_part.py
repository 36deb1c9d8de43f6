"""The coordinator's side of work elsewhere: orders out, summaries and journal lines home."""

from __future__ import annotations

import os

from ...backends.cluster.walltime import Walltime, walltime
from ...configs.models import RunConfig
from ..remote.coordinator import STOP_S


def life_end(config: RunConfig, began: float) -> Walltime | None:
    """Return when a life of a run must end, or None when nothing bounds it.

    Args:
        config: The settings.
        began: When the life began, in seconds since 1970.

    Raises:
        ConfigurationError: What the environment says of the end is no time.
    """
    extra_s = STOP_S if config.backend.is_remote else 0.0
    return walltime(config.limits, os.environ, began, extra_s)
