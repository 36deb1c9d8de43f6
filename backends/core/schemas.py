"""Validators of JSON Schemas that never fetch anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema_rs


def open_validator(schema: Any, *, formats: bool = False) -> jsonschema_rs.Validator:
    """Return a validator for a schema that stands alone.

    The library by itself fetches what ``$schema``, ``$ref`` and ``$id`` name, over HTTP and from
    files; a schema may come from somebody else.

    Args:
        schema: The schema.
        formats: Whether ``format`` is checked.

    Raises:
        ValueError: It is no valid schema, or refers to something that is not part of it.
    """
    whole = dict(schema) if isinstance(schema, Mapping) else schema
    if formats:
        return jsonschema_rs.validator_for(whole, validate_formats=True, retriever=_refuse)
    return jsonschema_rs.validator_for(whole, retriever=_refuse)


def _refuse(uri: str) -> None:
    msg = f"{uri} is not part of the schema; copy it below $defs and refer to it as #/$defs/NAME"
    raise ValueError(msg)
