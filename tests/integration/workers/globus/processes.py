"""The processes of a session: an agent's workers have process groups of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import time


def session(leader: int) -> list[int]:
    """Return the processes whose session was begun by the process `leader`, zombies excluded."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,stat="], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    return [pid for pid, stat in ((int(r[0]), r[1]) for r in rows) if _in(pid, leader, stat)]


def _in(pid: int, leader: int, stat: str) -> bool:
    try:
        return not stat.startswith("Z") and os.getsid(pid) == leader
    except ProcessLookupError:
        return False  # gone since the listing


def kill_session(leader: int, timeout_s: float = 10.0) -> None:
    """SIGKILL every process of a session, those that start meanwhile included.

    Raises:
        TimeoutError: Some are still there after `timeout_s` seconds.
    """
    deadline = time.monotonic() + timeout_s
    while alive := session(leader):
        for pid in alive:
            kill_process(pid)
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes {alive} of session {leader} outlive SIGKILL")
        time.sleep(0.02)


def kill_process(pid: int) -> None:
    """SIGKILL a process, unless it has ended."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return  # it ended by itself


def offspring(parent: int) -> list[int]:
    """Return the descendants of a process, in whatever sessions they are."""
    listed = subprocess.run(
        ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in listed.stdout.splitlines()]
    children: dict[int, list[int]] = {}
    for pid, ppid in rows:
        children.setdefault(int(ppid), []).append(int(pid))
    found, todo = list[int](), [parent]
    while todo:
        below = children.get(todo.pop(), [])
        found += below
        todo += below
    return found
