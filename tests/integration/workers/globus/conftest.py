"""The fixtures of `fixtures.py` and `globus_run.py` for the tests of this folder."""

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

__all__ = [
    "amqp_url",
    "client",
    "endpoint",
    "endpoint_of",
    "executor",
    "executor_of",
    "lab_over",
    "service",
    "session_endpoint",
    "session_service",
]
