"""An item graph that calls no model: what it does stands in the item, to try out backends.

Name it as ``task.graph``; the column ``do`` of an item says what becomes of it.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from langchain_core.runnables import Runnable, RunnableLambda

GRAPH: Final = f"{__name__}:actor"
"""What to write in ``task.graph``."""


async def play(columns: Mapping[str, Any]) -> dict[str, Any]:
    """Do what an item says.

    ``answer`` answers with the item's ``text``; ``fail`` raises; ``large`` answers with ``bytes``
    bytes; ``die`` kills the process; ``hang`` blocks the event loop for ``seconds``. With ``once``,
    the name of a file, the last two happen at most once. ``seconds`` is slept before an answer.
    """
    do = columns.get("do", "answer")
    if do in ("die", "hang") and _first_time(columns.get("once")):
        if do == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(columns["seconds"])  # noqa: ASYNC251 - a hang is what is wanted
    elif do == "fail":
        raise ValueError(f"item {columns.get('text')!r} fails as it was told")
    elif do == "large":
        return {"output": "x" * columns["bytes"]}
    await asyncio.sleep(columns.get("seconds", 0) if do == "answer" else 0)
    return {"output": columns.get("text", "")}


def _first_time(file: str | None) -> bool:
    if file is None:
        return True
    try:
        Path(file).touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def actor(model: object) -> Runnable[Any, Any]:  # noqa: ARG001 - every item graph's factory is given the model
    """Return the graph; the model is not called."""
    return RunnableLambda(play)
