"""Functions that workers run: importable, shipped by reference."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def echo(payload: Any) -> dict[str, Any]:
    """Return the payload and the type in which it arrived."""
    return {"payload": payload, "type": type(payload).__name__}


def slow(number: int, seconds: float) -> int:
    """Take a while; the task's process is told by `where`."""
    time.sleep(seconds)
    return number


def where() -> dict[str, Any]:
    """Return the process that runs this and the working directory it was given."""
    return {
        "pid": os.getpid(),
        "cwd": str(Path.cwd()),
        "rank": os.environ.get("PARSL_WORKER_RANK"),
    }


def fail(text: str) -> None:
    """Raise an error of a known type."""
    raise KeyError(text)


def large(size: int) -> str:
    """Return a text of `size` characters."""
    return "x" * size


def too_large(order: dict[str, Any]) -> dict[str, Any]:
    """Stand in for a worker that does not mind what can be carried."""
    return {"shard": order["shard"], "text": large(11_000_000)}
