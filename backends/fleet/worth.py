"""Which requests may share an answer, and which answers are good enough to be kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import jsonschema_rs
import orjson

from ..core.parsing import unfenced
from ..core.schemas import open_validator
from ..core.types import Json
from . import judge

_SCHEMAS: Final = 64


class Worth:
    """Judges requests and answers by what stands in them.

    Args:
        sampled: Whether requests at a temperature above 0 may share an answer, too.
    """

    def __init__(self, sampled: bool) -> None:
        self._sampled = sampled
        self._validators: dict[bytes, jsonschema_rs.Validator | None] = {}

    def may_share(self, body: Mapping[str, Any]) -> bool:
        """Say whether a request's answer may be given to equal ones."""
        return self._sampled or body.get("temperature") == 0

    def is_good(self, body: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
        """Say whether an answer is whole, no refusal, and what its request asks for."""
        wanted = body.get("response_format")
        return not judge.is_empty(document) and all(
            _is_whole(choice) and self._fits(wanted, choice["message"])
            for choice in document["choices"]
        )

    def _fits(self, wanted: Json, message: Mapping[str, Any]) -> bool:
        kind = wanted.get("type") if isinstance(wanted, dict) else None
        if kind not in ("json_schema", "json_object") or not message.get("content"):
            return True
        try:
            value = orjson.loads(unfenced(message["content"]))
        except orjson.JSONDecodeError:
            return False
        if kind == "json_object":
            return True
        validator = self._validator((wanted.get("json_schema") or {}).get("schema"))
        return validator is not None and validator.is_valid(value)

    def _validator(self, schema: Json) -> jsonschema_rs.Validator | None:
        """Return what checks answers against a schema, or None when nothing can."""
        name = orjson.dumps(schema)
        if name not in self._validators:
            if len(self._validators) >= _SCHEMAS:
                self._validators.clear()
            self._validators[name] = _validator_of(schema)
        return self._validators[name]


def _validator_of(schema: Json) -> jsonschema_rs.Validator | None:
    try:
        return open_validator(schema)
    except ValueError:
        return None


def _is_whole(choice: Json) -> bool:
    """Say whether the model ended a choice by itself, and did not refuse."""
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict) or message.get("refusal"):
        return False
    reason = choice.get("finish_reason")
    if reason == "tool_calls":
        return all(map(_is_callable, message.get("tool_calls") or [None]))
    return bool(reason == "stop")


def _is_callable(call: Json) -> bool:
    """Say whether a tool can be called: it is named, and its arguments are an object."""
    try:
        function = call["function"]
        return bool(function["name"]) and isinstance(orjson.loads(function["arguments"]), dict)
    except (TypeError, KeyError, orjson.JSONDecodeError):
        return False
