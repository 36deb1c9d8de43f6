"""End a node's servers if the process that serves it is killed.

It is run as a file by a bare interpreter, so it imports nothing of fanfold. From standard input it
reads ``+PID`` for each server that was started (the leader of its own process group) and ``-PID``
for each that has ended. When its input ends, the process that serves has ended, cleanly or not:
the groups still registered get SIGTERM, and SIGKILL some seconds later; then the node's endpoints
file is removed. It has inherited the lock on the node, so no new servers start before the old ones
have ended.

It ignores all signals but SIGKILL. If it is killed together with the process that serves, servers
are left running; the end of a batch job ends them, and a process that serves later reports that
their ports are in use.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from contextlib import suppress

_TICK_S = 0.1


def main() -> None:
    """Read the groups, then end them; arguments: endpoints file, event log, host, seconds."""
    endpoints, event_log, host, grace = sys.argv[1:5]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    groups = read_groups()
    if not groups:
        return
    with suppress(OSError):
        os.unlink(endpoints)  # noqa: PTH108 - the fewest imports
    kill_groups(groups, float(grace))
    line = {"v": 1, "at": time.time(), "host": host, "event": "end", "why": "keeper lost"}
    with suppress(OSError), open(event_log, "a", encoding="utf-8") as file:  # noqa: PTH123
        file.write(json.dumps(line) + "\n")


def read_groups() -> set[int]:
    """Return the groups that are registered when the input ends."""
    groups = set[int]()
    for line in sys.stdin:
        number = int(line[1:])
        if line.startswith("+"):
            groups.add(number)
        else:
            groups.discard(number)
    return groups


def kill_groups(groups: set[int], grace_s: float) -> None:
    """End process groups."""
    deadline = time.monotonic() + grace_s
    _send(groups, signal.SIGTERM)
    while any(map(is_alive, groups)) and time.monotonic() < deadline:
        time.sleep(_TICK_S)
    _send(groups, signal.SIGKILL)


def _send(groups: set[int], number: signal.Signals) -> None:
    for group in groups:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(group, number)


def is_alive(group: int) -> bool:
    """Return True if a process group has a member that has not ended.

    A member that has ended may stay in its group for long: the first process of some containers
    does not wait for its children.
    """
    try:
        os.killpg(group, 0)
    except (ProcessLookupError, PermissionError):
        return False
    try:
        numbers = [name for name in os.listdir("/proc") if name.isdigit()]  # noqa: PTH208
    except OSError:
        return True  # unknown without Linux's /proc
    return any(_is_alive_member(group, number) for number in numbers)


def _is_alive_member(group: int, number: str) -> bool:
    try:
        with open(f"/proc/{number}/stat", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            state, _, its_group = file.read().rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return False  # it has ended
    return int(its_group) == group and state not in {"Z", "X"}


if __name__ == "__main__":
    main()
