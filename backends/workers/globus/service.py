"""Call the web service through its SDK; log in; read endpoint health."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from ...core.errors import BackendError, ConfigurationError, FanfoldError
from ...core.types import Json
from .errors import (
    LOGIN_HINT,
    malformed_answer_error,
    offline_error,
    overdue_error,
    restarted_error,
    service_error,
    task_failed_error,
    unreadable_result_error,
)

if TYPE_CHECKING:
    from globus_sdk.transport import RetryContext


_COUNTING: Final = {"GlobusComputeEngine", "GlobusMPIEngine"}
"""Engines that count their tasks; others always report none."""
_UNQUEUED: Final = {"ThreadPoolEngine", "ProcessPoolEngine"}
"""Engines that start tasks at once; others may have a batch system's queue."""
_HEARTBEAT_S: Final = 30.0
_HEARTBEATS: Final = 3
_TASKS_PER_WORKER: Final = 2


@dataclass(frozen=True, slots=True)
class EndpointHealth:
    """State of an endpoint.

    Attributes:
        online: Whether it can be reached.
        outstanding_tasks: Tasks that it has, or None where it does not count them.
        has_queue: Whether a task may wait before it begins.
        heartbeat_s: Seconds between its reports.
    """

    online: bool
    outstanding_tasks: int | None = None
    has_queue: bool = True
    heartbeat_s: float = _HEARTBEAT_S

    @classmethod
    def from_json(cls, status: Mapping[str, Any]) -> Self:
        """Read the service's answer."""
        details = status.get("details") or {}
        engine = details.get("engine_type")
        holds = details.get("outstanding_tasks") if engine in _COUNTING else None
        heartbeat_s = float(details.get("heartbeat_period") or _HEARTBEAT_S)
        return cls(status.get("status") == "online", holds, engine not in _UNQUEUED, heartbeat_s)

    @property
    def is_idle(self) -> bool:
        """Return True if it reports that it has no task."""
        return self.outstanding_tasks == 0

    def task_error(
        self, endpoint: str, age_s: float, deadline_s: float, was_idle: bool
    ) -> FanfoldError | None:
        """Return why a task is lost, or None.

        Args:
            endpoint: The endpoint's id.
            age_s: Seconds since the task was posted.
            deadline_s: Seconds that a worker may take for it.
            was_idle: Whether the endpoint was idle at the previous check as well.
        """
        if not self.online:
            return offline_error(endpoint)
        if self.is_idle and was_idle and age_s > _HEARTBEATS * self.heartbeat_s:
            return restarted_error(endpoint)
        if not self.has_queue and age_s > _TASKS_PER_WORKER * deadline_s:
            return overdue_error(endpoint)
        return None


WorkShard = Callable[[dict[str, Json]], dict[str, Json]]

MAX_REQUEST_BYTES: Final = 9_500_000
"""Most bytes of a POST; the service accepts 10 MB."""
_RETRIES: Final = 1
"""The SDK's own retries; longer outages are handled by the poller and the pool."""
_RETRY_S: Final = 4.0
"""Pause before a retry, unless the service names one: retries bypass the rate limit."""
_JSON: Final = "globus_compute_sdk.serialize.JSONData"
_ENDED: Final = ("success", "failed")
_NOT_FOUND: Final = 404
_JSON_ID: Final = "11\n"


@dataclass(frozen=True, slots=True)
class Payload:
    """A packed task.

    Attributes:
        text: Arguments in the service's format, as JSON.
        size: Bytes that it takes in a POST.
    """

    text: str
    size: int


@dataclass(frozen=True, slots=True)
class SubmittedBatch:
    """Answer of the service to a POST: the group of the tasks, and their ids in order."""

    group: str
    tasks: tuple[str, ...]


TaskOutcome = dict[str, Json] | FanfoldError
"""How a task ended: a worker's result, or why there is none."""


class TaskService(Protocol):
    """The calls of the web service that are used; all block."""

    def register(self, work: WorkShard) -> str:
        """Register a function and return its id."""
        ...

    def fetch_health(self, endpoint: str) -> EndpointHealth:
        """Return the state of an endpoint."""
        ...

    def submit(
        self, endpoint: str, function: str, payloads: Sequence[Payload], group: str | None
    ) -> SubmittedBatch:
        """Post tasks."""
        ...

    def fetch_outcomes(self, tasks: Sequence[str]) -> dict[str, TaskOutcome | None] | None:
        """Return how tasks ended, None for open ones; unknown tasks are omitted.

        Return None in place of all if the service refuses because one of them is unknown.
        """
        ...

    def close(self) -> None:
        """Close its connections."""
        ...


