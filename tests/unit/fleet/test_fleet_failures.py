"""Every row of the failure table: class of error, and what follows."""

from __future__ import annotations

import errno
import json
import pickle
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import aiohttp
import orjson
import pytest

from fanfold.backends.core.errors import (
    AuthenticationError,
    EndpointBusyError,
    EndpointError,
    EndpointLostError,
    EndpointReplyError,
    ModelNotServedError,
    PromptTooLongError,
    RequestRefusedError,
)
from fanfold.backends.core.secrets import MASKED
from fanfold.backends.core.values import cut_deep_levels, parse_json
from fanfold.backends.fleet import failures, request, transport
from fanfold.backends.fleet.endpoint import Endpoint, EndpointSpec
from fanfold.backends.fleet.failures import (
    BreakerEffect,
    ErrorBody,
    Failure,
    HTTPAnswer,
    RetryAction,
    read_retry_after,
)
from fanfold.backends.fleet.policy import RetryPolicy
from fanfold.backends.fleet.retry import AttemptLog, make_stop


def vllm(message: str, code: int, kind: str = "x", param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def first(code: str, message: str = "x") -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "info": {}}}


LONG = "This model's maximum context length is 2048 tokens. However, you asked for more"
ROWS: list[tuple[str, int, Any, type[EndpointError], RetryAction, BreakerEffect]] = [
    (
        "key",
        401,
        {"error": "Unauthorized"},
        AuthenticationError,
        RetryAction.REKEY,
        BreakerEffect.NO,
    ),
    (
        "denied",
        403,
        first("access_denied"),
        AuthenticationError,
        RetryAction.EJECT,
        BreakerEffect.NO,
    ),
    ("no model", 404, vllm("no", 404), ModelNotServedError, RetryAction.EJECT, BreakerEffect.NO),
    ("page 404", 404, b"<html>", ModelNotServedError, RetryAction.EJECT, BreakerEffect.NO),
    ("long", 400, vllm(LONG, 400), PromptTooLongError, RetryAction.FAIL, BreakerEffect.NO),
    (
        "long param",
        400,
        vllm("x", 400, param="input_text"),
        PromptTooLongError,
        RetryAction.FAIL,
        BreakerEffect.NO,
    ),
    (
        "max_tokens",
        400,
        vllm("x", 400, param="max_tokens"),
        RequestRefusedError,
        RetryAction.FAIL,
        BreakerEffect.NO,
    ),
    ("other 400", 400, vllm("bad", 400), RequestRefusedError, RetryAction.FAIL, BreakerEffect.NO),
    (
        "422",
        422,
        {"detail": [{"msg": "m"}]},
        RequestRefusedError,
        RetryAction.FAIL,
        BreakerEffect.NO,
    ),
    ("413", 413, b"too large", PromptTooLongError, RetryAction.FAIL, BreakerEffect.NO),
    (
        "quota 400",
        400,
        first("quota_exceeded"),
        EndpointBusyError,
        RetryAction.WAIT,
        BreakerEffect.NO,
    ),
    (
        "batch 400",
        400,
        first("batch_ongoing"),
        EndpointBusyError,
        RetryAction.WAIT,
        BreakerEffect.NO,
    ),
    ("408", 408, first("request_timeout"), EndpointLostError, RetryAction.OTHER, BreakerEffect.NO),
    ("408 other", 408, b"late", EndpointLostError, RetryAction.SAME, BreakerEffect.NO),
    ("409", 409, first("x"), EndpointError, RetryAction.SAME, BreakerEffect.NO),
    ("429", 429, vllm("slow down", 429), EndpointBusyError, RetryAction.WAIT, BreakerEffect.NO),
    (
        "429 throttle",
        429,
        {"detail": "Too many requests."},
        EndpointBusyError,
        RetryAction.WAIT,
        BreakerEffect.NO,
    ),
    (
        "429 tpm",
        429,
        first("too_many_requests"),
        EndpointBusyError,
        RetryAction.WAIT,
        BreakerEffect.NO,
    ),
    (
        "429 paid",
        429,
        first("insufficient_quota"),
        EndpointBusyError,
        RetryAction.STOP,
        BreakerEffect.NO,
    ),
    ("500", 500, vllm("boom", 500), EndpointError, RetryAction.OTHER, BreakerEffect.COUNT),
    (
        "500 text",
        500,
        b"Internal Server Error",
        EndpointError,
        RetryAction.OTHER,
        BreakerEffect.COUNT,
    ),
    ("501", 501, b"", RequestRefusedError, RetryAction.FAIL, BreakerEffect.NO),
    ("502", 502, b"<html>", EndpointLostError, RetryAction.OTHER, BreakerEffect.COUNT),
    (
        "504",
        504,
        first("internal_endpoint_error"),
        EndpointLostError,
        RetryAction.OTHER,
        BreakerEffect.COUNT,
    ),
    (
        "503 cold",
        503,
        first("internal_endpoint_error", "online but not ready to receive tasks."),
        EndpointBusyError,
        RetryAction.WAIT,
        BreakerEffect.NO,
    ),
    (
        "503 offline",
        503,
        first("internal_endpoint_error", "x is offline."),
        EndpointBusyError,
        RetryAction.WAIT,
        BreakerEffect.OPEN,
    ),
    (
        "503 upkeep",
        503,
        first("cluster_under_maintenance"),
        EndpointBusyError,
        RetryAction.WAIT,
        BreakerEffect.OPEN,
    ),
    (
        "503 busy",
        503,
        vllm("The engine is currently busy", 503, "Service Unavailable"),
        EndpointBusyError,
        RetryAction.WAIT,
        BreakerEffect.NO,
    ),
    (
        "503 other",
        503,
        vllm("x", 503, "ServiceUnavailableError"),
        EndpointBusyError,
        RetryAction.OTHER,
        BreakerEffect.COUNT,
    ),
    ("529", 529, b"", EndpointError, RetryAction.OTHER, BreakerEffect.COUNT),
    ("302", 302, b"", EndpointReplyError, RetryAction.EJECT, BreakerEffect.NO),
    ("307", 307, b"", EndpointReplyError, RetryAction.EJECT, BreakerEffect.NO),
    ("402", 402, vllm("pay", 402), EndpointBusyError, RetryAction.EJECT, BreakerEffect.NO),
    ("day", 429, vllm("60 a day", 429), EndpointBusyError, RetryAction.EJECT, BreakerEffect.NO),
    ("RPD", 429, vllm("on (RPD)", 429), EndpointBusyError, RetryAction.EJECT, BreakerEffect.NO),
    ("minute", 429, vllm("6 a minute", 429), EndpointBusyError, RetryAction.WAIT, BreakerEffect.NO),
    ("broken", 200, b'{"choices', EndpointReplyError, RetryAction.OTHER, BreakerEffect.COUNT),
    ("page", 200, b"<html>log in", EndpointReplyError, RetryAction.OTHER, BreakerEffect.COUNT),
    ("list", 200, [], EndpointReplyError, RetryAction.OTHER, BreakerEffect.COUNT),
    ("inner 400", 200, vllm("x", 400), RequestRefusedError, RetryAction.FAIL, BreakerEffect.NO),
    ("inner 500", 200, vllm("x", 500), EndpointError, RetryAction.OTHER, BreakerEffect.COUNT),
    (
        "object error",
        200,
        {"object": "error", "message": "m", "code": 500},
        EndpointError,
        RetryAction.OTHER,
        BreakerEffect.COUNT,
    ),
    ("detail", 200, {"detail": "x"}, EndpointReplyError, RetryAction.OTHER, BreakerEffect.COUNT),
    ("null", 200, {"choices": None}, EndpointReplyError, RetryAction.OTHER, BreakerEffect.COUNT),
    ("empty", 200, {"choices": []}, EndpointReplyError, RetryAction.OTHER, BreakerEffect.COUNT),
    (
        "abort",
        200,
        {"choices": [{"message": {"content": "x"}, "finish_reason": "abort"}]},
        EndpointLostError,
        RetryAction.OTHER,
        BreakerEffect.COUNT,
    ),
    (
        "gateway",
        200,
        {
            "id": "chatcmpl-api-error",
            "choices": [{"message": {"content": "[ERROR]"}, "finish_reason": "stop"}],
        },
        EndpointLostError,
        RetryAction.OTHER,
        BreakerEffect.COUNT,
    ),
]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (b'\xef\xbb\xbf{"a": 1}', {"a": 1}),
        ('{"a": 1}'.encode("utf-16"), {"a": 1}),
        (b'{"a": [NaN, Infinity, -Infinity, 1e999]}', {"a": [None] * 4}),
        (b'{"a": "\\ud83d", "\\udc00": ["\\ud83d"]}', {"a": "?", "?": ["?"]}),
        (b'{"a": "\xe9"}', {"a": "\ufffd"}),
        (b"[NaN, 18446744073709551615, -9223372036854775808]", [None, 2**64 - 1, -(2**63)]),
        (b"[NaN, 1" + b"0" * 30 + b", " + b"9" * 5000 + b"]", [None, 1e30, None]),
    ],
    ids=["mark", "utf-16", "not finite", "half pairs", "no utf-8", "64 bits", "digits"],
)
def test_json_that_breaks_the_rules_is_read(text: bytes, value: Any) -> None:
    assert parse_json(text) == value
    assert orjson.loads(orjson.dumps(parse_json(text))) == value


