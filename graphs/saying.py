"""How commands speak: messages on standard error, results on standard output."""

from __future__ import annotations

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
