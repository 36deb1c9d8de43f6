"""A stand-in for the Globus Compute web service, on the loopback.

The unmodified SDK posts tasks to it over HTTP; it passes them through a real RabbitMQ to the
unmodified endpoint agent, and the results back to the queue on which the SDK waits. It speaks the
protocol as globus-compute-sdk and globus-compute-endpoint 4.19 use it; it has neither the
quotas nor the retention times nor the authorisation of the hosted service.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

from .broker import Broker
from .faults import Faults
from .httpd import HttpServer
from .records import EndpointRecord, Json, Submission, TaskRecord
from .routes import make_app
from .task_queue import TaskQueue


class GlobusService:
    """The service, a context manager.

    Attributes:
        url: Where it answers, `http://127.0.0.1:PORT`, from `start` on.
        faults: What it does wrong; set the fields while it runs.
    """

    def __init__(self, amqp_url: str) -> None:
        self.url = ""
        self.faults = Faults()
        self._broker = Broker(amqp_url)
        self._task_queue = TaskQueue(self._broker, self.faults)
        self._http = HttpServer(make_app(self._task_queue, self._broker, self.faults))

    def start(self) -> Self:
        """Connect to the broker and serve."""
        self._broker.start(self._task_queue.on_result, self._task_queue.on_heartbeat)
        self.url = self._http.start()
        return self

    def close(self) -> None:
        """Stop serving, and leave nothing in the broker."""
        self._task_queue.closing.set()
        self._http.close()
        self._broker.close()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def prefix(self) -> str:
        """How the names of all its queues and exchanges begin."""
        return self._broker.prefix

    def credentials(self, endpoint_id: str) -> Json:
        """Make an endpoint known and return the queues that its agent needs."""
        return self._task_queue.credentials(endpoint_id)

    def online(self, endpoint_id: str) -> bool:
        """Return True if an endpoint is alive: its agent sends heartbeats and has not left."""
        return self._task_queue.online(endpoint_id)

    def state(self, endpoint_id: str) -> Json:
        """Return what an endpoint last reported of itself."""
        with self._task_queue.lock:
            return dict(self._task_queue.records.endpoints[endpoint_id].state)

    def forget_heartbeat(self, endpoint_id: str) -> None:
        """Take an endpoint for offline until its next heartbeat."""
        with self._task_queue.lock:
            self._task_queue.records.endpoints[endpoint_id] = EndpointRecord()

    def release(self) -> int:
        """Deliver the results that the fault `hold_results` kept, and return how many."""
        return self._task_queue.release()

    def forget(self, task_ids: list[str]) -> None:
        """Forget the ends of tasks, as after the retention time; their group still names them."""
        with self._task_queue.lock:
            for task_id in task_ids:
                del self._task_queue.records.tasks[task_id]

    def expire_groups(self, since: int) -> list[str]:
        """Refuse the groups of the submissions after so many; return the ids of their tasks."""
        with self._task_queue.lock:
            records = self._task_queue.records
            groups = {post.group for post in records.submissions[since:]}
            records.expired |= groups
            return [task for group in groups for task in records.groups.pop(group, ())]

    def forget_groups(self, since: int) -> int:
        """Do the same and forget their tasks; return how many."""
        tasks = self.expire_groups(since)
        self.forget(tasks)
        return len(tasks)

    def task(self, task_id: str) -> TaskRecord:
        """Return what is known of a task."""
        with self._task_queue.lock:
            return self._task_queue.records.tasks[task_id]

    def tasks(self, group: str) -> list[TaskRecord]:
        """Return the tasks of a group, in the order in which they were submitted."""
        with self._task_queue.lock:
            return [
                self._task_queue.records.tasks[t]
                for t in self._task_queue.records.groups.get(group, [])
            ]

    @property
    def submissions(self) -> list[Submission]:
        """The POSTs of tasks that were accepted, in order."""
        with self._task_queue.lock:
            return list(self._task_queue.records.submissions)

    @property
    def stats(self) -> dict[str, int]:
        """Counts: submissions, tasks, results, `results_dropped` ..., and each HTTP call."""
        with self._task_queue.lock:
            return dict(self._task_queue.records.stats)
