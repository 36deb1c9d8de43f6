"""Tokens of a text by an estimate, and parts of a text of at most so many tokens."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate
from typing import Final

_RUN: Final = re.compile(r"[A-Za-z]+|\s?[0-9]+|[^\x00-\x7f]+|[^\sA-Za-z0-9]|\n\s*|  +")


_WORD: Final = re.compile(r"\s*\S+")


def estimate_text_tokens(text: str) -> int:
    """Estimate the tokens of a text, with a tendency to be too high."""
    if not text.isascii():  # a run may go on behind a blank that is not ASCII
        return sum(map(_WEIGHTS.__getitem__, _RUN.findall(text)))
    if text.isprintable() and "  " not in text and text[-1:] != " ":  # single blanks only
        first, *others = text.split(" ")
        return _WEIGHTS[first] + sum(map(_AFTER_BLANK.__getitem__, others))
    words = text.rstrip()
    return sum(map(_WEIGHTS.__getitem__, _WORD.findall(words))) + _WEIGHTS[text[len(words) :]]


class _Weights(dict[str, int]):
    """Tokens of pieces of texts; those of short ones are kept, because texts repeat their words."""

    def __missing__(self, piece: str) -> int:
        weight = sum(map(_weight, _RUN.findall(piece)))
        if len(piece) <= _LONGEST_KEPT and len(self) < _MOST_KEPT:
            # long numbers rarely repeat; short ones do: years, and the labels of texts
            has_digit = _DIGIT.search(piece) is not None
            if not has_digit or (len(piece) <= _LONGEST_NUMBER and len(self) < _MOST_KEPT // 2):
                self[piece] = weight
        return weight


_DIGIT: Final = re.compile(r"[0-9]")
_LONGEST_KEPT: Final = 24
_LONGEST_NUMBER: Final = 6
_MOST_KEPT: Final = 1 << 15
_WEIGHTS: Final = _Weights()


class _AfterBlank(dict[str, int]):
    """Tokens of words behind a blank."""

    def __missing__(self, word: str) -> int:
        if word.isdigit():
            return 1 - (-len(word) // 3)
        piece = f" {word}"
        weight = _WEIGHTS[piece]
        if piece in _WEIGHTS:
            self[word] = weight
        return weight


_AFTER_BLANK: Final = _AfterBlank()


def _weight(run: str) -> int:
    if not run.isascii():
        return -(-9 * len(run.encode(errors="replace")) // 20)
    if run.isalpha():
        word = run[1:].islower() or len(run) == 1
        return 1 + (len(run) - 1) // 4 if word else 1 + 3 * (len(run) - 1) // 4
    if run[-1].isdigit():
        digits = len(run) if run[0].isdigit() else len(run) - 1
        return (digits < len(run)) + -(-digits // 3)
    return 1


_PARAGRAPH: Final = re.compile(r"\n\s*\n")
_SENTENCE: Final = re.compile(r"[.!?。！？][\"')\]”’]*\s+|[。！？]")  # noqa: RUF001
_BLANK: Final = re.compile(r"\s+")
_BOUNDARIES: Final = (_PARAGRAPH, _SENTENCE, _BLANK)
"""Places at which a text is cut, the best first."""


class _Ruler:
    """Converts between positions in a text and tokens before them."""

    def __init__(self, text: str) -> None:
        runs = list(_RUN.finditer(text))
        self._starts = [run.start() for run in runs]
        self._ends = [run.end() for run in runs]
        self._before = [0, *accumulate(_weight(run[0]) for run in runs)]

    def count_before(self, position: int) -> float:
        """Return the tokens before a position; those of a run are spread over its characters."""
        at = bisect_right(self._starts, position) - 1
        if at < 0:
            return 0.0
        start, end = self._starts[at], self._ends[at]
        share = min(1.0, (position - start) / (end - start))
        return self._before[at] + share * (self._before[at + 1] - self._before[at])

    def find(self, tokens: float) -> int:
        """Return the last position before which there are at most so many tokens."""
        at = bisect_right(self._before, tokens) - 1
        if at >= len(self._starts):
            return self._ends[-1] if self._ends else 0
        start, end = self._starts[at], self._ends[at]
        inside = (tokens - self._before[at]) / (self._before[at + 1] - self._before[at])
        return max(start + int(inside * (end - start)), self._ends[at - 1] if at else 0)

    @property
    def total(self) -> int:
        """Return the tokens of the whole text."""
        return self._before[-1]


def split_text(text: str, tokens: int, overlap: int) -> Iterator[tuple[int, int]]:
    """Yield start and end of the parts of a text, in characters; the same for the same text.

    A part ends at the end of a paragraph if there is one in its last quarter, else of a sentence,
    else of a word.

    Args:
        text: The text.
        tokens: Most tokens of a part, by the estimate.
        overlap: Tokens of the end of a part that the next one repeats; less than half of it.
    """
    ruler, start = _Ruler(text), 0
    while True:
        before = ruler.count_before(start)
        if ruler.total - before <= tokens:
            yield start, len(text)
            return
        limit = max(ruler.find(before + tokens), start + 1)
        ends = _list_ends(text, limit - (limit - start) // 4, limit)
        end = ends[-1] if ends else limit
        yield start, end
        start = max(_go_back(text, ruler, end, overlap), start + 1)


_LEAST_CUT: Final = 64
"""Tokens of a text below which it has no halves: a prompt is too long, whatever the text."""
_MIDDLE: Final = (3 / 8, 5 / 8)
"""Share of the tokens before the place at which a text is cut, at least and at most."""
_OVERLAP_SHARE: Final = 8
"""Part of a text, one in so many, that both halves may have."""


def halve_text(text: str, overlap: int = 0) -> list[tuple[int, int]]:
    """Return start and end of the halves of a text that is too long for a prompt, in characters.

    The first half ends at the end of a paragraph near the middle if there is one, else of a
    sentence, else of a word.

    Args:
        text: The text; a short one has no halves.
        overlap: Tokens of the end of the first half that the second one repeats; at most an eighth
            of the text.
    """
    ruler = _Ruler(text)
    if ruler.total < _LEAST_CUT:
        return []
    lo, middle, hi = (ruler.find(share * ruler.total) for share in (_MIDDLE[0], 0.5, _MIDDLE[1]))
    end = min(_list_ends(text, lo, hi), key=lambda one: abs(one - middle), default=middle)
    start = _go_back(text, ruler, end, min(overlap, ruler.total // _OVERLAP_SHARE))
    return [(0, end), (start, len(text))]


def _go_back(text: str, ruler: _Ruler, end: int, overlap: int) -> int:
    """Return where the part after one that ends somewhere begins: at a word."""
    back = min(ruler.find(ruler.count_before(end) - overlap) if overlap else end, end)
    blank = _BLANK.search(text, back, end)
    return blank.end() if blank is not None and back < end else back


def _list_ends(text: str, lo: int, hi: int) -> list[int]:
    """Return the ends of paragraphs in a range, else of sentences, else of words."""
    for boundary in _BOUNDARIES:
        if ends := [found.end() for found in boundary.finditer(text, lo, hi)]:
            return ends
    return []
