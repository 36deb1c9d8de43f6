"""Arrow columns of Python values, made without pandas.

``pa.array`` and ``pa.scalar`` import pandas where it is installed: half a second and 28 MB.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Mapping, Sequence
from itertools import accumulate, chain
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

_NUMBERS: Final[Mapping[pa.DataType, Literal["i", "q", "d"]]] = {
    pa.int32(): "i",
    pa.int64(): "q",
    pa.float64(): "d",
}
"""Types of numbers, with their codes in ``array`` and NumPy."""


def make_column(values: Sequence[Any], kind: pa.DataType) -> pa.Array[Any]:
    """Return a column. Types that only tables of users have are left to ``pa.array``.

    Args:
        values: Values that fit the type; None is null.
        kind: The type.

    Raises:
        TypeError: A value does not fit the type.
        OverflowError: A number does not fit the type.
    """
    size = len(values)
    empty = values.count(None)
    if empty == size:
        nulls: Any = pa.nulls  # its declaration lists the types one by one
        made: pa.Array[Any] = nulls(size, kind)
        return made
    valid = _pack_bits([value is not None for value in values]) if empty else None
    if kind in _NUMBERS:
        numbers = [0 if value is None else value for value in values] if empty else values
        buffers = [valid, pa.py_buffer(array(_NUMBERS[kind], numbers))]
    elif kind == pa.string():
        buffers = [valid, *_join_texts([value or "" for value in values] if empty else values)]
    elif kind == pa.binary():
        parts = [value or b"" for value in values]
        buffers = [valid, _make_ends(parts), pa.py_buffer(b"".join(parts))]
    elif kind == pa.bool_():
        buffers = [valid, _pack_bits(values)]
    elif pa.types.is_struct(kind):
        present = [value or {} for value in values]
        fields = [make_column([one.get(part.name) for one in present], part.type) for part in kind]
        return pa.Array.from_buffers(kind, size, [valid], children=fields)
    elif pa.types.is_list(kind):
        lists = [value or () for value in values]
        elements = make_column(list(chain.from_iterable(lists)), kind.field(0).type)
        return pa.Array.from_buffers(kind, size, [valid, _make_ends(lists)], children=[elements])
    else:
        return pa.array(values, kind)
    return pa.Array.from_buffers(kind, size, buffers)


def make_scalar(value: Any, kind: pa.DataType) -> Any:
    """Return a value as Arrow has it."""
    return make_column([value], kind)[0]


def read_numbers(column: pa.Array[Any]) -> npt.NDArray[Any]:
    """Return a column of numbers without nulls as an array of NumPy; not a copy."""
    buffer: Any = column.buffers()[1]
    values: npt.NDArray[Any] = np.frombuffer(buffer, _NUMBERS[column.type])
    return values[column.offset : column.offset + len(column)]


def write_numbers(values: npt.NDArray[Any], kind: pa.DataType) -> pa.Array[Any]:
    """Return an array of NumPy as a column of numbers."""
    buffers = [None, pa.py_buffer(values.astype(_NUMBERS[kind], copy=False).tobytes())]
    return pa.Array.from_buffers(kind, len(values), buffers)


def _join_texts(texts: Sequence[str]) -> tuple[pa.Buffer, pa.Buffer]:
    """Return the ends of texts, and all of them as UTF-8."""
    joined = "".join(texts)
    if joined.isascii():
        return _make_ends(texts), pa.py_buffer(joined.encode())
    parts = [text.encode() for text in texts]
    return _make_ends(parts), pa.py_buffer(b"".join(parts))


def _make_ends(parts: Sequence[Any]) -> pa.Buffer:
    """Return a zero, and where each part ends if they follow each other."""
    ends = accumulate(map(len, parts), initial=0)
    return pa.py_buffer(struct.pack(f"{len(parts) + 1}i", *ends))


def _pack_bits(values: Sequence[Any]) -> pa.Buffer:
    """Return truth values as bits, the first one lowest."""
    bits = int("".join(["1" if value else "0" for value in values])[::-1], 2)
    return pa.py_buffer(bits.to_bytes(-(-len(values) // 8), "little"))
