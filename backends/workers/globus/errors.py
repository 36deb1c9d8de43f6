"""Convert errors of the service, its endpoints and its SDK to fanfold's errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Final

from ...core.errors import (
    BackendError,
    ConfigurationError,
    FanfoldError,
    RunStoppedError,
    WorkerLostError,
)
from ...core.messages import own_version

if TYPE_CHECKING:
    from globus_sdk import GlobusError

LOGIN_HINT: Final = (
    "log in by running 'fanfold globus register' once in a terminal, or set "
    "GLOBUS_COMPUTE_CLIENT_ID and GLOBUS_COMPUTE_CLIENT_SECRET"
)
_TRANSIENT: Final = {408, 425, 429, 500, 502, 503, 504}
_ADVICE: Final = {
    401: f"the login is missing or has expired: {LOGIN_HINT}",
    403: (
        "this login may not use it: have its owner allow your identity, and check the ids in "
        "backend.endpoints and backend.function"
    ),
    404: "the service does not know it: check the ids in backend.endpoints and backend.function",
    413: "the service found the request too large: lower shard.items",
    422: (
        "if its template refuses a value, correct backend.user_endpoint_config; "
        "'globus-compute-endpoint render-user-config' tries it on the endpoint's machine"
    ),
}
_LINE: Final = 400
_FORGOTTEN: Final = "the service no longer knows the task; it keeps a result for half an hour"
_STALE_INSTANCE: Final = "Another instance of this endpoint is running"
"""Reported by a manager's endpoint while the file of a killed endpoint is recent."""
_RESTARTING: Final = "its engine was killed and restarts after three heartbeats"


def service_error(error: GlobusError, where: str, hidden: Sequence[str] = ()) -> FanfoldError:
    """Convert an error of the SDK.

    Args:
        error: Raised by a request to the service.
        where: The request, for the message.
        hidden: Texts that the message must not show, even if the answer contains them.

    Returns:
        A :class:`BackendError` if a retry may help, else a :class:`ConfigurationError`.
    """
    status = getattr(error, "http_status", None)
    if status is None:
        return BackendError(f"globus_compute: {where}: no answer from the service: {error}")
    reason = _reason(error)
    for text in hidden:
        reason = reason.replace(text, "**********")
    message = f"globus_compute: {where}: the service answered {status}: {reason[:_LINE]}"
    if _STALE_INSTANCE in reason:
        return BackendError(f"globus_compute: {where}: {_RESTARTING}")
    if status in _TRANSIENT:
        return BackendError(f"{message} (https://status.globus.org lists outages)")
    return ConfigurationError(f"{message}; {_ADVICE.get(status, _ADVICE[422])}")


def malformed_answer_error(error: Exception, where: str) -> BackendError:
    """Return the error for an answer that cannot be parsed, without showing the answer.

    Args:
        error: Raised by the SDK while it parsed the answer.
        where: The request, for the message.
    """
    return BackendError(
        f"globus_compute: {where}: the answer is not from the service ({type(error).__name__}); "
        "check whether a proxy between here and compute.api.globus.org sent it"
    )


def _reason(error: GlobusError) -> str:
    raw = getattr(error, "raw_json", None) or {}
    text = str(raw.get("reason") or getattr(error, "message", None) or error)
    return " ".join(text.strip().partition("\n\nFailed validating")[0].split())


def offline_error(endpoint: str) -> BackendError:
    """Return the error for an endpoint that is offline."""
    return WorkerLostError(
        f"globus_compute: endpoint {endpoint} is offline; start it on its machine with "
        "'globus-compute-endpoint start NAME'"
    )


def restarted_error(endpoint: str) -> BackendError:
    """Return the error for an endpoint that was restarted and lost its tasks."""
    return WorkerLostError(
        f"globus_compute: endpoint {endpoint} was restarted and no longer has the task"
    )


def overdue_error(endpoint: str) -> BackendError:
    """Return the error for a task that exceeds its worker's time."""
    return WorkerLostError(
        f"globus_compute: endpoint {endpoint} did not finish a task in the time that its worker "
        "had for it (backend.deadline_s)"
    )


def unknown_task_error(endpoint: str) -> BackendError:
    """Return the error for a task that the service no longer knows."""
    return WorkerLostError(f"globus_compute: endpoint {endpoint}: {_FORGOTTEN}")


def task_failed_error(text: str) -> FanfoldError:
    """Return the error for a task without a result.

    Args:
        text: Report of the endpoint or its worker, usually a traceback.
    """
    line = _last(text)
    message = f"globus_compute: a task failed: {line}"
    if _STALE_INSTANCE in text:
        return BackendError(f"globus_compute: a task was refused: {_RESTARTING}")
    if "not permitted on endpoint" in text:
        advice = (
            "the endpoint allows certain functions only: have its owner add the id that "
            "'fanfold globus register' prints to allowed_functions, and set backend.function"
        )
        return ConfigurationError(f"{message}; {advice}")
    if "MaxResultSizeExceeded" in text:
        advice = "lower shard.items or limits.streams, or set backend.shared_folder: true"
        return RunStoppedError(f"{message}; a result takes 10 MB at most: {advice}")
    if "No module named 'fanfold" in text:
        advice = f"install fanfold=={own_version()} in the environment of the endpoint's workers"
        return ConfigurationError(f"{message}; {advice} ('fanfold globus template' shows how)")
    if "is required here, found" in text:  # printed by the endpoint's template
        advice = f"install fanfold=={own_version()} there, or write a new endpoint template"
        return ConfigurationError(f"{message}; {advice} (fanfold globus template)")
    forgotten = "unknown task" in text.lower()
    return WorkerLostError(f"{message}: {_FORGOTTEN}" if forgotten else message)


def unreadable_result_error(text: str) -> FanfoldError:
    """Return the error for a result that is not the JSON of a shard result."""
    return ConfigurationError(
        f"globus_compute: a result is not the requested JSON ({text[:40]!r}); use "
        "globus-compute-endpoint 4.19 or newer, with JSONData in allowed_serializers if that is set"
    )


def _last(text: str) -> str:
    """Return the last line of a traceback that is not empty."""
    lines = [line.strip(" \t-") for line in text.splitlines() if line.strip(" \t-")]
    return (lines[-1] if lines else "no reason given")[:_LINE]
