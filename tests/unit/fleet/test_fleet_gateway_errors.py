from __future__ import annotations

from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import EndpointBusyError, RequestRefusedError
from fanfold.backends.fleet.failures import Failure, RawAnswer, Step, of_answer


def failure(status: int, body: Any) -> Failure:
    return of_answer(RawAnswer(status, {}, orjson.dumps(body)), "sophia/vllm")


def test_the_gateways_throttle_is_the_users_not_one_deployments() -> None:
    told = failure(429, {"detail": "Too many requests."})
    assert isinstance(told.error, EndpointBusyError)
    assert (told.treatment.step, told.treatment.rest_s, told.treatment.shared) == (
        Step.WAIT,
        1.0,
        True,
    )
    assert told.treatment.free


@pytest.mark.parametrize("code", ["unsupported_framework", "unsupported_endpoint"])
def test_a_wrong_path_is_the_deployments_fault_not_the_items(code: str) -> None:
    told = failure(400, {"error": {"code": code, "message": "no", "info": {}}})
    assert isinstance(told.error, RequestRefusedError)
    assert told.treatment.step is Step.EJECT
    assert "endpoints.first.paths" in told.error.message
