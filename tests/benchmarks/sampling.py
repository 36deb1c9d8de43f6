"""Where a run's CPU time goes: ``python -m fanfold.tests.benchmarks.sampling FILE ARGUMENTS...``.

Runs ``fanfold ARGUMENTS...`` in this process, looks every few milliseconds of its CPU time at what
it does, and writes the number of looks for each part to FILE. Starting the program does not count:
the first look that counts is the first one that finds an item's request under way.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Final

_EVERY_S: Final = 0.002
_PARTS: Final = {
    "/aiohttp/": "HTTP client (aiohttp)",
    "/yarl/": "HTTP client (aiohttp)",
    "/multidict/": "HTTP client (aiohttp)",
    "/asyncio/": "event loop and sockets (asyncio)",
    "/selectors.py": "event loop and sockets (asyncio)",
    "/backends/fleet/": "fleet: balancing, retries, reading answers",
    "/backends/core/": "reading answers, records of items",
    "/backends/storage/": "journal and results",
    "/backends/budget/": "budget",
    "/backends/inputs/": "input",
    "/nodes/item/": "items: prompts, checks of answers",
    "/nodes/aggregators/": "reduce",
    "/nodes/shard/": "shards: taking items, handing over records",
    "/nodes/": "other nodes of the graph",
    "/graphs/": "run and command line",
    "/configs/": "run and command line",
    "/langgraph/": "LangGraph",
    "/langchain_core/": "LangGraph",
    "/jsonschema": "schema checks",
    "/pyarrow/": "journal and results",
}
_FIRST: Final = ("infer", "/nodes/item/infer.py")
"""Function of the first item's request, and its file."""


class Sampler:
    """Counts the parts of the program in which its CPU time passes."""

    def __init__(self) -> None:
        self.counts = Counter[str]()
        self._started = False

    def look(self, _: int, frame: FrameType | None) -> None:
        """Count the part of the innermost function that belongs to one."""
        part = None
        while frame is not None:
            path = frame.f_code.co_filename
            if frame.f_code.co_name == _FIRST[0] and path.endswith(_FIRST[1]):
                self._started = True
            part = part or self._find_part(path)
            frame = frame.f_back
        if self._started:
            self.counts[part or "other"] += 1

    def _find_part(self, path: str) -> str | None:
        return next((part for mark, part in _PARTS.items() if mark in path), None)


def main() -> None:
    """Run fanfold, and write the counts when it ends."""
    out, arguments = Path(sys.argv[1]).absolute(), sys.argv[2:]
    sampler, process = Sampler(), os.getpid()

    def write() -> None:
        if os.getpid() == process:
            signal.setitimer(signal.ITIMER_PROF, 0)
            out.write_text(json.dumps(sampler.counts))

    atexit.register(write)
    signal.signal(signal.SIGPROF, sampler.look)
    signal.setitimer(signal.ITIMER_PROF, _EVERY_S, _EVERY_S)
    sys.argv = ["fanfold", *arguments]
    from fanfold.graphs.cli import main as run  # noqa: PLC0415 - after the timer has started

    run()


if __name__ == "__main__":
    main()
