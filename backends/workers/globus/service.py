"""The web service of Globus Compute, by its own SDK: what blocks, and nothing else.

Tasks are posted and asked after by HTTP, as the SDK's ``Client`` does it, rather than by its
``Executor``: a POST then carries exactly what is meant to travel together, the tasks' ids are
known before anything is waited for, a POST that fails costs its own tasks only, results need no
AMQP connection (which no HTTP proxy lets through), and no thread waits at the exit for results
that never come. The client itself asks after tasks in a way that hides why one failed, and it
unpickles whatever result comes; here only JSON is read.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from ...core.errors import ConfigurationError, FanfoldError, SiteError
from ...core.types import Json
from .errors import odd, refused, task_failed, unreadable
from .health import Health

if TYPE_CHECKING:
    from globus_sdk.transport import RetryContext

WorkShard = Callable[[dict[str, Json]], dict[str, Json]]

MOST_BYTES: Final = 9_500_000
"""Most bytes of a POST; the service takes 10 MB."""
_RETRIES: Final = 1
"""The SDK's own repetitions; what outlasts them is waited for elsewhere."""
_RETRY_S: Final = 4.0
"""Pause before one, unless the service names another: repetitions take no turn of the pace's."""
_JSON: Final = "globus_compute_sdk.serialize.JSONData"
_ENDED: Final = ("success", "failed")
_JSON_ID: Final = "11\n"


@dataclass(frozen=True, slots=True)
class Parcel:
    """A packed order.

    Attributes:
        text: Arguments in the service's form, as JSON.
        size: Bytes that it takes in a POST.
    """

    text: str
    size: int


@dataclass(frozen=True, slots=True)
class Posted:
    """What the service answered to a POST: the tasks' group, and their ids in order."""

    group: str
    tasks: tuple[str, ...]


End = dict[str, Json] | FanfoldError
"""How a task ended: a worker's summary, or why there is none."""


class Service(Protocol):
    """What is used of the web service; all of it blocks."""

    def register(self, work: WorkShard) -> str:
        """Register a function and return its id."""
        ...

    def health(self, endpoint: str) -> Health:
        """Return what is known of an endpoint's state."""
        ...

    def post(
        self, endpoint: str, function: str, parcels: Sequence[Parcel], group: str | None
    ) -> Posted:
        """Post tasks."""
        ...

    def ends(self, tasks: Sequence[str]) -> dict[str, End | None]:
        """Return how tasks ended, None for those that did not; unknown ones are left out."""
        ...

    def close(self) -> None:
        """Close its connections."""
        ...


def packed(order: dict[str, Json]) -> Parcel:
    """Return an order in the form in which the service carries arguments, as JSON.

    Raises:
        ConfigurationError: It is larger than a POST may be.
    """
    data = json.dumps([order], ensure_ascii=False, separators=(",", ":"))
    parts = (_JSON_ID + data, _JSON_ID + "{}")
    text = "".join(f"{len(part)}\n{part}" for part in parts)
    size = len(json.dumps(text))  # the text becomes a string within the POST's JSON
    if size > MOST_BYTES:
        msg = (
            f"globus_compute: shard {order.get('shard')} takes {size:,} bytes and the service "
            f"carries {MOST_BYTES:,}; lower shard.items, or give large texts by path"
        )
        raise ConfigurationError(msg)
    return Parcel(text, size)


class ComputeService:
    """The service, with an SDK client's login.

    Args:
        client: A ``globus_compute_sdk.Client``; gives address and login, and is not changed.
        user_endpoint_config: Values for the endpoint's template, or None.
        hidden: Texts among them that no message may show.
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
            # a redirect would send orders to another host, with what .netrc holds for it
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
        with refusals("registering the function"):
            return str(self._v3.register_function(registration.to_dict())["function_uuid"])

    def health(self, endpoint: str) -> Health:
        """Return what is known of an endpoint's state.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        with refusals(f"endpoint {endpoint}"):
            return Health.from_json(self._v2.get_endpoint_status(endpoint).data)

    def post(
        self, endpoint: str, function: str, parcels: Sequence[Parcel], group: str | None
    ) -> Posted:
        """Post tasks in one request.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        from globus_compute_sdk.sdk.batch import (  # noqa: PLC0415 - slow to import
            Batch,
            create_user_runtime,
        )

        batch = Batch(
            group,
            user_endpoint_config=self._config,
            user_runtime=create_user_runtime(),
            result_serializers=[_JSON],
        )
        data = batch.prepare() | {"tasks": {function: [parcel.text for parcel in parcels]}}
        with refusals(f"endpoint {endpoint}", self._hidden):
            answer = self._v3.submit(endpoint, data).data
            tasks = tuple(map(str, answer.get("tasks", {}).get(function, ())))
            if len(tasks) != len(parcels):
                msg = f"endpoint {endpoint}: the service took {len(tasks)} of {len(parcels)} tasks"
                raise SiteError(msg)
            return Posted(str(answer["task_group_id"]), tasks)

    def ends(self, tasks: Sequence[str]) -> dict[str, End | None]:
        """Return how tasks ended, None for those that did not; unknown ones are left out.

        Raises:
            FanfoldError: The service refused, or did not answer.
        """
        with refusals("asking after tasks"):
            found = self._v2.get_task_batch(list(tasks))["results"]
            return {task: _end(state) for task, state in found.items()}

    def close(self) -> None:
        """Close its connections."""
        self._v2.close()
        self._v3.close()


def _pause(context: RetryContext) -> float:
    return _RETRY_S if context.backoff is None else max(_RETRY_S, context.backoff)


def _end(state: dict[str, Any]) -> End | None:
    if not state.get("completion_t") and state.get("status") not in _ENDED:
        return None
    text = state.get("result")
    if text is None:
        return task_failed(str(state.get("exception") or state.get("reason") or state))
    if not str(text).startswith(_JSON_ID):
        return unreadable(str(text))
    try:
        summary = json.loads(text[len(_JSON_ID) :])
    except ValueError:  # this task's alone: the others of the answer may be whole
        return unreadable(str(text))
    return summary if isinstance(summary, dict) else unreadable(str(text))


@contextmanager
def refusals(where: str, hidden: Sequence[str] = ()) -> Iterator[None]:
    """Turn errors of the SDK, and of reading what it returns, within the block into fanfold's.

    Args:
        where: What is asked of the service.
        hidden: Texts that the error must not show, though the answer may.

    Raises:
        FanfoldError: The service refused, or did not answer.
    """
    from globus_sdk import GlobusError  # noqa: PLC0415 - slow to import, rarely needed

    try:
        yield
    except GlobusError as error:
        told = refused(error, where, hidden)
        if hidden:  # the cause shows what was answered
            raise told from None
        raise told from error
    except FanfoldError:
        raise
    except Exception as error:  # noqa: BLE001 - of an answer that is none, the SDK raises anything
        raise odd(error, where) from None if hidden else error
