from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import (
    EndpointBusyError,
    PromptTooLongError,
    RequestRefusedError,
)
from fanfold.backends.fleet.failures import Failure, HTTPAnswer, RetryAction, classify_answer
from fanfold.backends.simulated.values import error_body


def failure(status: int, body: Any) -> Failure:
    return classify_answer(HTTPAnswer(status, {}, orjson.dumps(body)), "sophia/vllm")


def test_the_gateways_throttle_is_the_users_not_one_deployments() -> None:
    told = failure(429, {"detail": "Too many requests."})
    assert isinstance(told.error, EndpointBusyError)
    assert (told.rule.action, told.rule.rest_s, told.rule.shared) == (
        RetryAction.WAIT,
        1.0,
        True,
    )
    assert told.rule.free


@pytest.mark.parametrize("code", ["unsupported_framework", "unsupported_endpoint"])
def test_a_wrong_path_is_the_deployments_fault_not_the_items(code: str) -> None:
    told = failure(400, {"error": {"code": code, "message": "no", "info": {}}})
    assert isinstance(told.error, RequestRefusedError)
    assert told.rule.action is RetryAction.EJECT
    assert "endpoints.first.paths" in told.error.message


@given(st.text(), st.integers(0, 400), st.booleans())
def test_a_quoted_error_is_read_however_it_is_cut(text: str, cut: int, closed: bool) -> None:
    inner = error_body(text, "BadRequestError", 400, "input_tokens")[:cut]
    literal = repr(inner) if closed else repr(inner)[:-1]
    message = f"Upstream endpoint returned 400: {literal}"
    told = failure(400, {"error": {"code": "internal_endpoint_error", "message": message}})
    assert told.rule.action is RetryAction.FAIL
    whole = len(inner) == len(error_body(text, "BadRequestError", 400, "input_tokens"))
    assert isinstance(told.error, PromptTooLongError) or not whole
