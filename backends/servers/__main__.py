"""``python -m fanfold.backends.servers``: serve a node for its workers, detached from the first.

The plan comes as JSON on standard input. When the command returns, the node is served: by a
process that it has left behind, or by another one that was there before.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

from ..core.errors import FanfoldError
from ..core.terminal import escape_controls
from .lock import HostLock
from .plan import NodePlan, files_of
from .supervisor import Orders, serve_users

_FAILED = 1


def main() -> int:
    """Take the lock, leave a process behind that serves, and return its exit code."""
    try:
        plan = NodePlan.from_json(sys.stdin.buffer.read())
        files_of(plan).make()
        lock = HostLock.patiently(files_of(plan))
        if lock is None:
            return 0
        if os.fork():
            os._exit(0)  # the lock stays with the child
        lock.sign()
        asyncio.run(_served(plan, lock))
    except FanfoldError as error:
        _say(error.message)
        return _FAILED
    return 0


async def _served(plan: NodePlan, lock: HostLock) -> None:
    orders, loop = Orders(_say), asyncio.get_running_loop()

    def asked() -> None:
        (orders.hurry if orders.stop.is_set() else orders.stop).set()

    loop.add_signal_handler(signal.SIGTERM, asked)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    await serve_users(plan, lock, orders)


def _say(text: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    sys.stderr.write("".join(f"{stamp} {line}\n" for line in escape_controls(text).splitlines()))
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
