"""The real SDK against the stand-in, and its clean-up."""

# mypy: allow-untyped-calls
# (the SDK annotates only part of itself)

from __future__ import annotations

import os
import uuid
from typing import Any

import globus_sdk
from globus_compute_sdk import Client, Executor
from globus_compute_sdk.sdk import executor as sdk
from globus_compute_sdk.sdk.client import _ComputeWebClient
from globus_compute_sdk.serialize import ComputeSerializer, JSONData

URL_VARIABLE = "FANFOLD_TEST_GLOBUS_URL"
JSON_RESULTS = ("globus_compute_sdk.serialize.JSONData",)


def make_client(url: str) -> Client:
    """Return a client of the service at `url`, without a login.

    The SDK takes the address only from a fixed list, hence its web client is replaced.
    """
    authorizer = globus_sdk.AccessTokenAuthorizer("stand-in")
    client = Client(authorizer=authorizer, do_version_check=False)
    client._compute_web_client = _ComputeWebClient(base_url=url, authorizer=authorizer)
    client.web_service_address = url
    client.version_check()
    return client


def client_from_environment() -> Client:
    """Return a client of the service that `FANFOLD_TEST_GLOBUS_URL` names, for other processes."""
    return make_client(os.environ[URL_VARIABLE])


def make_executor(
    client: Client, endpoint_id: str, task_group_id: str | None = None, **options: Any
) -> Executor:
    """Return an executor with JSON both ways, a task group of its own, and bursts allowed."""
    burst = {"api_burst_limit": 8, "api_burst_window_s": 1}
    return Executor(
        endpoint_id,
        client=client,
        task_group_id=task_group_id or str(uuid.uuid4()),
        serializer=ComputeSerializer(strategy_data=JSONData()),
        result_serializers=JSON_RESULTS,
        **(burst | options),
    )


def close_executor(executor: Executor, timeout_s: float = 20.0) -> None:
    """End an executor and cancel what it still waits for.

    `Executor.shutdown` cancels only what was not posted; the watcher of the task group then keeps
    the process alive until its last future ends. The watcher itself can be told to cancel.

    Raises:
        TimeoutError: The watcher still runs after `timeout_s` seconds.
    """
    executor.shutdown(wait=False, cancel_futures=True)
    executor._task_submitter.join(timeout_s)  # else it may post, and begin to watch, later
    watcher = sdk._RESULT_WATCHERS.get(executor.task_group_id)
    if watcher is not None:
        _end(watcher, timeout_s)


def _end(watcher: sdk._ResultWatcher, timeout_s: float) -> None:
    connection = watcher._connection
    watcher.shutdown(wait=False, cancel_futures=True)
    watcher.join(timeout_s)
    if watcher.is_alive():
        raise TimeoutError(f"{watcher!r} does not end")
    if connection is not None:
        connection.ioloop.close()  # which the SDK leaves to the garbage collector, with a warning


def close_all_executors(timeout_s: float = 20.0) -> int:
    """End whatever executors and watchers this process has; return how many executors were open."""
    executors = list(sdk._REGISTERED_EXECUTORS.values())
    for executor in executors:
        close_executor(executor, timeout_s)
    for watcher in list(sdk._RESULT_WATCHERS.values()):
        _end(watcher, timeout_s)
    return len(executors)


def close_client(client: Client) -> None:
    """Close the connections of a client."""
    client._compute_web_client.v2.close()
    client._compute_web_client.v3.close()
