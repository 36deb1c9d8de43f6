"""One kept answer as a line of JSON whose parts stand at fixed places.

So a file is read through without parsing it, and damage is seen before anything is parsed.
"""

from __future__ import annotations

import zlib
from typing import Final

KEY_BYTES: Final = 16

_KEY, _CRC, _ANSWER, _END = b'{"key":"', b'","crc":"', b'","answer":', b"}\n"
_HEX: Final = 2 * KEY_BYTES
_CRC_AT: Final = len(_KEY) + _HEX
_SUM_AT: Final = _CRC_AT + len(_CRC)
_ANSWER_AT: Final = _SUM_AT + 8
_TEXT_AT: Final = _ANSWER_AT + len(_ANSWER)


def pack(key: bytes, answer: bytes) -> bytes:
    """Return the line of an answer.

    Args:
        key: Of the request, 16 bytes.
        answer: JSON on one line.
    """
    name = key.hex().encode()
    return b"".join((_KEY, name, _CRC, _sum(name, answer), _ANSWER, answer, _END))


def key_of(line: bytes) -> bytes | None:
    """Return the key of a line, or None when it is none; the answer is not looked at."""
    if not (line.startswith(_KEY) and line.endswith(_END) and line[_CRC_AT:_SUM_AT] == _CRC):
        return None
    try:
        return bytes.fromhex(line[len(_KEY) : _CRC_AT].decode("ascii"))
    except ValueError:
        return None


def answer_of(line: bytes, key: bytes) -> bytes | None:
    """Return the answer that a line holds for a key, or None when it is another's or damaged."""
    answer = line[_TEXT_AT : -len(_END)]
    mine = key_of(line) == key and line[_ANSWER_AT:_TEXT_AT] == _ANSWER
    if not mine or line[_SUM_AT:_ANSWER_AT] != _sum(key.hex().encode(), answer):
        return None
    return answer


def _sum(name: bytes, answer: bytes) -> bytes:
    return b"%08x" % zlib.crc32(answer, zlib.crc32(name))
