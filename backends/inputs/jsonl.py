"""Rows of JSON Lines files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import orjson

from ..core.errors import InputError
from ..core.types import Row
from .lines import decode, numbered

_SHOWN: Final = 60


def read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    """Read a file with one JSON object a line; empty lines are skipped.

    Args:
        path: The file.

    Yields:
        The line's number (from 1), and the row.

    Raises:
        InputError: The file cannot be read or is no text, or a line is no JSON object.
    """
    for number, raw in numbered(path):
        if not raw or raw.isspace():
            continue
        try:
            row = orjson.loads(raw)
        except orjson.JSONDecodeError as error:
            raise _broken(path, number, raw, error) from error
        if type(row) is not dict:
            raise InputError(
                f"{path}, line {number}: the row is no JSON object but {_kind(row)}"
                f"{_array_hint(path, raw)}"
            )
        yield number, row


def _broken(path: Path, number: int, raw: bytes, error: orjson.JSONDecodeError) -> InputError:
    text = decode(path, number, raw)
    start = max(0, error.pos - _SHOWN // 2)
    hint = "; NaN is no JSON, write null" if "NaN" in text else _array_hint(path, raw)
    return InputError(
        f"{path}, line {number}: the row is no JSON: {error.msg} at character {error.pos + 1}, "
        f"near {text[start : start + _SHOWN]!r}{hint}"
    )


def _array_hint(path: Path, raw: bytes) -> str:
    if not raw.lstrip().startswith(b"["):
        return "; each line must be one object, {...}"
    return f"; of one array make one object a line with: jq -c '.[]' '{path}'"


def _kind(value: object) -> str:
    kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
    return kinds.get(type(value), "a number")
