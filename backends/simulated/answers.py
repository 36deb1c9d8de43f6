"""Schemas made ready to answer: checked once, walked for every question."""

from __future__ import annotations

from typing import Any, Final

import orjson

from ..core.schemas import open_validator
from .dice import Dice, digest
from .errors import ApiError
from .json_schema import Walker
from .keywords import PARAM, check_keywords

_TRIES: Final = 20


class AnswerSchema:
    """A JSON Schema that the fleet can answer to.

    What the walker draws is validated; a draw that fails (two branches of a ``oneOf`` that both
    match, say) is drawn again, and a schema that no draw satisfies is refused.

    Args:
        schema: A JSON Schema.

    Raises:
        ApiError: 400: no JSON Schema, or one with a keyword that is not supported.
    """

    def __init__(self, schema: Any) -> None:
        try:
            self._validator = open_validator(schema, formats=True)
        except ValueError as why:  # all errors of jsonschema-rs are ValueErrors
            raise ApiError(f"Invalid JSON schema: {why}", param=PARAM) from why
        check_keywords(schema)
        self.schema = schema

    def accepts(self, value: Any) -> bool:
        """Tell whether a value conforms.

        Args:
            value: Any JSON value.

        Returns:
            Whether it validates, formats included.
        """
        return self._validator.is_valid(value)

    def draw(self, key: bytes) -> Any:
        """Draw a conforming value.

        Args:
            key: Equal keys give equal values.

        Returns:
            The value.

        Raises:
            ApiError: The schema allows no value that the walker finds.
        """
        for attempt in range(_TRIES):
            value = Walker(self.schema, Dice(digest(key, attempt))).value(self.schema)
            if self._validator.is_valid(value):
                return value
        raise ApiError("No answer that conforms to the JSON schema was found.", param=PARAM)

    def broken(self, key: bytes) -> Any:
        """Draw a value that does not conform, as a model that ignores its instructions.

        Args:
            key: Equal keys give equal values.

        Returns:
            The conforming value less one field where that breaks the schema, else an
            entirely different one.

        Raises:
            ApiError: The schema accepts everything.
        """
        value = self.draw(key)
        less = (
            [{k: v for k, v in value.items() if k != name} for name in value]
            if (isinstance(value, dict))
            else []
        )
        for wrong in [*less, {"answer": None}, "not what was asked", None, [None], 0.5]:
            if not self._validator.is_valid(wrong):
                return wrong
        raise ApiError("The JSON schema accepts everything; no answer breaks it.", param=PARAM)


class SchemaCache:
    """Schemas by their text: a run asks for the same one again and again.

    Args:
        size: How many to keep.
    """

    def __init__(self, size: int = 256) -> None:
        self._size = size
        self._ready: dict[bytes, AnswerSchema] = {}

    def get(self, schema: Any) -> AnswerSchema:
        """Return the schema, made ready.

        Args:
            schema: A JSON Schema.

        Returns:
            The schema; the same object for the same text.

        Raises:
            ApiError: As `AnswerSchema`.
        """
        text = orjson.dumps(schema)
        found = self._ready.get(text)
        if found is None:
            if len(self._ready) >= self._size:
                del self._ready[next(iter(self._ready))]
            found = self._ready[text] = AnswerSchema(schema)
        return found
