"""How commands speak: messages on standard error, results on standard output."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterable
from typing import Any

import orjson
from rich.console import Console


def messages() -> Console:
    """Return the console for everything that is not a command's result."""
    return Console(stderr=True, highlight=False)


def say(lines: Iterable[str]) -> None:
    """Print messages as they are, without markup."""
    for line in lines:
        messages().print(line, markup=False, soft_wrap=True)


def print_json(data: Any) -> None:
    """Print a command's result as one JSON object on one line."""
    sys.stdout.write(orjson.dumps(data).decode() + "\n")
    sys.stdout.flush()


def show_log(level: int, always: str) -> None:
    """Show the log on standard error.

    Engines lower the levels of their own loggers (Dask to INFO, Parsl to DEBUG for its log file),
    so what is shown is decided here.

    Args:
        level: The least level that is shown.
        always: Name of a log that is shown whatever its level.
    """
    shown = logging.StreamHandler()
    shown.addFilter(lambda record: record.levelno >= level or record.name == always)
    logging.basicConfig(level=level, format="%(levelname)s %(name)s: %(message)s", handlers=[shown])
