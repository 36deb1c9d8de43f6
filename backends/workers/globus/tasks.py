"""Log submitted tasks, and recover those of an earlier coordinator."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Generator, Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Final

import orjson

from ...core.checksum import PREVIOUS_CRC_BYTES, add_crc, check_crc, parse_crc
from ...core.disk import sync_folder
from ...core.errors import JournalError, WorkerLostError
from ...core.types import Json
from .errors import overdue_error
from .poller import ResultFuture, TaskPoller, resolve_future

TASK_LOG_FILE: Final = "globus.jsonl"
"""Name of the task log in the run folder."""

_TAIL: Final = 4096


@dataclass(frozen=True, slots=True)
class TaskEntry:
    """A submitted task.

    Attributes:
        shard: The shard's name.
        task: The task's id.
        group: Id of the task's group.
        endpoint: Id of the endpoint that it was posted to.
        until: When it counts as lost, in seconds since 1970.
    """

    shard: str
    task: str
    group: str
    endpoint: str
    until: float


class TaskLog:
    """The log of a run's tasks; its calls block.

    Args:
        path: The file; need not exist.

    Attributes:
        path: The same.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def read_open(self) -> list[TaskEntry]:
        """Return the tasks that were posted and not closed, by any coordinator.

        Raises:
            JournalError: The file is damaged.
        """
        try:
            lines = self.path.read_bytes().splitlines(keepends=True)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be read: {error.strerror}") from error
        entries, crc = dict[str, TaskEntry](), 0
        if lines and not lines[-1].endswith(b"\n"):
            del lines[-1]  # the write was cut off
        for number, line in enumerate(lines, 1):
            found = check_crc(line, crc)
            if found is None:
                raise self._damaged_error(number, "the checksum does not match")
            event, crc = self._event(line, number), found
            if isinstance(event, TaskEntry):
                entries[event.task] = event
            else:
                for task in event:
                    entries.pop(task, None)
        return list(entries.values())

    def _event(self, line: bytes, number: int) -> TaskEntry | list[str]:
        try:
            data: dict[str, Any] = orjson.loads(line)
            if "closed" in data:
                return list(data["closed"])
            return TaskEntry(**{field.name: data[field.name] for field in fields(TaskEntry)})
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise self._damaged_error(number, str(error)) from error

    def _damaged_error(self, number: int, what: str) -> JournalError:
        return JournalError(
            f"{self.path}, line {number}: damaged ({what}); remove the file to abandon tasks that "
            "still run, then resume"
        )

    def write(self, closed: list[str], posted: Iterable[TaskEntry]) -> None:
        """Write which tasks are closed and which are new.

        The entries are on disk on return.

        Raises:
            JournalError: They cannot be written.
        """
        events: list[dict[str, Any]] = [{"closed": closed}] if closed else []
        events += [asdict(entry) for entry in posted]
        if events:
            self._append(events)

    def _append(self, events: Iterable[dict[str, Any]]) -> None:
        try:
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
            try:
                _trim_torn_line(handle)
                data, is_new = _lines(events, _last_crc(handle)), os.fstat(handle).st_size == 0
                written = os.write(handle, data)
                os.fsync(handle)
            finally:
                os.close(handle)
            if is_new:
                sync_folder(self.path.parent)
        except OSError as error:
            raise JournalError(f"{self.path}: cannot be written: {error.strerror}") from error
        except ValueError:
            text = (
                "its end is damaged; remove the file to abandon tasks that still run, then resume"
            )
            raise JournalError(f"{self.path}: cannot be written: {text}") from None
        if written < len(data):
            raise JournalError(f"{self.path}: cannot be written: the disk is full")


def _lines(events: Iterable[dict[str, Any]], crc: int) -> bytes:
    lines = list[bytes]()
    for event in events:
        line, crc = add_crc(orjson.dumps(event), crc)
        lines.append(line)
    return b"".join(lines)


def _last_crc(handle: int) -> int:
    """Return the checksum of the last line; 0 if there is none.

    Raises:
        ValueError: The file does not end with a complete line.
    """
    size = os.fstat(handle).st_size
    return (
        parse_crc(os.pread(handle, PREVIOUS_CRC_BYTES, max(0, size - PREVIOUS_CRC_BYTES)))
        if size
        else 0
    )


def _trim_torn_line(handle: int) -> None:
    """Remove a line that a crash has cut off, however long it is."""
    size, end = os.fstat(handle).st_size, os.fstat(handle).st_size
    while end:
        begin = max(0, end - _TAIL)
        at = os.pread(handle, end - begin, begin).rfind(b"\n")
        if at >= 0:
            end = begin + at + 1
            break
        end = begin
    if end < size:
        os.ftruncate(handle, end)


_KEEP_S: Final = 5.0
"""Seconds for which a task stays open after its result came, until its records are on disk."""
_TASKS_PER_WORKER: Final = 2
"""Tasks that a worker holds: one may wait for another to end."""
_MIN_WAIT_S: Final = 30.0
"""Least seconds to wait for a task of an earlier coordinator, however old it is."""


