"""What the service, its endpoints and its SDK report, in fanfold's own errors."""

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
        "if its template refuses a value, mend backend.user_endpoint_config; "
        "'globus-compute-endpoint render-user-config' tries it on the endpoint's machine"
    ),
}
_LINE: Final = 400
_LEFT_BEHIND: Final = "Another instance of this endpoint is running"
"""What a manager's endpoint says while the file of one that was killed is fresh."""
_ANEW: Final = "its engine was killed and is started anew in a while (three heartbeats)"


def service_error(error: GlobusError, where: str, hidden: Sequence[str] = ()) -> FanfoldError:
    """Return what an error of the SDK means.

    Args:
        error: Raised while the service was asked something.
        where: What was asked.
        hidden: Texts that the message must not show, though the answer may.

    Returns:
        A :class:`BackendError` where asking again may help, else a :class:`ConfigurationError`.
    """
    status = getattr(error, "http_status", None)
    if status is None:
        return BackendError(f"globus_compute: {where}: no answer from the service: {error}")
    reason = _reason(error)
    for text in hidden:
        reason = reason.replace(text, "**********")
    said = f"globus_compute: {where}: the service answered {status}: {reason[:_LINE]}"
    if _LEFT_BEHIND in reason:
        return BackendError(f"globus_compute: {where}: {_ANEW}")
    if status in _TRANSIENT:
        return BackendError(f"{said} (https://status.globus.org tells of outages)")
    return ConfigurationError(f"{said}; {_ADVICE.get(status, _ADVICE[422])}")


def malformed_answer_error(error: Exception, where: str) -> BackendError:
    """Return that an answer could not be understood, without showing it.

    Args:
        error: Raised by the SDK while it was read.
        where: What was asked.
    """
    return BackendError(
        f"globus_compute: {where}: the answer is none of the service's ({type(error).__name__}); "
        "see whether a proxy between here and compute.api.globus.org gave it"
    )


def _reason(error: GlobusError) -> str:
    raw = getattr(error, "raw_json", None) or {}
    text = str(raw.get("reason") or getattr(error, "message", None) or error)
    return " ".join(text.strip().partition("\n\nFailed validating")[0].split())


def offline_error(endpoint: str) -> BackendError:
    """Return that an endpoint cannot be reached."""
    return WorkerLostError(
        f"globus_compute: endpoint {endpoint} is offline; start it on its machine with "
        "'globus-compute-endpoint start NAME'"
    )


def restarted_error(endpoint: str) -> BackendError:
    """Return that an endpoint has lost what it had in hand."""
    return WorkerLostError(
        f"globus_compute: endpoint {endpoint} was restarted and no longer has the task"
    )


def overdue_error(endpoint: str) -> BackendError:
    """Return that a task takes longer than its worker was given."""
    return WorkerLostError(
        f"globus_compute: endpoint {endpoint} did not finish a task in the time that its worker "
        "had for it (backend.deadline_s)"
    )


def unknown_task_error(endpoint: str) -> BackendError:
    """Return that the service no longer knows a task."""
    return WorkerLostError(
        f"globus_compute: endpoint {endpoint}: the service no longer knows the task; it keeps a "
        "result for half an hour"
    )


def task_failed_error(text: str) -> FanfoldError:
    """Return why a task has no summary.

    Args:
        text: What the endpoint or its worker reports, a traceback as a rule.
    """
    line = _last(text)
    said = f"globus_compute: a task failed: {line}"
    if _LEFT_BEHIND in text:
        return BackendError(f"globus_compute: a task was refused: {_ANEW}")
    if "not permitted on endpoint" in text:
        advice = (
            "the endpoint allows certain functions only: have its owner add the id that "
            "'fanfold globus register' prints to allowed_functions, and set backend.function"
        )
        return ConfigurationError(f"{said}; {advice}")
    if "MaxResultSizeExceeded" in text:
        advice = "lower shard.items or limits.streams, or set backend.shared_folder: true"
        return RunStoppedError(f"{said}; a result takes 10 MB at most: {advice}")
    if "No module named 'fanfold" in text:
        advice = f"install fanfold=={own_version()} in the environment of the endpoint's workers"
        return ConfigurationError(f"{said}; {advice} ('fanfold globus template' shows how)")
    if "is wanted here, found" in text:  # said by the template
        advice = f"install fanfold=={own_version()} there, or write the endpoint's template anew"
        return ConfigurationError(f"{said}; {advice} (fanfold globus template)")
    return WorkerLostError(said)


def unreadable_result_error(text: str) -> FanfoldError:
    """Return that a result is no JSON summary."""
    return ConfigurationError(
        f"globus_compute: a result is not the JSON that was asked for ({text[:40]!r}); use "
        "globus-compute-endpoint 4.19 or newer, with JSONData in allowed_serializers if that is set"
    )


def _last(text: str) -> str:
    """Return a traceback's last line that says something."""
    lines = [line.strip(" \t-") for line in text.splitlines() if line.strip(" \t-")]
    return (lines[-1] if lines else "no reason given")[:_LINE]
