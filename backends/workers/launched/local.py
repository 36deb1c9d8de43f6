"""A launcher for this machine: ``python -m …launched.local N COMMAND``.

It starts the command N times. A process that a signal ends is restarted, a limited number of times;
one that exits is not. The launcher ends with the last of them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Final

_PAUSE_S: Final = 1.0
_STARTS: Final = 20
_SIGNALLED: Final = 128
"""Added by a shell to the number of the signal that ended a program."""


async def run_workers(count: int, command: Sequence[str]) -> int:
    """Run the processes; return the largest of their exit codes."""
    return max(await asyncio.gather(*(_run_with_restarts(command) for _ in range(count))))


async def _run_with_restarts(command: Sequence[str]) -> int:
    for _ in range(_STARTS):
        process = await asyncio.create_subprocess_exec(*command)
        if (code := await process.wait()) >= 0:
            return code
        await asyncio.sleep(_PAUSE_S)
    return _SIGNALLED - code


if __name__ == "__main__":
    sys.exit(asyncio.run(run_workers(int(sys.argv[1]), sys.argv[2:])))
