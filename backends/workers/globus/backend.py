"""Run shards on Globus Compute endpoints, with batched submission."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tenacity import AsyncRetrying, retry_if_exception_type, stop_after_delay, wait_fixed

from ...core.errors import BackendError, FanfoldError, WorkerLostError
from ...core.protocols import Backend
from ...core.types import Json
from .poller import (
    MAX_TASKS_PER_REQUEST,
    PollPolicy,
    ResultFuture,
    ServiceConnection,
    TaskPoller,
    resolve_future,
)
from .service import MAX_REQUEST_BYTES, Payload, TaskService, WorkShard, pack_task
from .tasks import TASK_LOG_FILE, TaskLog, TaskRegistry

_CLOSED: Final = "globus_compute: closed"
_NOT_POSTED: Final = "globus_compute: the task was not posted"


@dataclass(frozen=True, slots=True)
class UnpostedTask:
    """A task that waits to be posted.

    Attributes:
        endpoint: The endpoint's id.
        shard: The shard's name.
        deadline_s: Seconds that a worker may take for it.
        payload: The packed task.
        answer: Receives the result.
    """

    endpoint: str
    shard: str
    deadline_s: float
    payload: Payload
    answer: ResultFuture


class TaskSubmitter:
    """Post tasks and return their results.

    Args:
        connect: Makes the service; blocks.
        work: The function that runs on the endpoints.
        function: Id of its registration; None registers it on connection.
        tasks: Records the posted tasks.
        policy: Intervals of requests to the service.

    Attributes:
        poller: Polls tasks and endpoints.
        tasks: Records the posted tasks.
        policy: Intervals of requests to the service.
    """

    def __init__(
        self,
        connect: Callable[[], TaskService],
        work: WorkShard,
        function: str | None,
        tasks: TaskRegistry,
        policy: PollPolicy = PollPolicy(),  # noqa: B008 - frozen
    ) -> None:
        self._work, self._function, self.policy = work, function, policy
        self._connection = ServiceConnection(connect, policy)
        self.poller, self.tasks = TaskPoller(self._connection, policy), tasks
        self._opening, self._users = asyncio.Lock(), 0
        self._group: str | None = None
        self._collecting, self._collected_at = asyncio.Lock(), -math.inf
        self._late: dict[str, dict[str, Json]] = {}
        self._pending: list[UnpostedTask] = []
        self._submitting: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Connect, once for all users.

        Raises:
            FanfoldError: There is no login, or the service refused or did not answer.
            JournalError: The list of an earlier coordinator's tasks is damaged.
        """
        async with self._opening:
            if self._users == 0:
                await self._connect()
            self._users += 1

    async def _connect(self) -> None:
        await self.tasks.read()
        await self._connection.open()
        if self._function is None:
            try:
                self._function = await self._connection.request(
                    lambda service: service.register(self._work)
                )
            except FanfoldError:
                await self._connection.close()
                raise

    async def close(self) -> None:
        """Close the connection for the last user. Tasks go on at their endpoints."""
        self._users -= 1
        if self._users > 0:
            return
        submitting, self._submitting = self._submitting, None
        if submitting is not None:
            submitting.cancel()
            await asyncio.wait({submitting})
        for pending in self._pending:
            resolve_future(pending.answer, BackendError(_CLOSED))
        self._pending = []
        await self.poller.close()
        await self._connection.close()
        await self.tasks.write_closed()

    async def submit(self, endpoint: str, task: dict[str, Json]) -> dict[str, Json]:
        """Run one task on an endpoint.

        Raises:
            WorkerLostError: Its endpoint went offline, or its task failed.
            BackendError: It could not be posted.
            ConfigurationError: It can never be posted.
            RunStoppedError: Its result is too large.
        """
        self._late.pop(str(task.get("shard")), None)
        payload = await asyncio.to_thread(pack_task, task)
        answer: ResultFuture = asyncio.get_running_loop().create_future()
        seconds = task.get("deadline_s")
        deadline_s = float(seconds) if isinstance(seconds, int | float) else 0.0
        pending = UnpostedTask(endpoint, str(task.get("shard")), deadline_s, payload, answer)
        self._pending.append(pending)
        if self._submitting is None or self._submitting.done():
            self._submitting = asyncio.create_task(self._submit_all())
        return await answer

    async def collect(self, shard: str) -> dict[str, Json] | None:
        """Return the result of a shard's task that was counted as lost, if it has arrived since.

        One request asks for the lost tasks of all shards, and not more often than polls do.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        async with self._collecting:
            lost, now = self._lost_tasks(), time.monotonic()
            if shard in lost.values() and now - self._collected_at >= self.policy.max_pause_s:
                self._collected_at = now
                await self._collect_all(lost)
        result = self._late.pop(shard, None)
        if result is not None:
            self.tasks.close_shard(shard)
        return result

    def _lost_tasks(self) -> dict[str, str]:
        """Return the shards of lost tasks, without shards that have another task in flight."""
        lost = dict[str, str]()
        for shard, tasks in self.tasks.open_tasks().items():
            if not any(map(self.poller.is_polled, tasks)):
                lost |= dict.fromkeys(tasks, shard)
        return lost

    async def _collect_all(self, lost: dict[str, str]) -> None:
        for lo in range(0, len(lost), MAX_TASKS_PER_REQUEST):
            some = list(lost)[lo : lo + MAX_TASKS_PER_REQUEST]
            for task, outcome in (await self.poller.fetch_outcomes(some)).items():
                if isinstance(outcome, dict):
                    self._late[lost[task]] = outcome

    async def _submit_all(self) -> None:
        while batch := self._next_batch():
            failed: FanfoldError | None = BackendError(_NOT_POSTED)
            try:
                await self._submit_batch(batch)
                failed = None
            except FanfoldError as error:  # only for this batch: later ones are tried again
                failed = error
            except asyncio.CancelledError:
                failed = BackendError(_CLOSED)
                raise
            finally:  # no caller may wait for a task that was not posted
                if failed is not None:
                    for pending in batch:
                        resolve_future(pending.answer, failed)

    def _next_batch(self) -> list[UnpostedTask]:
        """Take pending tasks of one endpoint, as many as one request may carry."""
        batch, kept, size = list[UnpostedTask](), list[UnpostedTask](), 0
        for pending in self._pending:
            if pending.answer.done():
                continue
            same = not batch or pending.endpoint == batch[0].endpoint
            if (
                same
                and size + pending.payload.size <= MAX_REQUEST_BYTES
                and len(batch) < MAX_TASKS_PER_REQUEST
            ):
                batch.append(pending)
                size += pending.payload.size
            else:
                kept.append(pending)
        self._pending = kept
        return batch

    async def _submit_batch(self, batch: list[UnpostedTask]) -> None:
        endpoint, function, group = batch[0].endpoint, self._function or "", self._group
        payloads = [pending.payload for pending in batch]
        posted = await self._connection.request(
            lambda s: s.submit(endpoint, function, payloads, group)
        )
        self._group = posted.group
        pairs = list(zip(batch, posted.tasks, strict=True))
        await self.tasks.record_submitted(
            endpoint, posted.group, [(x.shard, task, x.deadline_s) for x, task in pairs]
        )
        for pending, task in pairs:
            self.tasks.close_on_result(pending.answer, pending.shard)
            self.poller.add_task(task, endpoint, pending.answer, pending.deadline_s)


logger = logging.getLogger(__name__)

_RETURN_S: Final = 600.0
"""Seconds to wait, at a time, for an endpoint that went offline."""


class GlobusBackend:
    """Run shards on one endpoint.

    Args:
        endpoint: The endpoint's UUID.
        submitter: The run's submitter, shared by its endpoints.
        endpoints: UUIDs of all of the run's endpoints.
        workers: Shards that this endpoint runs at a time.
    """

    def __init__(
        self, endpoint: str, submitter: TaskSubmitter, endpoints: Sequence[str], workers: int
    ) -> None:
        self._endpoint, self.name = endpoint, f"endpoint {endpoint}"
        self._submitter, self._endpoints = submitter, list(endpoints)
        self._workers, self._started = workers, False

    def capacity(self) -> int:
        """Return the number of workers; 0 while the endpoint is offline."""
        return (
            self._workers
            if self._started and self._submitter.poller.is_online(self._endpoint)
            else 0
        )

    async def start(self) -> None:
        """Connect, and check that the endpoint is online.

        Raises:
            ConfigurationError: No login, or the service knows no such endpoint or refuses it.
            BackendError: The endpoint is offline, or the service does not answer.
        """
        if not self._started:
            await self._submitter.open()
            self._started = True
        try:
            await self._submitter.poller.check_endpoint(self._endpoint)
        except BackendError:
            self._submitter.poller.mark_suspect(self._endpoint)
            raise

    async def submit(self, task: dict[str, Json]) -> dict[str, Json]:
        """Run one task.

        Raises:
            WorkerLostError: The endpoint went offline, or the task failed.
            BackendError: The task could not be posted.
            ConfigurationError: It can never be posted: no permission, no such function, too large.
            RunStoppedError: The result is too large.
        """
        if not self._started:
            raise BackendError(f"{self.name}: not started")
        try:
            return await self._submitter.submit(self._endpoint, task)
        except WorkerLostError:
            raise
        except BackendError:
            self._submitter.poller.mark_suspect(self._endpoint)
            raise

    async def reattach(self) -> dict[str, Awaitable[dict[str, Json]]]:
        """Return, by shard, the tasks that earlier coordinators of the run posted to the endpoint.

        Each answer raises :class:`WorkerLostError` when its tasks failed, are no longer known, or
        exceed their worker's time.
        """
        found = self._submitter.tasks.take_orphaned(
            self._endpoint, self._endpoints, self._submitter.poller
        )
        if found:
            logger.warning("%s: waiting for %d shards of an earlier session", self.name, len(found))
        return dict(found)

    async def open_log(self, folder: Path) -> None:
        """Log the tasks of another run from now on.

        Raises:
            JournalError: The log of earlier coordinators is damaged.
        """
        await self._submitter.tasks.open_log(TaskLog(folder / TASK_LOG_FILE))

    async def close_log(self) -> None:
        """Log the tasks that have ended: the run has ended.

        Raises:
            JournalError: They cannot be written.
        """
        await self._submitter.tasks.write_closed()

    async def collect(self, shard: str) -> dict[str, Json] | None:
        """Return the result of a shard's task that was counted as lost, if it has arrived since.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        return await self._submitter.collect(shard)

    async def rebuild(self) -> None:
        """Wait until the endpoint is online again; nothing else can break.

        Raises:
            BackendError: It is still offline after ten minutes.
            ConfigurationError: The service refuses it.
        """
        if not self._started:
            await self.start()
            return
        retrying = AsyncRetrying(
            sleep=asyncio.sleep,
            retry=retry_if_exception_type(BackendError),
            stop=stop_after_delay(_RETURN_S),
            wait=wait_fixed(self._submitter.policy.max_pause_s),
            reraise=True,
        )
        await retrying(self._submitter.poller.check_endpoint, self._endpoint)

    async def stop(self) -> None:
        """Leave later results for the next coordinator as well; workers go on."""
        self._submitter.tasks.keep_open()

    async def close(self, grace_s: float = 10.0) -> None:  # noqa: ARG002 - it never waits
        """Disconnect at once; tasks go on at the endpoint, for a later coordinator to find."""
        if self._started:
            self._started = False
            await self._submitter.close()


def make_globus_backends(
    endpoints: Sequence[str], workers: int, submitter: TaskSubmitter
) -> list[Backend]:
    """Return a backend per endpoint, with the workers divided among them.

    Args:
        endpoints: UUIDs of the endpoints.
        workers: Workers over all endpoints; each endpoint has at least one.
        submitter: The run's submitter.
    """
    count = len(endpoints)
    shares = [max(1, workers // count + (n < workers % count)) for n in range(count)]
    return [
        GlobusBackend(endpoint, submitter, endpoints, share)
        for endpoint, share in zip(endpoints, shares, strict=True)
    ]
