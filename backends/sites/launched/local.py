"""The launcher of a machine without one: ``… -m fanfold.backends.sites.launched.local N COMMAND``.

It starts the command N times. A process that a signal has ended is started again, one that ends by
itself is not; the launcher ends with the last of them.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from typing import Final

_PAUSE_S: Final = 1.0


async def launch(count: int, command: Sequence[str]) -> int:
    """Run the processes; return the largest of their exit codes."""
    return max(await asyncio.gather(*(_kept_up(command) for _ in range(count))))


async def _kept_up(command: Sequence[str]) -> int:
    while True:
        process = await asyncio.create_subprocess_exec(*command)
        if (code := await process.wait()) >= 0:
            return code
        await asyncio.sleep(_PAUSE_S)


if __name__ == "__main__":
    sys.exit(asyncio.run(launch(int(sys.argv[1]), sys.argv[2:])))
