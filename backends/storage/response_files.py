"""Where answers lie, by key, in some 30 bytes each; a dictionary would take 200."""

from __future__ import annotations

from array import array
from typing import Final

_PARTS: Final = 256
_FIRST: Final = 16
_EMPTY: Final = 0
_GONE: Final = 2**64 - 1


class Index:
    """Maps keys to places, numbers from 0 to 2^63.

    It compares the first 8 bytes of a key: whoever reads what lies at a place compares the rest.
    One thread at a time may use it.
    """

    def __init__(self) -> None:
        self._parts = [_Part() for _ in range(_PARTS)]  # small ones, so that none grows for long

    def __len__(self) -> int:
        """Return how many keys it holds."""
        return sum(part.live for part in self._parts)

    def find(self, key: bytes) -> int | None:
        """Return a key's place, or None."""
        part = self._parts[key[-1]]
        place = part.places[part.slot(int.from_bytes(key[:8]))]
        return None if place in (_EMPTY, _GONE) else place - 1

    def put(self, key: bytes, place: int) -> None:
        """Set a key's place."""
        self._parts[key[-1]].put(int.from_bytes(key[:8]), place + 1)

    def forget(self, key: bytes) -> None:
        """Take a key out, if it is there."""
        self._parts[key[-1]].forget(int.from_bytes(key[:8]))


class _Part:
    """A hash table with open addressing; places are 1 higher here, for 0 is an empty slot."""

    __slots__ = ("keys", "live", "places", "used")

    def __init__(self, size: int = _FIRST) -> None:
        self.keys, self.places = array("Q", bytes(8 * size)), array("Q", bytes(8 * size))
        self.live = self.used = 0

    def slot(self, key: int) -> int:
        """Return where a key is, or where it belongs."""
        keys, places = self.keys, self.places
        mask = len(keys) - 1
        at = key & mask
        while places[at] and keys[at] != key:
            at = (at + 1) & mask
        return at

    def put(self, key: int, place: int) -> None:
        at = self.slot(key)
        before = self.places[at]
        self.keys[at], self.places[at] = key, place
        self.live += before in (_EMPTY, _GONE)
        self.used += before == _EMPTY
        if 3 * self.used > 2 * len(self.keys):
            self._grow()

    def forget(self, key: int) -> None:
        at = self.slot(key)
        if self.places[at] not in (_EMPTY, _GONE):
            self.places[at] = _GONE  # not empty: keys that were met by it lie behind
            self.live -= 1

    def _grow(self) -> None:
        grown = _Part(2 * len(self.keys) if 2 * self.live > len(self.keys) else len(self.keys))
        for key, place in zip(self.keys, self.places, strict=True):
            if place not in (_EMPTY, _GONE):
                at = grown.slot(key)
                grown.keys[at], grown.places[at] = key, place
        self.keys, self.places, self.used = grown.keys, grown.places, self.live
