"""The fixtures of `fixtures.py` for the tests of this folder."""

from __future__ import annotations

from fanfold.tests.integration.globus.fixtures import (
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

__all__ = [
    "amqp_url",
    "client",
    "endpoint",
    "endpoint_of",
    "executor",
    "executor_of",
    "service",
    "session_endpoint",
    "session_service",
]
