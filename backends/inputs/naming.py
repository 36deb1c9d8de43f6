"""Ids: from a column or the row number, blank and repeated ones dealt with."""

from __future__ import annotations

from typing import Final

from ..core.errors import InputError
from ..core.types import Row
from .base import OnDuplicate
from .sources import Source, id_text

_REPORTED: Final = 5


class Namer:
    """Names the rows of one input, in order.

    It keeps every id it gave (about 100 bytes each) to recognise repeated ones; row numbers need
    no such memory.
    """

    def __init__(self, source: Source, column: str | None, on_duplicate: OnDuplicate) -> None:
        """Start with no id given.

        Args:
            source: The input.
            column: The id column; None for row numbers.
            on_duplicate: What a repeated id means.
        """
        self._source = source
        self._column = column
        self._on_duplicate = on_duplicate
        self._seen: set[str] = set()
        self._suffixes: dict[str, int] = {}
        self._blank: list[str] = []
        self._repeated: list[str] = []

    def raw(self, number: int, place: int, row: Row) -> str:
        """Return what the row calls itself, ``""`` when blank.

        Args:
            number: The row's number, from 1.
            place: Its place in the source.
            row: The row, with the id column.

        Raises:
            InputError: The id is neither text nor a number.
        """
        if self._column is None:
            return str(number)
        value = id_text(row[self._column])
        if value is None:
            raise InputError(
                f"{self._source.locate(place)}: the id in column {self._column!r} is neither text "
                "nor a number; name another column in input.id"
            )
        return value

    def admit(self, name: str, place: int) -> str | None:
        """Make the id unique.

        Args:
            name: What the row calls itself.
            place: Its place in the source.

        Returns:
            The id; None when the row is left out as a duplicate, or will be reported.

        Raises:
            InputError: Enough blank or repeated ids have been found to report them.
        """
        if self._column is None:
            return name
        if name and name not in self._seen:
            self._seen.add(name)
            return name
        if name and self._on_duplicate == "first":
            return None
        if name and self._on_duplicate == "suffix":
            return self._suffixed(name)
        self._note(name, place)
        return None

    def close(self) -> None:
        """Report the blank and repeated ids noted so far.

        Raises:
            InputError: There are some.
        """
        if self._blank:
            raise InputError(
                f"{self._source.name}: the id in column {self._column!r} is blank at "
                f"{'; '.join(self._blank)}; fill it, or set input.id to null for row numbers"
            )
        if self._repeated:
            raise InputError(
                f"{self._source.name}: ids in column {self._column!r} are repeated: "
                f"{'; '.join(self._repeated)}; set input.on_duplicate to 'first' or 'suffix', or "
                "input.id to another column or null"
            )

    def _suffixed(self, name: str) -> str:
        count = self._suffixes.get(name, 1) + 1
        while (unique := f"{name}#{count}") in self._seen:
            count += 1
        self._suffixes[name] = count
        self._seen.add(unique)
        return unique

    def _note(self, name: str, place: int) -> None:
        where = self._source.locate(place)
        if name:
            self._repeated.append(f"{name!r} ({where})")
        else:
            self._blank.append(where)
        if len(self._blank) + len(self._repeated) >= _REPORTED:
            self.close()
