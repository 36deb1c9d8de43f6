"""Which command starts the workers."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Final

from ...core.errors import ConfigurationError
from ...core.templates import fill, split_command

LAUNCHER: Final = "FANFOLD_LAUNCHER"
"""Variable of a coordinator: the command that starts one program per node; for job scripts."""
PYTHON: Final = "FANFOLD_PYTHON"
"""Variable of a coordinator: the Python of its workers, where that is not its own."""
HOST: Final = "FANFOLD_DESK_HOST"
"""Variable of a coordinator: the name or address by which workers reach it; for job scripts."""
NAMES: Final = ("workers",)
"""What a command may name in braces."""


def launcher_words(
    command: str | None, workers: int, environment: Mapping[str, str]
) -> tuple[str, ...] | None:
    """Return the launcher's words, or None where nobody names one.

    Args:
        command: ``backend.command``.
        workers: How many workers it shall start.
        environment: Variables of the coordinator.

    Raises:
        ConfigurationError: It is no command line.
    """
    text = command or environment.get(LAUNCHER)
    if not text:
        return None
    try:
        words = split_command(text, NAMES)
    except ConfigurationError as error:
        source = "backend.command" if command else LAUNCHER
        raise ConfigurationError(f"{source}: {error.message}") from None
    return fill(words, {"workers": str(workers)})


def local_words(workers: int) -> tuple[str, ...]:
    """Return a launcher of processes of this machine."""
    return (sys.executable, "-P", "-m", f"{__package__}.local", str(workers))


def python_words(environment: Mapping[str, str]) -> tuple[str, ...]:
    """Return how Python is started where workers run."""
    return (environment.get(PYTHON) or sys.executable, "-P")


def own_host(host: str | None, environment: Mapping[str, str]) -> str:
    """Return the name or address by which workers reach this machine; loopback by default."""
    return host or environment.get(HOST) or "127.0.0.1"
