"""What the servers of jobs did, by the nodes' own records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..core.errors import LedgerError
from ..servers.record import read_record, times_of
from .utilization import State, Stretch

_SILENT_S: Final = 90.0
"""So long a node may say nothing and be well: it says so once a minute."""

_FINE: Final = 32
"""A change counts from this part of the most that a server worked on."""

_STATES: Final[Mapping[str, State]] = {
    "ready": "up",
    "back": "up",
    "out": "down",
    "down": "down",
    "given_up": "down",
}
_ENDED: Final = frozenset({"down", "given_up"})


@dataclass(slots=True)
class Served:
    """What the nodes of one job tell.

    Attributes:
        did: By host and instance, what the server did.
        counted: Whether any of them tells what servers work on.
    """

    did: dict[tuple[str, int], list[Stretch]] = field(default_factory=dict)
    counted: bool = False

    @property
    def first(self) -> float | None:
        """Return when a server first worked on anything."""
        return min((s.begin for did in self.did.values() for s in did if s.busy), default=None)


def served(folder: Path, times: Sequence[tuple[float, float]]) -> list[Served]:
    """Return what the nodes tell of each job; blocks.

    A node that falls silent more than a minute before its job's end was lost: its servers are
    down from its last line on.

    Args:
        folder: The servers folder.
        times: Begin and end of each job.

    Raises:
        LedgerError: A record cannot be read.
    """
    found = [Served() for _ in times]
    for path in sorted((folder / "logs").glob("*.jsonl")):
        try:
            record = read_record(path)
        except OSError as error:
            raise LedgerError(f"{path}: cannot be read: {error.strerror}") from None
        for lines in times_of(record):
            for job, (begin, end) in zip(found, times, strict=True):
                if begin <= lines[0]["at"] <= end:
                    _add(job, path.stem, lines, end)
    return found


def _add(job: Served, host: str, lines: Sequence[Mapping[str, Any]], end: float) -> None:
    """Add one time that a node was served."""
    job.counted = job.counted or any(line["event"] == "load" for line in lines)
    for instance in range(max(1, int(lines[0].get("instances", 1)))):
        did = job.did.setdefault((host, instance), [])
        did += _did(lines, instance, end)


def _did(lines: Sequence[Mapping[str, Any]], instance: int, end: float) -> list[Stretch]:
    """Return what one server did from the first line on."""
    most = max((_told(line, instance)[0] for line in lines), default=0)
    found, now = list[Stretch](), Stretch(lines[0]["at"], end, "starting")
    for line in lines:
        after = _after(now, line, instance, max(1.0, most / _FINE))
        if after is not now:
            found.append(now._replace(end=line["at"]))
            now = after._replace(begin=line["at"])
    last = lines[-1]
    if last["event"] == "end":
        state: State = "over" if last.get("why") == "stopped" else "down"
    else:
        state = "down" if end - last["at"] > _SILENT_S else now.state
    if state != now.state:
        found.append(now._replace(end=last["at"]))
        now = Stretch(last["at"], end, state)
    return [one for one in (*found, now) if one.end > one.begin]


def _after(now: Stretch, line: Mapping[str, Any], instance: int, fine: float) -> Stretch:
    """Return what a server does after a line, or the same if that is nearly the same."""
    if line["event"] == "load":
        items, queued = _told(line, instance, (now.items, now.queued))
        alike = bool(items) == bool(now.items) and abs(items - now.items) < fine
        same = alike and queued == now.queued
        return now if same else now._replace(items=items, queued=queued)
    if line.get("instance") != instance or line["event"] not in _STATES:
        return now
    after = now._replace(state=_STATES[line["event"]])
    return after._replace(items=0, queued=False) if line["event"] in _ENDED else after


def _told(
    line: Mapping[str, Any], instance: int, before: tuple[int, bool] = (0, False)
) -> tuple[int, bool]:
    """Return what a line says of a server's load; where it says nothing, what was before."""
    if line["event"] != "load" or instance >= len(line["running"]):
        return before
    running, waiting = line["running"][instance], line["waiting"][instance]
    return before if running is None else (int(running), bool(waiting))