@pytest.mark.parametrize("text", [b"", b"{", b"hello", b'{"a": }', b"\xff\xfe", b"<html>"])
def test_what_is_no_json_is_refused(text: bytes) -> None:
    with pytest.raises(json.JSONDecodeError):
        parse_json(text)


def test_levels_are_cut() -> None:
    for levels, kept in ((200, 200), (201, 200), (900, 200)):
        text = b"[" * levels + b"]" * levels
        value = parse_json(text)
        cut_deep_levels(text, value)
        data = orjson.dumps(value)
        assert data.count(b"[") == kept
        assert (b"null" in data) == (levels > kept)


def failure_of(status: int, body: Any, headers: dict[str, str] | None = None) -> Failure:
    raw = body if isinstance(body, bytes) else orjson.dumps(body)
    result = transport.read_completion(HTTPAnswer(status, headers or {}, raw), "node")
    assert isinstance(result, Failure)
    return result


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_row(row: tuple[str, int, Any, type[EndpointError], RetryAction, BreakerEffect]) -> None:
    _, status, body, kind, step, trip = row
    failure = failure_of(status, body)
    assert type(failure.error) is kind
    assert (failure.rule.action, failure.rule.breaker_effect) == (step, trip)
    assert failure.error.message.startswith("node: ")
    assert isinstance(failure.error.__cause__, HTTPAnswer)
    assert type(pickle.loads(pickle.dumps(failure.error))) is kind


