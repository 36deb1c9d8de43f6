"""The fixtures of the other modules for the tests of this folder."""

from __future__ import annotations

from fanfold.tests.integration.workers.globus.fixtures import (
    amqp_url,
    client,
    endpoint,
    endpoint_of,
    executor,
    executor_of,
    service,
    session_endpoint,
    session_service,
)
from fanfold.tests.integration.workers.globus.globus_run import lab_over
from fanfold.tests.integration.workers.globus.plain_run import plain_run_on

__all__ = [
    "amqp_url",
    "client",
    "endpoint",
    "endpoint_of",
    "executor",
    "executor_of",
    "lab_over",
    "plain_run_on",
    "service",
    "session_endpoint",
    "session_service",
]
