"""The classifier of refusals: a field that all requests share, or the item's own content."""

from __future__ import annotations

from typing import Any

import orjson
import pytest

from fanfold.backends.fleet import failures
from fanfold.backends.fleet.failures import Failure, HTTPAnswer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "minLength": 2}, "n": {"uniqueItems": True}},
    "required": ["name"],
}
BODY: dict[str, Any] = {
    "model": "m",
    "temperature": 0.0,
    "max_completion_tokens": 2048,
    "seed": 3,
    "top_k": 5,
    "stop": ["x"],
    "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}},
    "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}],
}
OLD = {k: v for k, v in BODY.items() if k != "max_completion_tokens"} | {"max_tokens": 2048}


def error(message: Any, **fields: Any) -> dict[str, Any]:
    return {"error": {"message": message, "type": "invalid_request_error", **fields}}


def detail(
    *loc: Any, kind: str = "extra_forbidden", text: str = "Extra inputs are not permitted"
) -> Any:
    return {"detail": [{"type": kind, "loc": list(loc), "msg": text, "input": "temperature"}]}


def classify(status: int, document: Any, body: dict[str, Any]) -> Failure:
    raw = document if isinstance(document, bytes) else orjson.dumps(document)
    failure = failures.classify_answer(HTTPAnswer(status, {}, raw), "node")
    return failures.classify_refused_field(failure, body)


TEMPERATURE, LENGTH, OLD_LENGTH = (
    "model.temperature: null",
    "model.max_tokens_field: max_tokens",
    "model.max_tokens_field: max_completion_tokens",
)
FORMAT, ROLE = "task.schema", "model.system_role"


@pytest.mark.parametrize(
    ("status", "document", "advice"),
    [
        (
            400,
            error("Unsupported value: 'temperature' does not support 0.", param="temperature"),
            TEMPERATURE,
        ),
        (400, error("TEMPERATURE is not supported with this model"), TEMPERATURE),
        (400, error("Temperature has to equal 1", param="temperature"), TEMPERATURE),
        (400, error("`temperature` is deprecated for this model."), TEMPERATURE),
        (422, detail("body", "temperature"), TEMPERATURE),
        (400, b"Unsupported parameter: temperature", TEMPERATURE),
        (501, {"error": "Parameter temperature not implemented"}, TEMPERATURE),
        (422, {"object": "error", "message": detail("body", "max_completion_tokens")}, LENGTH),
        (422, detail("body", "max_completion_tokens"), LENGTH),
        (400, error("Unrecognized request argument supplied: Max_Completion_Tokens"), LENGTH),
        (
            400,
            {"message": "[{'type': 'extra_forbidden', 'loc': ('body', 'max_completion_tokens')}]"},
            LENGTH,
        ),
        (400, error("Unsupported parameter: 'seed'"), "model.seed: null"),
        (400, error("Unknown parameter: seed."), "model.seed: null"),
        (400, error("Unrecognized request argument supplied: top_k"), "remove top_k"),
        (400, error("'stop' is not supported with this model."), "remove stop"),
        (400, error("x", param="response_format"), FORMAT),
        (400, error("This model does not support Response_Format"), FORMAT),
        (400, error("Invalid schema for response_format 'a': bad"), FORMAT),
        (400, error("Grammar error: unimplemented keys"), FORMAT),
        (400, error("keyword uniqueItems is not supported"), FORMAT),
        (400, error("'MinLength' is not permitted"), FORMAT),
        (400, error("Unsupported JSON Schema keyword"), FORMAT),
        (400, error("System role not supported"), ROLE),
        (
            400,
            error(
                "Unsupported value: 'messages[0].role' does not support 'system'.",
                param="messages[0].role",
            ),
            ROLE,
        ),
        (400, error("Conversation roles must alternate user/assistant/user/assistant/..."), ROLE),
    ],
    ids=str,
)
def test_a_field_of_all_requests_names_its_setting(status: int, document: Any, advice: str) -> None:
    failure = classify(status, document, BODY)
    assert failure.rule.constant
    assert failure.error.message.endswith(")")
    assert advice in failure.error.message


@pytest.mark.parametrize(
    "message",
    [
        "Unsupported parameter: 'max_tokens' is not supported with this model. Use "
        "'max_completion_tokens' instead.",
        "max_tokens: Extra inputs are not permitted",
        "Unrecognized request argument supplied: MAX_TOKENS",
    ],
)
def test_the_other_field_of_the_length(message: str) -> None:
    assert OLD_LENGTH in classify(400, error(message), OLD).error.message


@pytest.mark.parametrize(
    ("status", "document"),
    [
        (403, error("Input was flagged by moderation: temperature is not allowed")),
        (404, error("No endpoints found that can process this input")),
        (400, error("Input was flagged by moderation")),
        (400, error("Invalid prompt: it is about the temperature of fusion")),
        (400, error("Invalid image. The stop sign cannot be read")),
        (
            400,
            error(
                "max_completion_tokens is too large: 2048. At most 1024",
                param="max_completion_tokens",
            ),
        ),
        (400, error("max_completion_tokens 2048 is not supported; only 40 are left")),
        (400, error("maximum context length is 9; temperature not supported")),
        (400, error("frequency_penalty is not supported")),
        (400, error("property 'name' is invalid")),
        (422, detail("body", "messages", 1, "content", kind="string_type", text="invalid string")),
        (422, {"detail": "bad", "body": {"temperature": "not supported"}}),
        (429, error("temperature is not supported")),
        (500, error("temperature is not supported")),
        (400, b"<html>temperature</html>"),
        (400, b""),
        (400, [1, [None, {"a": [{}]}]]),
    ],
    ids=str,
)
def test_other_refusals_stay_as_they_are(status: int, document: Any) -> None:
    raw = document if isinstance(document, bytes) else orjson.dumps(document)
    failure = failures.classify_answer(HTTPAnswer(status, {}, raw), "node")
    assert failures.classify_refused_field(failure, BODY) is failure


def test_only_fields_that_were_sent_count() -> None:
    body = {"model": "m", "messages": [{"role": "user", "content": "u"}]}
    for message in ("temperature is not supported", "System role not supported", "schema: invalid"):
        assert not classify(400, error(message), body).rule.constant