@pytest.mark.parametrize(
    ("cause", "step", "trip", "free"),
    [
        (TimeoutError(), RetryAction.OTHER, BreakerEffect.COUNT, False),
        (aiohttp.ConnectionTimeoutError(), RetryAction.OTHER, BreakerEffect.OPEN, True),
        (aiohttp.ServerDisconnectedError(), RetryAction.OTHER, BreakerEffect.COUNT, False),
        (aiohttp.ClientOSError(104, "reset"), RetryAction.OTHER, BreakerEffect.COUNT, False),
        (aiohttp.ClientPayloadError("cut"), RetryAction.OTHER, BreakerEffect.COUNT, False),
    ],
)
def test_connection_row(cause: Any, step: RetryAction, trip: BreakerEffect, free: bool) -> None:
    failure = failures.classify_exception(cause, "node")
    assert type(failure.error) is EndpointLostError
    treatment = failure.rule
    assert (treatment.action, treatment.breaker_effect, treatment.free) == (step, trip, free)


@pytest.mark.parametrize(
    ("status", "said"),
    [
        (400, "The input (5000 tokens) is longer than the model's context length (4096 tokens)."),
        (400, "the request exceeds the available context size, try increasing it"),
        (400, "prompt is too long: 208310 tokens > 200000 maximum"),
        (400, "The input token count (1200000) exceeds the maximum number of tokens allowed"),
        (422, "Input validation error: `inputs` must have less than 1024 tokens. Given: 2000"),
    ],
)
def test_servers_say_in_their_own_words_that_a_prompt_is_too_long(status: int, said: str) -> None:
    failure = failure_of(status, vllm(said, status))
    assert type(failure.error) is PromptTooLongError
    assert failure.rule.action is RetryAction.FAIL


