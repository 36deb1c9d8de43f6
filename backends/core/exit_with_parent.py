"""Processes that exit when the process that started them exits, however it exits."""

from __future__ import annotations

import multiprocessing
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

_POLL_S: Final = 0.5
_TERM_S: Final = 5
_JOB_SIGNALS: Final = (signal.SIGUSR1, signal.SIGUSR2)
"""Schedulers send these to all processes of a job; they are for the coordinator."""


def exit_with_parent() -> None:
    """Tie this worker process to its parent; an initializer for process pools.

    A pool's workers hold both ends of its queues, so they would wait forever for a parent that was
    killed. A terminal's interrupt also reaches them, but only the parent handles it, which lets
    items in flight finish; the same holds for a scheduler's warning signal.
    """
    for number in (signal.SIGINT, *_JOB_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        _exit_after(parent.join)


def _exit_after(wait: Callable[[], object]) -> None:
    def end() -> None:
        wait()
        os._exit(1)

    threading.Thread(target=end, name="exit-with-parent", daemon=True).start()


def main() -> None:
    """Run the module named by the first argument, and exit with the parent process."""
    parent = os.getppid()

    def orphaned() -> None:
        while os.getppid() == parent:
            time.sleep(_POLL_S)

    os.setpgrp()  # the parent handles a terminal's interrupt
    for number in _JOB_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _exit_after(orphaned)
    module, *sys.argv[1:] = sys.argv[1:]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def shell_exit_with_parent(pid: int) -> str:
    """Return a line for a batch script: its process group ends with the script and with ``pid``."""
    alive = f"kill -0 {pid} 2>/dev/null && kill -0 $$ 2>/dev/null"
    return f"( while {alive}; do sleep {_POLL_S}; done; kill -9 0 ) </dev/null >/dev/null 2>&1 &"


def launcher_exit_with_parent(pid: int) -> str:
    """Return lines for a shell that becomes a launcher: its group ends with it and with ``pid``.

    The launcher has some seconds to end the processes that it started on other nodes. Signals that
    schedulers send to all processes of a job are for the coordinator.
    """
    alive = f"kill -0 {pid} 2>/dev/null && kill -0 $$ 2>/dev/null"
    end = f"kill -TERM 0; sleep {_TERM_S}; kill -KILL 0"
    watch = f"trap '' TERM; while {alive}; do sleep {_POLL_S}; done; {end}"
    return f"trap '' USR1 USR2\n( {watch} ) </dev/null >/dev/null 2>&1 &"


if __name__ == "__main__":
    main()
