"""Orders and summaries as one JSON text each: compressed, for exchanges carry little."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Mapping
from typing import Any, Final

import orjson

from ...core.errors import SiteError
from ...core.types import Json

MOST: Final = 64_000_000
"""Most bytes that a parcel may unfold to."""


def pack(data: Mapping[str, Any]) -> str:
    """Return plain data as text that no JSON encoder has to escape; blocks.

    Academy wraps what it sends in JSON up to three times, and each time doubles every quotation
    mark and backslash.
    """
    return base64.b64encode(zlib.compress(orjson.dumps(data), 1)).decode("ascii")


def unpack(parcel: str) -> dict[str, Json]:
    """Return what was packed; blocks.

    Raises:
        SiteError: It is no parcel, or unfolds to more than :data:`MOST` bytes.
    """
    unfold = zlib.decompressobj()
    try:
        raw = unfold.decompress(base64.b64decode(parcel, validate=True), MOST)
        data = orjson.loads(raw) if unfold.eof else None
    except (ValueError, zlib.error) as error:
        raise SiteError(f"a message between coordinator and agent is broken: {error}") from error
    if not isinstance(data, dict):
        msg = f"a message between coordinator and agent is cut, above {MOST:,} bytes, or no object"
        raise SiteError(msg)
    return data