def pack_task(task: dict[str, Json]) -> Payload:
    """Return a task as JSON in the service's argument format.

    Raises:
        ConfigurationError: It is larger than a POST may be.
    """
    data = json.dumps([task], ensure_ascii=False, separators=(",", ":"))
    parts = (_JSON_ID + data, _JSON_ID + "{}")
    text = "".join(f"{len(part)}\n{part}" for part in parts)
    size = len(json.dumps(text))  # the text becomes a string within the POST's JSON
    if size > MAX_REQUEST_BYTES:
        msg = (
            f"globus_compute: shard {task.get('shard')} takes {size:,} bytes and the service "
            f"accepts {MAX_REQUEST_BYTES:,}; lower shard.items, or pass large texts by path"
        )
        raise ConfigurationError(msg)
    return Payload(text, size)


class ComputeService:
    """The service, with the login of an SDK client.

    Args:
        client: A ``globus_compute_sdk.Client``; provides address and login, and is not changed.
        user_endpoint_config: Values for the endpoint's template, or None.
        hidden: Texts in these values that no message may show.
    """

    def __init__(
        self,
        client: Any,
        user_endpoint_config: dict[str, Any] | None,
        hidden: Sequence[str] = (),
    ) -> None:
        from globus_sdk import ComputeClientV2, ComputeClientV3  # noqa: PLC0415 - slow to import

        self._config, self._hidden = user_endpoint_config, hidden
        login = {"authorizer": client.authorizer} if client.authorizer else {"app": client.app}
        self._v2 = ComputeClientV2(base_url=client.web_service_address, **login)
        self._v3 = ComputeClientV3(base_url=client.web_service_address, **login)
        for one in (self._v2, self._v3):
            one.retry_config.max_retries = _RETRIES
            one.retry_config.backoff = _pause
            # a redirect would send tasks to another host, with its login from .netrc
            one.transport.session.max_redirects = 0

    def register(self, work: WorkShard) -> str:
        """Register a function by its module and name, and return its id.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        from globus_compute_sdk.sdk.client import (  # noqa: PLC0415 - slow to import
            FunctionRegistrationData,
        )

        registration: Any = FunctionRegistrationData(function=work)
        with convert_errors("registering the function"):
            return str(self._v3.register_function(registration.to_dict())["function_uuid"])

    def fetch_health(self, endpoint: str) -> EndpointHealth:
        """Return the state of an endpoint.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        with convert_errors(f"endpoint {endpoint}"):
            return EndpointHealth.from_json(self._v2.get_endpoint_status(endpoint).data)

    def submit(
        self, endpoint: str, function: str, payloads: Sequence[Payload], group: str | None
    ) -> SubmittedBatch:
        """Post tasks in one request.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        from globus_compute_sdk.sdk.batch import (  # noqa: PLC0415 - slow to import
            Batch,
            create_user_runtime,
        )
        from globus_sdk import GlobusAPIError  # noqa: PLC0415 - slow to import

        batch = Batch(
            group,
            user_endpoint_config=self._config,
            user_runtime=create_user_runtime(),
            result_serializers=[_JSON],
        )
        data = batch.prepare() | {"tasks": {function: [payload.text for payload in payloads]}}
        with convert_errors(f"endpoint {endpoint}", self._hidden):
            try:
                answer = self._v3.submit(endpoint, data).data
            except GlobusAPIError as error:
                if group is None or error.http_status != _NOT_FOUND:
                    raise
                # the service may have forgotten the group; a refused request posts nothing
                return self.submit(endpoint, function, payloads, None)
            tasks = tuple(map(str, answer.get("tasks", {}).get(function, ())))
            if len(tasks) != len(payloads):
                msg = f"endpoint {endpoint}: the service took {len(tasks)} of {len(payloads)} tasks"
                raise BackendError(msg)
            return SubmittedBatch(str(answer["task_group_id"]), tasks)

    def fetch_outcomes(self, tasks: Sequence[str]) -> dict[str, TaskOutcome | None] | None:
        """Return how tasks ended, None for open ones; unknown tasks are omitted.

        Return None in place of all if the service refuses because one of them is unknown.

        Raises:
            FanfoldError: The service refused for another reason, or did not answer.
        """
        from globus_sdk import GlobusAPIError  # noqa: PLC0415 - slow to import

        with convert_errors("polling tasks"):
            try:
                found = self._v2.get_task_batch(list(tasks))["results"]
            except GlobusAPIError as error:
                if error.http_status != _NOT_FOUND:
                    raise
                return None
            return {task: _read_outcome(state) for task, state in found.items()}

    def close(self) -> None:
        """Close its connections."""
        self._v2.close()
        self._v3.close()


def _pause(context: RetryContext) -> float:
    return _RETRY_S if context.backoff is None else max(_RETRY_S, context.backoff)


def _read_outcome(state: dict[str, Any]) -> TaskOutcome | None:
    if not state.get("completion_t") and str(state.get("status")).lower() not in _ENDED:
        return None
    text = state.get("result")
    if text is None:
        return task_failed_error(str(state.get("exception") or state.get("reason") or state))
    if not str(text).startswith(_JSON_ID):
        return unreadable_result_error(str(text))
    try:
        result = json.loads(text[len(_JSON_ID) :])
    except ValueError:  # the other tasks of the answer may be valid
        return unreadable_result_error(str(text))
    return result if isinstance(result, dict) else unreadable_result_error(str(text))


@contextmanager
def convert_errors(where: str, hidden: Sequence[str] = ()) -> Iterator[None]:
    """Convert errors of the SDK, and of reading its answers, to fanfold's.

    Args:
        where: The request, for messages.
        hidden: Texts that the error must not show, even if the answer contains them.

    Raises:
        FanfoldError: The service refused, or did not answer.
    """
    from globus_sdk import GlobusError  # noqa: PLC0415 - slow to import, rarely needed

    try:
        yield
    except GlobusError as error:
        converted = service_error(error, where, hidden)
        if hidden:  # the cause would show the answer
            raise converted from None
        raise converted from error
    except FanfoldError:
        raise
    except Exception as error:  # noqa: BLE001 - for a malformed answer the SDK raises any type
        raise malformed_answer_error(error, where) from None if hidden else error


def connect_service(
    make_client: Callable[[], Any] | None,
    user_endpoint_config: dict[str, Any] | None = None,
    may_prompt: bool = False,
    hidden: Sequence[str] = (),
) -> ComputeService:
    """Return the service; blocks.

    Args:
        make_client: Makes the SDK's client; None uses the SDK's default.
        user_endpoint_config: Values for the endpoint's template, or None.
        may_prompt: Whether a user at a terminal may be asked to log in.
        hidden: Texts in these values that no message may show.

    Raises:
        ConfigurationError: There is no login.
        FanfoldError: The service refused, or did not answer.
    """
    client = make_client() if make_client is not None else _default_client()
    if not may_prompt:
        _require_login(client)
    with convert_errors("connecting"):
        if make_client is None:
            _check_version(client)
        return ComputeService(client, user_endpoint_config, hidden)


def _default_client() -> Any:
    from globus_compute_sdk import Client  # noqa: PLC0415 - slow to import, rarely needed

    try:
        return Client(do_version_check=False)
    except ValueError as error:  # only one of the two credentials is in the environment
        raise ConfigurationError(f"globus_compute: {error}") from error


def _require_login(client: Any) -> None:
    """Raise an error where the SDK would prompt at the terminal during a run."""
    from globus_sdk import UserApp  # noqa: PLC0415 - slow to import, rarely needed

    if isinstance(client.app, UserApp) and client.app.login_required():
        raise ConfigurationError(f"globus_compute: there is no login on this machine: {LOGIN_HINT}")


def _check_version(client: Any) -> None:
    from globus_compute_sdk.errors import VersionMismatch  # noqa: PLC0415 - slow to import

    try:
        client.version_check()
    except VersionMismatch as error:
        msg = f"globus_compute: {error}; install a newer globus-compute-sdk"
        raise ConfigurationError(msg) from error
