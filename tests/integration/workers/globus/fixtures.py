"""Fixtures of the Globus Compute tests: broker, service, endpoint, executors.

One service and one endpoint of two threads serve the whole session; each test begins without
faults and ends without open futures.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from globus_compute_sdk import Client, Executor

from .broker import Broker
from .client import close_all_executors, close_client, make_client, make_executor
from .endpoint import UserEndpoint, start_user_endpoint
from .service import GlobusService

AMQP_VARIABLE = "FANFOLD_TEST_AMQP_URL"
AMQP_DEFAULT = "amqp://guest:guest@127.0.0.1:5672/"

MakeExecutor = Callable[..., Executor]
StartEndpoint = Callable[..., UserEndpoint]


@pytest.fixture(scope="session")
def amqp_url() -> str:
    """The RabbitMQ of the environment or the default port; without one the tests are skipped."""
    url = os.environ.get(AMQP_VARIABLE, AMQP_DEFAULT)
    if reason := Broker(url).unreachable():
        pytest.skip(f"no RabbitMQ answers ({AMQP_VARIABLE} names one): {reason}")
    return url


@pytest.fixture(scope="session")
def session_service(amqp_url: str) -> Iterator[GlobusService]:
    with GlobusService(amqp_url) as service:
        yield service


@pytest.fixture(scope="session")
def session_endpoint(
    session_service: GlobusService, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[UserEndpoint]:
    endpoint = start_user_endpoint(session_service, tmp_path_factory.mktemp("globus"))
    yield endpoint
    endpoint.stop()


@pytest.fixture
def service(session_service: GlobusService) -> Iterator[GlobusService]:
    """The service, without faults at first and at last, and no executor open at the end."""
    session_service.faults.clear()
    yield session_service
    close_all_executors()
    session_service.faults.clear()
    session_service.release()


@pytest.fixture
def client(service: GlobusService) -> Iterator[Client]:
    client = make_client(service.url)
    yield client
    close_all_executors()
    close_client(client)


@pytest.fixture
def endpoint(session_endpoint: UserEndpoint) -> UserEndpoint:
    """The shared endpoint of two threads; it must survive the test."""
    return session_endpoint


@pytest.fixture
def executor_of(client: Client, endpoint: UserEndpoint) -> MakeExecutor:
    """Make executors on the shared endpoint; `service` closes them."""

    def make(endpoint_id: str = endpoint.endpoint_id, **options: Any) -> Executor:
        return make_executor(client, endpoint_id, **options)

    return make


@pytest.fixture
def executor(executor_of: MakeExecutor) -> Executor:
    return executor_of()


@pytest.fixture
def endpoint_of(service: GlobusService, tmp_path: Path) -> Iterator[StartEndpoint]:
    """Start endpoints of the test's own, which may be killed."""
    started: list[UserEndpoint] = []

    def start(*config: str, **options: Any) -> UserEndpoint:
        started.append(start_user_endpoint(service, tmp_path, *config, **options))
        return started[-1]

    yield start
    for one in started:
        one.stop()
