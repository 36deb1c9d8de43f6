"""Tasks of the stand-in service: requests, and what endpoints publish."""

from __future__ import annotations

import json
import threading
import time
import uuid

from globus_compute_common import messagepack
from globus_compute_common.messagepack.message_types import EPStatusReport, Result, Task

from .broker import Broker, Headers
from .faults import Faults
from .managers import Managers
from .records import EndpointRecord, Json, RefusedError, ServiceRecords, Submission, TaskRecord

ASKS_S = 5.0
STARTS = 12


class TaskQueue:
    """Takes submissions, keeps the records, passes tasks and results on."""

    def __init__(self, broker: Broker, faults: Faults) -> None:
        self.records = ServiceRecords()
        self.lock = threading.RLock()
        self._broker, self._faults = broker, faults
        self.closing = threading.Event()
        self._held: list[bytes] = []
        self._managers = Managers(broker)

    def register_manager(self, endpoint_id: str | None) -> Json:
        """Make a manager known and return its queues; it keeps an id that it had before."""
        name = endpoint_id or str(uuid.uuid4())
        queues = self.credentials(name)
        with self.lock:
            self.records.endpoints[name] = EndpointRecord(manager=True)
        return queues | self._managers.queues(name)

    def credentials(self, endpoint_id: str) -> Json:
        """Open the queues of an endpoint and return what it needs to use them."""
        self._broker.open_endpoint(endpoint_id)
        with self.lock:
            self.records.endpoints.setdefault(endpoint_id, EndpointRecord())
        publish = {kind: self._publishing(endpoint_id, kind) for kind in ("results", "heartbeats")}
        return {
            "endpoint_id": endpoint_id,
            "task_queue_info": {
                "connection_url": self._broker.url,
                "exchange": self._broker.exchange("tasks"),
                "queue": self._broker.queue("tasks", endpoint_id),
            },
            "result_queue_info": publish["results"],
            "heartbeat_queue_info": publish["heartbeats"],
        }

    def _publishing(self, endpoint_id: str, kind: str) -> Json:
        exchange = self._broker.exchange(kind)
        return {
            "connection_url": self._broker.url,
            "exchange": exchange,
            "queue": self._broker.queue(kind),
            "queue_publish_kwargs": {
                "exchange": exchange,
                "routing_key": f"{endpoint_id}.{kind}",
                "mandatory": True,
                "properties": {"delivery_mode": 2},
            },
        }

    def register_function(self, body: Json) -> Json:
        """Keep a function; its id is new with every registration."""
        function_id = str(uuid.uuid4())
        with self.lock:
            self.records.functions[function_id] = body
        return {"function_uuid": function_id}

    def submit(self, endpoint_id: str, body: Json, size: int) -> Json:
        """Publish the tasks of one POST of `size` bytes.

        Raises:
            RefusedError: By a fault, or the request is too large, or names what is not known, or
                the manager could not start a user endpoint with its options.
        """
        with self.lock:
            self._admit(endpoint_id, body, size)
            manager = self.records.endpoints[endpoint_id].manager
        target = self._user_endpoint(endpoint_id, body) if manager else endpoint_id
        with self.lock:
            group = body.get("task_group_id") or str(uuid.uuid4())
            tasks = [
                (TaskRecord(str(uuid.uuid4()), target, function, group), arguments)
                for function, many in body["tasks"].items()
                for arguments in many
            ]
            for task, _ in tasks:
                self.records.tasks[task.task_id] = task
                self.records.groups.setdefault(group, []).append(task.task_id)
            self._note(endpoint_id, body, size, [task for task, _ in tasks])
            messages = [self._message(task, arguments, body) for task, arguments in tasks]
        self._broker.open_group(group)
        self._broker.send_tasks(target, messages)
        ids: dict[str, list[str]] = {}
        for task, _ in tasks:
            ids.setdefault(task.function_id, []).append(task.task_id)
        answer = {"tasks": ids, "task_group_id": group, "endpoint_id": endpoint_id}
        return answer | {"request_id": str(uuid.uuid4())}

    def _user_endpoint(self, manager: str, body: Json) -> str:
        """Have the manager start the user endpoint of these options; wait until it is up."""
        child = self._managers.child(manager, body)
        credentials = self.credentials(child)
        with self.lock:
            self.records.endpoints[child].error = None
        for _ in range(STARTS):  # a manager overlooks a command for one that has just ended
            self._managers.start(manager, child, body, credentials)
            asked = time.monotonic()
            while time.monotonic() < asked + ASKS_S and not self.closing.wait(0.02):
                if self.online(child):
                    return child
                with self.lock:
                    error = self.records.endpoints[child].error
                if error is not None:
                    reason = f"Request payload failed validation: {error}"
                    raise RefusedError(422, "SEMANTICALLY_INVALID", reason)
        raise RefusedError(503, "SERVICE_UNAVAILABLE", "the user endpoint does not start")

    def _admit(self, endpoint_id: str, body: Json, size: int) -> None:
        if self._faults.take("fail_submits"):
            raise RefusedError(self._faults.fail_status, "SERVICE_UNAVAILABLE", "a fault")
        if size > self._faults.submit_limit:
            raise RefusedError(413, "TASK_PAYLOAD_TOO_LARGE", f"{size} bytes")
        if endpoint_id not in self.records.endpoints:
            raise RefusedError(404, "ENDPOINT_NOT_FOUND", endpoint_id)
        if (group := body.get("task_group_id")) in self.records.expired:
            raise RefusedError(404, "TASK_GROUP_NOT_FOUND", f"Task group {group} not found")
        for function in body["tasks"]:
            if function not in self.records.functions:
                raise RefusedError(404, "FUNCTION_NOT_FOUND", function)

    def _note(self, endpoint_id: str, body: Json, size: int, tasks: list[TaskRecord]) -> None:
        submission = Submission(
            endpoint_id=endpoint_id,
            group=tasks[0].group,
            task_ids=tuple(task.task_id for task in tasks),
            size=size,
            user_endpoint_config=body.get("user_endpoint_config"),
            result_serializers=tuple(body.get("result_serializers") or ()),
        )
        self.records.submissions.append(submission)
        self.records.stats.update(submissions=1, tasks=len(tasks))

    def _message(self, task: TaskRecord, arguments: str, body: Json) -> tuple[bytes, Headers]:
        headers: Headers = {"task_uuid": task.task_id, "function_uuid": task.function_id}
        if body.get("resource_specification"):
            headers["resource_specification"] = json.dumps(body["resource_specification"])
        if body.get("result_serializers"):
            headers["result_serializers"] = body["result_serializers"]
        code: str = self.records.functions[task.function_id]["function_code"]
        packed = messagepack.pack(
            Task(task_id=uuid.UUID(task.task_id), task_buffer=code + arguments)
        )
        return packed, headers

    def status_of(self, task_ids: list[str]) -> Json:
        """Return the state of those tasks that are known, and of others as the faults say.

        Raises:
            RefusedError: By a fault, for a task that is not known.
        """
        with self.lock:
            found = {
                t: self.records.tasks[t].as_json() for t in task_ids if t in self.records.tasks
            }
        for task in (t for t in task_ids if t not in found):
            if self._faults.unknown == "refused":
                raise RefusedError(404, "TASK_NOT_FOUND", f"Task {task} not found")
            if self._faults.unknown == "failed":
                found[task] = {"task_id": task, "status": "Failed", "reason": "Unknown task id"}
        return found

    def group(self, group: str) -> Json:
        """Return the tasks of a group, in the order in which they were submitted.

        Raises:
            RefusedError: The group has expired.
        """
        with self.lock:
            if group in self.records.expired:
                raise RefusedError(404, "TASK_GROUP_NOT_FOUND", f"Task group {group} not found")
            tasks = [{"id": task_id} for task_id in self.records.groups.get(group, [])]
        return {"taskgroup_id": group, "tasks": tasks}

    def online(self, endpoint_id: str, beats: float = 3.0) -> bool:
        """Say whether an endpoint was heard within so many heartbeat periods and is active."""
        with self.lock:
            record = self.records.endpoints.get(endpoint_id)
            if record is None or record.heartbeat_at is None:
                return False
            if not (record.manager or record.state.get("active")):
                return False
            age = time.monotonic() - record.heartbeat_at
            return bool(age < beats * record.state["heartbeat_period"])

    def on_heartbeat(self, body: bytes) -> None:
        """Take a status report of an endpoint."""
        message = messagepack.unpack(body)
        assert isinstance(message, EPStatusReport)
        with self.lock:
            self.records.stats["heartbeats"] += 1
            record = self.records.endpoints[str(message.endpoint_id)]
            record.heartbeat_at, record.state = time.monotonic(), message.global_state
            if (error := message.global_state.get("error")) is not None:
                record.error = error
                self._fail_open(str(message.endpoint_id), error)

    def _fail_open(self, endpoint_id: str, error: str) -> None:
        """End what a user endpoint had in hand that says that it cannot work."""
        for task in self.records.tasks.values():
            if task.endpoint_id == endpoint_id and task.status == "pending":
                task.status, task.exception = "failed", error
                task.completion_t = str(time.time())

    def on_result(self, body: bytes) -> None:
        """Take a result of an endpoint: store it and forward it, unless a fault strikes.

        A late result of a task that has ended, or is forgotten, uses up no fault.
        """
        with self.lock:
            if self._find_pending(body) is None:
                self.records.stats["results_ignored"] += 1
            elif self._faults.take("drop_results"):
                self.records.stats["results_dropped"] += 1
            elif self._faults.take("hold_results"):
                self.records.stats["results_held"] += 1
                self._held.append(body)
            else:
                self._deliver(body)

    def release(self) -> int:
        """Deliver the results that were held, and return how many."""
        with self.lock:
            held, self._held = self._held, []
        for body in held:  # without the lock: the broker's thread may be waiting for it
            self._deliver(body)
        return len(held)

    def _find_pending(self, body: bytes) -> tuple[TaskRecord, Result] | None:
        """Return the task of a result and the result; None if the task is not awaited."""
        message = messagepack.unpack(body)
        assert isinstance(message, Result)
        task = self.records.tasks.get(str(message.task_id))
        return None if task is None or task.status != "pending" else (task, message)

    def _deliver(self, body: bytes) -> None:
        with self.lock:
            if (found := self._find_pending(body)) is None:
                self.records.stats["results_ignored"] += 1
                return
            task, message = found
            if message.is_error:
                task.status, task.exception = "failed", message.data
            else:
                task.status, task.result = "success", message.data
            task.completion_t = str(time.time())
            self.records.stats["results"] += 1
        self._broker.send_result(task.group, body)
