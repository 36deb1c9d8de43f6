"""``python -m fanfold.backends.servers``: serve a node for its workers, detached from the first.

The plan comes as JSON on standard input. When the command returns, the node is served: by a process
that it has forked, or by another one that was there before.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time

from ..core.errors import FanfoldError
from ..core.terminal import escape_controls
from .lock import NodeLock, ServedModel, write_served_model
from .node_supervisor import SupervisorControl, serve_on_demand
from .plan import NodePlan, node_files

_FAILED = 1


def main() -> int:
    """Acquire the lock, fork a process that serves the node, and return its exit code."""
    try:
        plan = NodePlan.from_json(sys.stdin.buffer.read())
        node_files(plan).create_folders()
        lock = NodeLock.acquire_with_retries(node_files(plan))
        if lock is None:
            return 0
        served = ServedModel(plan.model, True, plan.compute_servers_digest())
        write_served_model(node_files(plan), served)
        if os.fork():
            os._exit(0)  # the lock stays with the child
        lock.write_owner()
        asyncio.run(_run(plan, lock))
    except FanfoldError as error:
        _report(error.message)
        return _FAILED
    return 0


async def _run(plan: NodePlan, lock: NodeLock) -> None:
    control, loop = SupervisorControl(_report), asyncio.get_running_loop()

    def request_stop() -> None:
        (control.stop_waiting if control.stop.is_set() else control.stop).set()

    loop.add_signal_handler(signal.SIGTERM, request_stop)
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    await serve_on_demand(plan, lock, control)


def _report(text: str) -> None:
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
    sys.stderr.write("".join(f"{stamp} {line}\n" for line in escape_controls(text).splitlines()))
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
