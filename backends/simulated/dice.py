"""Seeded chance: the same key gives the same numbers, on every node and in every process."""

from __future__ import annotations

import math
from hashlib import blake2b
from random import Random
from typing import Final

_SPAN: Final = float(1 << 64)


def digest(*parts: object) -> bytes:
    """Hash some values.

    Args:
        *parts: Bytes as they are; anything else by its ``str``.

    Returns:
        16 bytes.
    """
    hasher = blake2b(digest_size=16)
    for part in parts:
        data = part if isinstance(part, bytes) else str(part).encode()
        hasher.update(b"%d:" % len(data) + data)
    return hasher.digest()


def chance(*parts: object) -> float:
    """Draw a uniform number in [0, 1) from some values.

    Args:
        *parts: As for `digest`.

    Returns:
        The number; equal parts give an equal number.
    """
    return int.from_bytes(digest(*parts)[:8]) / _SPAN


def normal(*parts: object) -> float:
    """Draw a standard normal number from some values (Box and Muller).

    Args:
        *parts: As for `digest`.

    Returns:
        The number.
    """
    data = digest(*parts)
    one = (int.from_bytes(data[:8]) + 1) / (_SPAN + 1)
    two = int.from_bytes(data[8:]) / _SPAN
    return math.sqrt(-2.0 * math.log(one)) * math.cos(2.0 * math.pi * two)


class Dice:
    """A stream of draws from one key.

    Only ``random()`` and ``getrandbits`` of `random.Random` are used: Python promises the same
    sequence for these from version to version.

    Args:
        key: Any bytes.
    """

    __slots__ = ("_random",)

    def __init__(self, key: bytes) -> None:
        self._random = Random(int.from_bytes(key))

    def unit(self) -> float:
        """Return a uniform number in [0, 1)."""
        return self._random.random()

    def below(self, bound: int) -> int:
        """Return a uniform integer from 0 to below ``bound`` (which must be positive)."""
        if bound <= 1 << 32:
            return int(self._random.random() * bound)
        return self._random.getrandbits(bound.bit_length() + 64) % bound

    def between(self, low: int, high: int) -> int:
        """Return a uniform integer from ``low`` to ``high``, both included."""
        return low + self.below(high - low + 1)

    def coin(self) -> bool:
        """Return one fair bit."""
        return self._random.random() < 0.5  # noqa: PLR2004 - the fair half
