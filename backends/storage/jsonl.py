"""Results as JSON lines."""

from __future__ import annotations

from collections.abc import Iterable
from typing import IO

import orjson

from .columns import RESULT_COLUMNS, Record
from .guard import name_of, refusals


def write_jsonl(records: Iterable[Record], stream: IO[bytes]) -> int:
    """Write one JSON object per line, in UTF-8, ``output`` as the model gave it.

    Args:
        records: Rows, see :func:`rows`, in the order of the lines.
        stream: Where to write; it stays open.

    Returns:
        Lines written.

    Raises:
        LedgerError: The stream cannot be written.
    """
    target = name_of(stream)
    lines = 0
    for record in records:
        row = {name: record.get(name) for name in RESULT_COLUMNS}
        with refusals(target):
            stream.write(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE))
        lines += 1
    with refusals(target):
        stream.flush()
    return lines
