"""State of the service: functions, endpoints, tasks and their submitters."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

Json = dict[str, Any]


class RefusedError(Exception):
    """A request that the service answers with an error."""

    def __init__(self, status: int, code: str, reason: str) -> None:
        super().__init__(status, code, reason)
        self.status, self.code, self.reason = status, code, reason


@dataclass(slots=True)
class TaskRecord:
    """One task and, once it is known, its end."""

    task_id: str
    endpoint_id: str
    function_id: str
    group: str
    status: Literal["pending", "success", "failed"] = "pending"
    completion_t: str | None = None
    result: str | None = None
    exception: str | None = None

    def as_json(self) -> Json:
        """Return the form that `/v2/tasks` and `/v2/batch_status` answer."""
        answer: Json = {"task_id": self.task_id, "status": self.status, "details": None}
        for name in ("completion_t", "result", "exception"):
            if (value := getattr(self, name)) is not None:
                answer[name] = value
        return answer


@dataclass(slots=True)
class EndpointRecord:
    """One endpoint and its last heartbeat, on the monotonic clock.

    A manager starts user endpoints; one that could not be started has an `error`.
    """

    heartbeat_at: float | None = None
    state: Json = field(default_factory=dict)
    manager: bool = False
    error: str | None = None


@dataclass(frozen=True, slots=True)
class Submission:
    """One accepted POST of tasks, as it was asked for."""

    endpoint_id: str
    group: str
    task_ids: tuple[str, ...]
    size: int
    user_endpoint_config: Json | None
    result_serializers: tuple[str, ...]


@dataclass(slots=True)
class ServiceRecords:
    """All records; reads and writes require the lock of the task queue."""

    functions: dict[str, Json] = field(default_factory=dict)
    endpoints: dict[str, EndpointRecord] = field(default_factory=dict)
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    expired: set[str] = field(default_factory=set)
    submissions: list[Submission] = field(default_factory=list)
    stats: Counter[str] = field(default_factory=Counter)