def test_a_limit_of_the_answer_is_no_prompt_that_is_too_long() -> None:
    """A shorter prompt would be refused for the same ``max_tokens``."""
    failure = failure_of(400, vllm("max_tokens must not exceed the context length of 4096", 400))
    assert type(failure.error) is RequestRefusedError


def test_pages_hint_at_a_proxy() -> None:
    assert "proxy" in failure_of(403, b" <html>denied</html>").error.message


def test_messages_are_short() -> None:
    assert len(failure_of(500, b"x" * 10_000).error.message) < 300


def test_a_503_that_names_a_time_is_waited_for() -> None:
    failure = failure_of(503, vllm("x", 503, "ServiceUnavailableError"), {"retry-after": "7"})
    assert failure.rule.action is RetryAction.WAIT
    assert failure.error.retry_after == 7.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"retry-after": "3"}, 3.0),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "soon"}, None),
        ({"retry-after-ms": "250", "retry-after": "9"}, 0.25),
        ({"retry-after": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0.0),
    ],
)
def test_retry_after(headers: dict[str, str], seconds: float | None) -> None:
    assert read_retry_after(headers) == seconds


def test_retry_after_as_a_date() -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(hours=1), usegmt=True)
    assert read_retry_after({"retry-after": date}) == pytest.approx(3600, abs=60)


@pytest.mark.parametrize("body", [b"", b"null", b"5", b'"text"', b'{"error":{}}', b"\xff\xfe"])
def test_any_body_can_be_read(body: bytes) -> None:
    assert isinstance(ErrorBody.parse(body).message, str)


def endpoint(n: int, answers: int = 1) -> Endpoint:
    one = Endpoint(EndpointSpec(f"http://n{n}:1"))
    one.stats.calls = answers
    return one


class FailingCall:
    """A call whose requests fail, with a clock of its own."""

    def __init__(self, policy: RetryPolicy) -> None:
        self.log, self._stop = AttemptLog(policy), make_stop(policy)

    def fail(self, one: Endpoint, failure: Failure, now: float = 1.0) -> float:
        """Return the pause after a failure ``now`` seconds after the first, or raise its error."""
        self.log.start_time = time.monotonic() - now
        self.log.record_failure(one, failure)
        if self._stop(self.log):
            raise failure.error
        return self.log.upcoming_sleep


def test_attempts_end_after_so_many_that_count() -> None:
    attempts = FailingCall(RetryPolicy(attempts=3))
    lost = failures.classify_exception(aiohttp.ClientPayloadError("cut"), "n")
    for n in range(2):
        assert attempts.fail(endpoint(n), lost) == 0.0
    with pytest.raises(EndpointLostError):
        attempts.fail(endpoint(3), lost)


def test_refusals_do_not_count_but_patience_ends() -> None:
    attempts = FailingCall(RetryPolicy(attempts=2, patience_s=10.0))
    busy = failure_of(429, vllm("slow", 429))
    one = endpoint(1)
    one.resting = True
    assert [attempts.fail(one, busy) for _ in range(6)] == [0.0] * 6
    assert not attempts.log.avoid
    with pytest.raises(EndpointBusyError):
        attempts.fail(one, busy, now=10.0)


