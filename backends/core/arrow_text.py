"""Arrow types whose values are text in a row: times, dates and decimals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final

import pyarrow as pa

from .arrow_columns import make_column
from .types import Json

_PARSED: Final[tuple[Callable[[pa.DataType], bool], ...]] = (
    pa.types.is_timestamp,
    pa.types.is_date,
    pa.types.is_time,
    pa.types.is_decimal,
)


def is_read_as_text(kind: pa.DataType) -> bool:
    """Return True if rows contain values of a type as text: times, dates and decimals."""
    return any(test(kind) for test in _PARSED)


def parse_texts(texts: Sequence[Json], kind: pa.DataType) -> pa.Array[Any]:
    """Return texts of a row as values of the type that they were read from.

    Raises:
        ArrowInvalid: A text is none.
    """
    array = make_column(texts, pa.string())
    if pa.types.is_time(kind):  # Arrow parses a time only behind a date
        dated = [None if text is None else f"1970-01-01 {text}" for text in texts]
        return make_column(dated, pa.string()).cast(pa.timestamp(kind.unit)).cast(kind)
    return array.cast(kind)