class TaskRegistry:
    """Record a run's tasks.

    Args:
        log: Where they are logged; None for runs that are never resumed.
    """

    def __init__(self, log: TaskLog | None) -> None:
        self._log = log
        self._orphaned: list[TaskEntry] = []
        self._open: dict[str, list[str]] = {}
        self._closed: list[tuple[float, list[str]]] = []
        self._keeps_open = False

    async def open_log(self, log: TaskLog) -> None:
        """Log the tasks of another run from now on, and read what earlier coordinators left open.

        Raises:
            JournalError: The log is damaged.
        """
        if self._log is not None and log.path == self._log.path:
            return
        self._log, self._open, self._closed = log, {}, []
        await self.read()

    async def read(self) -> None:
        """Read the open tasks of earlier coordinators.

        Raises:
            JournalError: The log is damaged.
        """
        if self._log is not None:
            self._orphaned = await asyncio.to_thread(self._log.read_open)

    async def record_submitted(
        self, endpoint: str, group: str, tasks: Iterable[tuple[str, str, float]]
    ) -> None:
        """Log new tasks; on return they are on disk.

        Args:
            endpoint: The endpoint that they were posted to.
            group: Their group's id.
            tasks: Shard, task id and the seconds that a worker may take for it.

        Raises:
            JournalError: They cannot be written.
        """
        now = time.time()
        entries = [
            TaskEntry(shard, task, group, endpoint, now + _TASKS_PER_WORKER * deadline_s)
            for shard, task, deadline_s in tasks
        ]
        for entry in entries:
            self._open.setdefault(entry.shard, []).append(entry.task)
        await self._write(time.monotonic() - _KEEP_S, entries)

    def keep_open(self) -> None:
        """Keep tasks open that end from now on: a stopping run may not read their results.

        The next session polls them again; that costs a request, while a lost shard costs its work.
        """
        self._keeps_open = True

    def close_on_result(self, answer: ResultFuture, shard: str) -> None:
        """Close a shard's tasks once one of them has returned a result."""
        tasks = list(self._open.get(shard, ()))

        def close(done: ResultFuture) -> None:
            if done.cancelled() or done.exception() is not None:
                return  # a worker may still run it
            self._close(shard, tasks)

        answer.add_done_callback(close)

    def open_tasks(self) -> dict[str, list[str]]:
        """Return the open tasks of this session by shard, lost ones included."""
        return {shard: list(tasks) for shard, tasks in self._open.items() if tasks}

    def close_shard(self, shard: str) -> None:
        """Close a shard's tasks: a result of one of them has arrived."""
        self._close(shard, list(self._open.get(shard, ())))

    def _close(self, shard: str, tasks: list[str]) -> None:
        if not self._keeps_open:
            self._open[shard] = [t for t in self._open.get(shard, ()) if t not in tasks]
            self._closed.append((time.monotonic(), tasks))

    async def write_closed(self) -> None:
        """Log the tasks that have ended.

        Raises:
            JournalError: They cannot be written.
        """
        await self._write(time.monotonic(), [])

    async def _write(self, before: float, entries: list[TaskEntry]) -> None:
        closed = [task for when, tasks in self._closed if when <= before for task in tasks]
        self._closed = [(when, tasks) for when, tasks in self._closed if when > before]
        if self._log is not None:
            await asyncio.to_thread(self._log.write, closed, entries)

    # -- tasks of an earlier coordinator --------------------------------------------------

    def take_orphaned(
        self, endpoint: str, endpoints: list[str], poller: TaskPoller
    ) -> dict[str, OrphanedTask]:
        """Return, by shard, the tasks that earlier coordinators posted to an endpoint; only once.

        Args:
            endpoint: The endpoint; the first one also gets the tasks of endpoints no longer used.
            endpoints: The run's endpoints.
            poller: Polls the tasks.
        """
        by_shard: dict[str, list[TaskEntry]] = {}
        for entry in self._orphaned:
            by_shard.setdefault(entry.shard, []).append(entry)
        found = {}
        for shard, entries in by_shard.items():
            posted_to = entries[-1].endpoint
            if endpoint == (posted_to if posted_to in endpoints else endpoints[0]):
                self._open[shard] = [entry.task for entry in entries]
                found[shard] = OrphanedTask(self, poller, entries)
        self._orphaned = [entry for entry in self._orphaned if entry.shard not in found]
        return found


class OrphanedTask:
    """The open tasks of one shard; polled when awaited, and not before.

    Args:
        tasks: The registry where they are closed.
        poller: Polls them.
        entries: The shard's tasks.
    """

    def __init__(self, tasks: TaskRegistry, poller: TaskPoller, entries: list[TaskEntry]) -> None:
        self._tasks, self._poller, self._entries = tasks, poller, entries

    def __await__(self) -> Generator[Any, None, dict[str, Json]]:
        """Wait for the first result of the tasks.

        Raises:
            WorkerLostError: None of them returns a result.
        """
        return self._wait_result().__await__()

    async def _wait_result(self) -> dict[str, Json]:
        waiting, reason = {self._poll_entry(entry) for entry in self._entries}, "nothing was posted"
        try:
            while waiting:
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for answer in done:
                    error = answer.exception()
                    if error is None:
                        return answer.result()
                    reason = str(error)
        finally:
            for answer in waiting:
                answer.cancel()
        raise WorkerLostError(f"{reason} (posted by an earlier coordinator)")

    def _poll_entry(self, entry: TaskEntry) -> ResultFuture:
        loop = asyncio.get_running_loop()
        answer: ResultFuture = loop.create_future()
        self._tasks.close_on_result(answer, entry.shard)
        self._poller.add_task(entry.task, entry.endpoint, answer, math.inf)
        wait_s = max(_MIN_WAIT_S, entry.until - time.time())
        timer = loop.call_later(wait_s, resolve_future, answer, overdue_error(entry.endpoint))
        answer.add_done_callback(lambda _: timer.cancel())
        return answer