def test_an_item_that_alone_is_refused_asks_less_and_less_often() -> None:
    attempts = FailingCall(RetryPolicy(backoff_s=1.0, backoff_max_s=3.0, jitter=0.0))
    busy, one = failure_of(429, vllm("slow", 429)), endpoint(1)
    pauses = [attempts.fail(one, busy) for _ in range(7)]
    assert pauses == [0.0, 0.0, 0.0, 1.0, 2.0, 3.0, 3.0]


def test_a_stale_connection_is_free_once() -> None:
    attempts = FailingCall(RetryPolicy(attempts=1))
    dropped = failures.classify_exception(aiohttp.ServerDisconnectedError(), "n")
    assert attempts.fail(endpoint(1), dropped) == 0.0
    assert not attempts.log.avoid
    with pytest.raises(EndpointLostError):
        attempts.fail(endpoint(1), dropped)


def test_the_same_server_error_on_three_endpoints_is_poison() -> None:
    attempts = FailingCall(RetryPolicy(attempts=9, poison_endpoints=3))
    boom, other = failure_of(500, vllm("boom", 500)), failure_of(500, first("other"))
    attempts.fail(endpoint(1), boom)
    attempts.fail(endpoint(2), boom)
    attempts.fail(endpoint(3), other)
    attempts.fail(endpoint(4, answers=0), boom)
    with pytest.raises(EndpointError, match="boom"):
        attempts.fail(endpoint(5), boom)


def test_a_gateway_that_waited_in_vain_is_asked_twice_only() -> None:
    attempts = FailingCall(RetryPolicy(attempts=9))
    late = failure_of(408, first("request_timeout"))
    attempts.fail(endpoint(1), late)
    with pytest.raises(EndpointLostError):
        attempts.fail(endpoint(2), late)


def test_a_process_without_descriptors_stops_and_says_so() -> None:
    key: Any = None
    cause = aiohttp.ClientConnectorError(key, OSError(errno.EMFILE, "Too many open files"))
    failure = failures.classify_exception(cause, "node")
    assert (failure.rule.action, failure.rule.breaker_effect) == (
        RetryAction.STOP,
        BreakerEffect.NO,
    )
    assert "limits.streams" in failure.error.message


def asking(text: str, most: int = 5000) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": text}], "max_completion_tokens": most}


def learn(one: Endpoint, failure: Failure, body: Any) -> Failure:
    return request.learn_max_tokens(
        one, failure, body, request.resolve_max_tokens(body, one.max_answer_tokens)
    )


def too_long(message: str) -> Failure:
    return failure_of(400, vllm(message, 400, param="max_completion_tokens"))


@pytest.mark.parametrize(
    ("message", "known", "most"),
    [
        ("max_tokens=5000 cannot be greater than max_model_len=2048.", None, 2048),
        ("max_tokens is too large: 5000. This model supports at most 4096 tokens.", None, 4096),
        ("The model mini-2024-07-18 supports at most 1024 completion tokens.", None, 1024),
        ("model v3.5-1000 takes 512, not 5000", None, 512),
        ("too large", 1000, None),
        ("too large", None, None),
        ("5000 is above 9000", None, None),
        ("at most 1000 tokens", 1000, None),
    ],
)
def test_what_an_endpoint_says_of_answers_holds_for_the_request(
    message: str, known: int | None, most: int | None
) -> None:
    one = endpoint(1)
    one.max_answer_tokens = known
    failure = learn(one, too_long(message), asking("a"))
    assert failure.max_answer_tokens == most
    assert one.max_answer_tokens == known
    assert failure.rule.action is (RetryAction.FAIL if most is None else RetryAction.SAME)


