"""Check whether a reply is an answer: finish reason, JSON, schema."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

import jsonschema_rs
import orjson

from ...backends.core.errors import (
    AnswerError,
    EmptyAnswerError,
    InvalidAnswerError,
    RefusedAnswerError,
    TruncatedAnswerError,
)
from ...backends.core.parsing import strip_fence
from ...backends.core.schemas import open_validator
from ...backends.core.types import Json
from ...backends.core.values import MAX_DEPTH, is_too_deep, to_json_text

_GOOD: Final = frozenset({"stop", "tool_calls"})
_SHOWN_ERRORS: Final = 3
_SHOWN_TEXT: Final = 200


class AnswerCheck:
    """Check of replies against a JSON Schema; without one, their text is the answer.

    Args:
        schema: The schema, or None for free text.
        max_tokens: The limit on the length of answers, for messages.
    """

    def __init__(self, schema: Mapping[str, Any] | None, max_tokens: int) -> None:
        self._validator = None if schema is None else open_validator(schema)
        self._max_tokens = max_tokens

    def check_finish(self, content: str, finish_reason: str | None, refusal: str | None) -> str:
        """Return the text of a reply, if the model ended it regularly.

        Raises:
            RefusedAnswerError: The model or a filter refused.
            TruncatedAnswerError: Cut at ``max_tokens`` or at the end of the context.
            EmptyAnswerError: No text.
            AnswerError: Any other end, e.g. the server's repetition check.
        """
        if refusal:
            text = f"the model refused: {refusal[:_SHOWN_TEXT]}"
            raise RefusedAnswerError(text, content or refusal)
        if finish_reason == "content_filter":
            raise RefusedAnswerError("a content filter withheld the answer", content)
        if finish_reason == "length":
            msg = f"the answer was cut (model.max_tokens is {self._max_tokens}); raise it"
            raise TruncatedAnswerError(msg, content)
        if finish_reason not in _GOOD:
            raise AnswerError(f"the model stopped for the reason {finish_reason!r}", content)
        if not content.strip():
            msg = "the answer is empty (a reasoning model may need a larger model.max_tokens)"
            raise EmptyAnswerError(msg, content)
        return content

    def check_value(self, value: Json) -> Json:
        """Return the answer in a text or a parsed value.

        Raises:
            InvalidAnswerError: It is not JSON or does not fit the schema; names the place.
        """
        if self._validator is None:
            return value
        parsed = _parse(value) if isinstance(value, str) else value
        if not self._validator.is_valid(parsed):
            raise InvalidAnswerError(self._reasons(parsed), answer_text(value))
        return parsed

    def _reasons(self, parsed: Json) -> str:
        assert self._validator is not None
        reasons = [_reason(e) for e in self._validator.iter_errors(parsed)]
        more = f"; and {len(reasons) - _SHOWN_ERRORS} more" if len(reasons) > _SHOWN_ERRORS else ""
        return "the answer breaks the schema: " + "; ".join(reasons[:_SHOWN_ERRORS]) + more


def _reason(error: jsonschema_rs.ValidationError) -> str:
    where = ".".join(map(str, error.instance_path))
    text = error.message if len(error.message) <= _SHOWN_TEXT else error.message[:_SHOWN_TEXT] + "…"
    return f"{where}: {text}" if where else text


def answer_text(value: Json) -> str:
    """Return an answer as text; a parsed value as JSON."""
    return value if isinstance(value, str) else to_json_text(value)


def _parse(text: str) -> Json:
    try:
        parsed: Json = orjson.loads(strip_fence(text))
    except orjson.JSONDecodeError as error:
        msg = f"the answer is not valid JSON: {error}"
        raise InvalidAnswerError(msg, text) from None
    if is_too_deep(text, parsed):
        msg = f"the answer has more than {MAX_DEPTH} levels of lists and objects"
        raise InvalidAnswerError(msg, text)
    return parsed
