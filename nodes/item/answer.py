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
from ...backends.core.parsing import classify_finish, is_unfinished_reasoning, parse_answer
from ...backends.core.schemas import open_validator
from ...backends.core.types import Json
from ...backends.core.values import MAX_DEPTH, is_too_deep, to_json_text

_SHOWN_ERRORS: Final = 3
_SHOWN_TEXT: Final = 200
_TOO_DEEP: Final = f"the answer has more than {MAX_DEPTH} levels of lists and objects"


class AnswerCheck:
    """Check of replies against a JSON Schema; without one, their text is the answer.

    Args:
        schema: The schema, or None for free text.
        max_tokens: The limit on the length of answers, for messages.
    """

    def __init__(self, schema: Mapping[str, Any] | None, max_tokens: int) -> None:
        self._validator = None if schema is None else open_validator(schema)
        self._max_tokens = max_tokens

    def check_finish(
        self, content: str, reply: Mapping[str, Any], *, has_reasoning: bool = False
    ) -> str:
        """Return the text of a reply, unless it was refused, cut or is empty.

        A missing or unknown finish reason is ignored.

        Args:
            content: The text without its reasoning.
            reply: The reply, as in an item's state.
            has_reasoning: Whether there is reasoning before the text.

        Raises:
            RefusedAnswerError: The model or a filter refused.
            TruncatedAnswerError: Cut at ``max_tokens`` or at the end of the context.
            EmptyAnswerError: No text.
            AnswerError: The server's repetition check ended a free text.
        """
        if refusal := reply["refusal"]:
            text = f"the model refused: {refusal[:_SHOWN_TEXT]}"
            raise RefusedAnswerError(text, content or refusal)
        if reply["finish_reason"] != "stop":
            is_thought = has_reasoning and not content.strip()
            is_thought = is_thought or is_unfinished_reasoning(content)
            self._check_reason(content, reply, only_reasoning=is_thought)
        if not content.strip():
            msg = "the answer is empty (a reasoning model may need a larger model.max_tokens)"
            raise EmptyAnswerError(msg, content)
        return content

    def _check_reason(
        self, content: str, reply: Mapping[str, Any], *, only_reasoning: bool
    ) -> None:
        stop = classify_finish(reply["finish_reason"])
        if stop == "withheld":
            raise RefusedAnswerError("a content filter withheld the answer", content)
        if stop == "cut":
            error = TruncatedAnswerError(self._explain_cut(reply, only_reasoning), content)
            error.is_context_full = self._is_context_full(reply)
            raise error
        if stop == "looped" and self._validator is None:
            msg = f"the model stopped for the reason {reply['finish_reason']!r}"
            raise AnswerError(msg, content)

    def _explain_cut(self, reply: Mapping[str, Any], only_reasoning: bool) -> str:
        """Return why an answer was cut: by the limit that was sent, or by a full context."""
        limit = self._explain_limit(reply)
        return f"all tokens went into the model's reasoning: {limit}" if only_reasoning else limit

    def _is_context_full(self, reply: Mapping[str, Any]) -> bool:
        """Return True if an answer was cut before the limit that was sent."""
        used = reply.get("completion_tokens")
        return used is not None and used < (reply.get("max_tokens") or self._max_tokens)

    def _explain_limit(self, reply: Mapping[str, Any]) -> str:
        used, sent = reply.get("completion_tokens"), reply.get("max_tokens") or self._max_tokens
        if self._is_context_full(reply):
            return (
                f"the answer was cut after {used} of the {sent} tokens that were requested: the "
                "context of the model is full; shorten the item, or serve the model with a longer "
                "context"
            )
        if sent < self._max_tokens:
            return (
                f"the answer was cut at {sent} tokens, the most that the endpoint accepts "
                f"(model.max_tokens is {self._max_tokens}); shorten the item or the answer"
            )
        return (
            f"the answer was cut at {sent} tokens (model.max_tokens); raise it, and extend the run "
            "(fanfold run --from)"
        )

    def check_value(self, value: Json) -> Json:
        """Return the answer in a text or a parsed value.

        Raises:
            InvalidAnswerError: It is not JSON or does not fit the schema; names the place.
        """
        if self._validator is None:
            return value
        if isinstance(value, str):
            try:
                parsed: Json = orjson.loads(value)
            except orjson.JSONDecodeError:
                return self._check_loose_text(value)
            _check_depth(value, parsed)
        else:
            parsed = value
        if not self._validator.is_valid(parsed):
            raise InvalidAnswerError(self._reasons(parsed), answer_text(value))
        return parsed

    def _check_loose_text(self, text: str) -> Json:
        """Return the answer in a text that is not JSON as a whole."""
        assert self._validator is not None
        try:
            values = list(parse_answer(text))
        except RecursionError:
            raise InvalidAnswerError(_TOO_DEEP, text) from None
        except ValueError as error:
            raise InvalidAnswerError(f"the answer is not valid JSON: {error}", text) from None
        for value in values:
            _check_depth(text, value)
            if self._validator.is_valid(value):
                return value
        raise InvalidAnswerError(self._reasons(values[0]), text)

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


def _check_depth(text: str, parsed: Json) -> None:
    if is_too_deep(text, parsed):
        raise InvalidAnswerError(_TOO_DEEP, text)