def test_the_longest_answer_is_learned_from_two_requests() -> None:
    one, said = endpoint(1), too_long("at most 2048")
    for text in ("a", "a"):
        learn(one, said, asking(text))
        assert one.max_answer_tokens is None
    learn(one, too_long("at most 2000"), asking("b"))
    assert one.max_answer_tokens is None
    learn(one, said, asking("b"))
    assert one.max_answer_tokens == 2048


def test_what_was_accepted_is_not_forbidden_later() -> None:
    one, said = endpoint(1), too_long("only 40 tokens are left")
    one.longest = 256
    for text in ("a", "b", "c"):
        assert learn(one, said, asking(text, 256)).max_answer_tokens == 40
    assert one.max_answer_tokens is None


def test_corrections_do_not_count_and_end_after_three() -> None:
    one, attempts = endpoint(1), FailingCall(RetryPolicy(attempts=1))
    asked: Any = asking("a")
    for most in (4000, 3000, 2000):
        failure = learn(one, too_long(f"at most {most}"), asked)
        assert attempts.fail(one, failure) == 0.0
        asked = attempts.log.adapt_body(one, asking("a"))
        assert request.read_max_tokens(asked) == most
        assert attempts.log.adapt_body(endpoint(2), asking("a")) == asking("a")
    with pytest.raises(RequestRefusedError):
        attempts.fail(one, learn(one, too_long("at most 1000"), asked))


def test_a_long_prompt_passes_over_all_that_are_too_short() -> None:
    members = [
        Endpoint(EndpointSpec(f"http://n{n}:1", max_model_len=room_))
        for n, room_ in enumerate((10, 10, None, 99))
    ]
    long = failure_of(400, vllm(LONG, 400))
    failure, short = request.redirect_long_prompt(members[0], long, members)
    assert failure.rule.action is RetryAction.OTHER
    assert short == set(members[:3])
    failure, short = request.redirect_long_prompt(members[3], long, members)
    assert (failure.rule.action, short) == (RetryAction.FAIL, frozenset())


SENT = {"Authorization": "Bearer sk-se/cr+et=1"}


@pytest.mark.parametrize("status", [200, 400, 401, 404, 429, 500, 503])
@pytest.mark.parametrize(
    "body",
    [
        b'{"error": {"message": "Incorrect API key provided: Bearer sk-se/cr+et=1"}}',
        b'{"error": {"message": "no", "code": "sk-se/cr+et=1"}}',
        b'{"error": "sk-se\\/cr+et=1"}',
        b'{"detail": [{"input": "\\u0073k-se/cr+et=1"}]}',
        b"<html>sk-se/cr+et=1</html>",
        b"key=sk-se%2Fcr%2Bet%3D1",
        b"x" * 185 + b" sk-se/cr+et=1",
    ],
)
def test_the_key_of_the_request_is_not_quoted(status: int, body: bytes) -> None:
    failure = transport.read_completion(HTTPAnswer(status, {}, body, SENT), "node")
    assert isinstance(failure, Failure)
    cause = failure.error.__cause__
    assert isinstance(cause, HTTPAnswer)
    for text in (str(failure.error), repr(failure.error), str(cause), cause.body.decode()):
        assert "se/cr" not in text
        assert "cr%2Bet" not in text
    assert MASKED in cause.body.decode()


def test_a_broken_answer_does_not_show_the_key() -> None:
    cause = aiohttp.ClientPayloadError("invalid header b'X: sk-se/cr+et=1'")
    failure = failures.classify_exception(cause, "node", SENT)
    assert "sk-se" not in str(failure.error)
    assert failure.error.__cause__ is None


def test_answers_and_short_keys_are_left_alone() -> None:
    good = b'{"choices": [{"message": {"content": "sk-se/cr+et=1"}}]}'
    answer = transport.read_completion(HTTPAnswer(200, {}, good, SENT), "node")
    assert isinstance(answer, dict)
    assert answer["choices"][0]["message"]["content"] == "sk-se/cr+et=1"
    none = HTTPAnswer(400, {}, b"EMPTY", {"Authorization": "Bearer EMPTY"})
    assert none.mask_keys().body == b"EMPTY"
