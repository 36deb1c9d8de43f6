"""What workers of these tests run: it loads quickly and does what a task asks."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any


def play(order: dict[str, Any]) -> dict[str, Any]:
    """Sleep, wait for a stop, or raise; then answer with who has worked."""
    time.sleep(order.get("seconds", 0))
    if name := order.get("raises"):
        raise {"ValueError": ValueError, "ImportError": ImportError}[name]("as it was told")
    if order.get("until_stopped"):
        while not Path(order["stop_file"]).exists():
            time.sleep(0.05)
    if order.get("hopeless"):
        return {"error": {"class": "RunStoppedError", "text": "there is no server"}}
    return {
        "pid": os.getpid(),
        "token": os.environ.get("FANFOLD_COORDINATOR_TOKEN"),
        "n": order.get("n"),
    }
