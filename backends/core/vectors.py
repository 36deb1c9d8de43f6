"""Vectors of texts: read from answers of servers, and packed as halves (float16) of unit length."""

from __future__ import annotations

import base64
import binascii
import math
import struct
from collections.abc import Mapping, Sequence
from typing import Any, Final

from .errors import InvalidAnswerError
from .types import Json

EMBEDDINGS_URL: Final = "/v1/embeddings"
KEEP_FIELD: Final = "fanfold:keep"
"""Column of a request of fanfold's own that names what is kept of its answer."""
KEEP_VECTOR: Final = "vector"
"""Value of `KEEP_FIELD`: only the vector of the first text, packed."""
_MOST_DIMENSIONS: Final = 65_536


def pack_answer(document: Mapping[str, Any]) -> str:
    """Return the vector in an answer to a request for the embedding of one text, packed.

    Args:
        document: The answer of a server, with the vector as a list of numbers or as base64 of
            float32 (little-endian).

    Raises:
        InvalidAnswerError: It has no vector, or one that is no direction: empty, zero, infinite.
    """
    found = document.get("data")
    first = found[0] if isinstance(found, list) and found else None
    given = first.get("embedding") if isinstance(first, Mapping) else None
    numbers = _read_numbers(given)
    if numbers is None or not 0 < len(numbers) <= _MOST_DIMENSIONS:
        raise InvalidAnswerError(
            f"the answer has no vector in data[0].embedding (found {type(given).__name__}); check "
            "that the model is one for embeddings"
        )
    length = math.hypot(*numbers)
    if not math.isfinite(length) or length == 0:
        raise InvalidAnswerError("the vector in the answer is zero or not finite")
    halves = struct.pack(f"<{len(numbers)}e", *(number / length for number in numbers))
    return base64.b64encode(halves).decode()


def unpack_halves(text: str) -> bytes:
    """Return the float16 numbers of a packed vector, little-endian.

    Raises:
        ValueError: The text is no packed vector.
    """
    halves = base64.b64decode(text, validate=True)
    if not halves or len(halves) % 2:
        raise ValueError(f"{len(halves)} bytes are not a vector of float16")
    return halves


def _read_numbers(given: Json) -> Sequence[float] | None:
    if isinstance(given, str):
        try:
            data = base64.b64decode(given, validate=True)
            return struct.unpack(f"<{len(data) // 4}f", data)
        except (binascii.Error, ValueError, struct.error):
            return None
    if not isinstance(given, list):
        return None
    if not all(isinstance(one, int | float) and not isinstance(one, bool) for one in given):
        return None
    try:
        return [float(one) for one in given]
    except OverflowError:
        return None
