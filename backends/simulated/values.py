r"""Strings that match a simple regular expression.

The subset: literals, ``.``, classes, ``\d \w \s``, groups, ``|``, quantifiers, ``^`` and ``$``
at the ends. Anything else (look-around, back references, ``\b``, Unicode classes, negated
escapes) is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from string import ascii_letters, digits
from typing import Final, TypeAlias

from .dice import Dice
from .errors import ApiError

Maker: TypeAlias = Callable[[Dice], str]

_PRINTABLE: Final = "".join(map(chr, range(0x20, 0x7F)))
_CLASSES: Final = {"d": digits, "w": ascii_letters + digits + "_", "s": " "}
_ESCAPES: Final = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v"}
_QUANTIFIERS: Final = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_EXTRA: Final = 4  # repetitions beyond the least, where the pattern sets no limit
_MOST: Final = 1000  # repetitions that a pattern may ask for


def pattern_maker(pattern: str) -> Maker:
    """Compile a pattern into a maker of matching strings.

    Args:
        pattern: A regular expression of the subset above.

    Returns:
        A function that draws a matching string.

    Raises:
        ApiError: The pattern is outside the subset.
    """
    return _Parser(pattern).parse()


class _Parser:
    """Recursive descent over one pattern."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._rest = pattern.removeprefix("^")
        if self._rest.endswith("$") and not self._rest.endswith("\\$"):
            self._rest = self._rest[:-1]

    def parse(self) -> Maker:
        outer = self._pattern != self._rest
        maker, branches = self._alternatives()
        if self._rest or (outer and branches > 1):  # ^a|b$ anchors each branch differently
            raise self._refused()
        return maker

    def _refused(self) -> ApiError:
        return ApiError(
            f"The pattern {self._pattern!r} is too complex for the simulated fleet.",
            param="response_format",
        )

    def _take(self) -> str:
        if not self._rest:
            raise self._refused()
        char, self._rest = self._rest[0], self._rest[1:]
        return char

    def _try(self, text: str) -> bool:
        found = self._rest.startswith(text)
        if found:
            self._rest = self._rest[len(text) :]
        return found

    def _alternatives(self) -> tuple[Maker, int]:
        branches = [self._sequence()]
        while self._try("|"):
            branches.append(self._sequence())
        return lambda dice: branches[dice.below(len(branches))](dice), len(branches)

    def _sequence(self) -> Maker:
        makers: list[Maker] = []
        while self._rest and self._rest[0] not in "|)":
            makers.append(self._quantified(self._atom()))
        return lambda dice: "".join([make(dice) for make in makers])

    def _atom(self) -> Maker:
        char = self._take()
        if char == "(":
            if self._rest.startswith("?") and not self._try("?:"):
                raise self._refused()
            inner, _ = self._alternatives()
            if not self._try(")"):
                raise self._refused()
            return inner
        if char in "^$*+?{":
            raise self._refused()
        return _one_of(self._characters(char))

    def _characters(self, char: str) -> str:
        if char == ".":
            return _PRINTABLE
        if char == "[":
            return self._set()
        return self._escape() if char == "\\" else char

    def _escape(self) -> str:
        char = self._take()
        if char in _CLASSES:
            return _CLASSES[char]
        if char.isalnum() and char not in _ESCAPES:
            raise self._refused()
        return _ESCAPES.get(char, char)

    def _set(self) -> str:
        negated, chosen = self._try("^"), ""
        while not self._try("]"):
            low = self._member()
            if len(low) == 1 and self._rest.startswith("-") and self._rest[1:2] != "]":
                self._take()
                high = self._member()
                if len(high) != 1 or high < low:
                    raise self._refused()
                low = "".join(map(chr, range(ord(low), ord(high) + 1)))
            chosen += low
        if negated:
            chosen = "".join(char for char in _PRINTABLE if char not in chosen)
        if not chosen:
            raise self._refused()
        return chosen

    def _member(self) -> str:
        char = self._take()
        if char == "[" or (char == "&" and self._rest.startswith("&")):
            raise self._refused()  # nested sets mean different things to different engines
        return self._escape() if char == "\\" else char

    def _quantified(self, atom: Maker) -> Maker:
        if not self._rest or self._rest[0] not in "*+?{":
            return atom
        char = self._take()
        low, limit = self._braces() if char == "{" else _QUANTIFIERS[char]
        self._try("?")  # lazy or not, the strings are the same
        high = low + _EXTRA if limit is None else limit
        if not low <= high <= _MOST:
            raise self._refused()
        return lambda dice: "".join([atom(dice) for _ in range(dice.between(low, high))])

    def _braces(self) -> tuple[int, int | None]:
        inside, closed, self._rest = self._rest.partition("}")
        low, comma, high = inside.partition(",")
        if not closed or not low.isdigit() or not (high.isdigit() or not high):
            raise self._refused()
        if not comma:
            return int(low), int(low)
        return int(low), int(high) if high else None


def _one_of(characters: str) -> Maker:
    return lambda dice: characters[dice.below(len(characters))]
