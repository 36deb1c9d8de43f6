"""Validators of JSON Schemas that never fetch anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jsonschema_rs


def open_validator(schema: Any, *, formats: bool = False) -> jsonschema_rs.Validator:
    """Return a validator for a self-contained schema.

    By default the library fetches what ``$schema``, ``$ref`` and ``$id`` name, over HTTP and from
    files; a schema may come from an untrusted source.

    Args:
        schema: The schema.
        formats: Whether ``format`` is checked.

    Raises:
        ValueError: The schema is invalid, or refers to something outside itself.
    """
    whole = dict(schema) if isinstance(schema, Mapping) else schema
    if formats:
        return jsonschema_rs.validator_for(whole, validate_formats=True, retriever=_refuse)
    return jsonschema_rs.validator_for(whole, retriever=_refuse)


def _refuse(uri: str) -> None:
    msg = f"{uri} is not part of the schema; copy it below $defs and refer to it as #/$defs/NAME"
    raise ValueError(msg)
