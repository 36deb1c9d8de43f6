"""Order in which a run works on its items: those whose prompts share a prefix follow each other."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt

from ..core.errors import InvalidItemError, JournalError
from ..core.templates import ItemPrompt, Template
from ..core.types import Item, Row
from .item_store import ItemStore

Indices: TypeAlias = npt.NDArray[np.int64]
ReadTexts: TypeAlias = Callable[[Sequence[int]], Iterable[str]]
"""Returns the prompts of rows as texts; an empty one for a row that is never asked."""

_LEVELS: Final = tuple(128 << n for n in range(8))
"""Characters after the text that all prompts share, at which prefixes are compared."""
_SAMPLE: Final = 2048
"""Rows that show whether prompts share prefixes."""
_RUN: Final = 32
"""Rows of the sample that follow each other: inputs are often sorted by what is shared."""
_POPULAR: Final = 8
"""A prefix of more than one in so many items is in the cache of each server anyway."""
_LEAST_SAVED: Final = 0.05
"""Part of the prompts that must be shared for groups to be formed."""
_LEAST_SAMPLED: Final = 0.005
"""The same in the sample, which has few items of each group."""
_LEAST_LATE: Final = 0.02
"""Part of the sampled text that another order of a prompt's parts must let servers reuse."""
_SHOWN: Final = 40
LEAST_ROWS: Final = 256
"""Runs with fewer rows keep the order of the input."""
_AT_ONCE: Final = 1024


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """How the prompts of the items share prefixes.

    Attributes:
        prefix: Characters of the conversation's beginning that are equal in a group.
        groups: Number of groups of two items or more.
        grouped: Items in these groups.
        saved: Part of all characters of the prompts that is shared within groups, at least.
    """

    prefix: int
    groups: int
    grouped: int
    saved: float


def find_groups(
    rows: int, read_texts: ReadTexts, long_first: bool = True
) -> tuple[PrefixGroups, Indices] | None:
    """Find groups of items whose prompts share a prefix, and an order by them; blocks.

    Text that all prompts share does not count, nor does a prefix of a large part of them: every
    server keeps it in its cache anyway. A sample shows whether it is worth reading all.

    Args:
        rows: Number of rows.
        read_texts: Returns the prompts of rows.
        long_first: Whether groups with more text go first, and the longer of the items without a
            group: short ones fill the servers at the end. Otherwise the first in the input.

    Returns:
        The groups, and the numbers of the rows in the order of work; None if hardly any text is
        shared, or there are few rows.
    """
    if rows < LEAST_ROWS:
        return None
    sample = [text for text in read_texts(sample_rows(rows)) if text]
    if len(sample) < 2:  # noqa: PLR2004 - a pair
        return None
    first, last = min(sample), max(sample)
    constant = len(os.path.commonprefix([first, last]))  # noqa: RUF071 - characters are meant
    levels = [constant + level for level in _LEVELS]
    keys = _hash_prefixes(sample, levels)
    lengths = np.array([len(text) for text in sample], np.int64)
    saved = [_count_saved(keys[n], lengths, levels[n], constant) for n in range(len(levels))]
    if max(saved) < _LEAST_SAMPLED * lengths.sum():
        return None
    # Of a level with hardly any groups in the sample, few items would profit.
    kept = [n for n, value in enumerate(saved) if value > 0]
    levels = [levels[n] for n in kept]
    columns = np.empty((len(levels), rows), np.uint64)
    all_lengths = np.empty(rows, np.int64)
    for lo in range(0, rows, _AT_ONCE):
        hi = min(rows, lo + _AT_ONCE)
        texts = list(read_texts(range(lo, hi)))
        columns[:, lo:hi] = _hash_prefixes(texts, levels)
        all_lengths[lo:hi] = [len(text) for text in texts]
    savings = [
        _count_saved(column, all_lengths, level, constant)
        for column, level in zip(columns, levels, strict=True)
    ]
    best = int(np.argmax(savings))
    if savings[best] < _LEAST_SAVED * all_lengths.sum():
        return None
    return _arrange(columns[best:], all_lengths, levels[best], savings[best], long_first)


def _arrange(
    columns: npt.NDArray[np.uint64], lengths: Indices, prefix: int, saved: int, long_first: bool
) -> tuple[PrefixGroups, Indices]:
    """Put the items of a group one after the other, and the items without a group at the end.

    Within a group, items that share more follow each other.
    """
    _, first, group, counts = np.unique(
        columns[0], return_index=True, return_inverse=True, return_counts=True
    )
    is_alone = counts[group] == 1
    rank = -np.bincount(group, weights=lengths) if long_first else first
    keys = [np.arange(len(lengths)), *columns[:0:-1], group, rank[group], is_alone]
    order = np.lexsort(keys).astype(np.int64)
    shared = counts[counts > 1]
    groups = PrefixGroups(
        prefix, len(shared), int(shared.sum()), float(saved / max(1, lengths.sum()))
    )
    return groups, order


def sample_rows(rows: int) -> list[int]:
    """Return the rows of a sample in which shared text shows: neighbours, and single rows."""
    if rows <= _SAMPLE:
        return list(range(rows))
    draw, starts = random.Random(0), rows // _RUN
    runs = sorted(draw.sample(range(starts), _SAMPLE // _RUN // 2))
    apart = draw.sample(range(rows), _SAMPLE // 2)
    together = (row for run in runs for row in range(_RUN * run, _RUN * run + _RUN))
    return sorted({*together, *apart})


def _hash_prefixes(texts: Sequence[str], levels: Sequence[int]) -> npt.NDArray[np.uint64]:
    """Return keys of the texts' prefixes, a row for each length; a shorter text is its own."""
    keys = np.empty((len(levels), len(texts)), np.uint64)
    for number, text in enumerate(texts):
        digest, done = blake2b(digest_size=8), 0
        for n, level in enumerate(levels):
            digest.update(text[done:level].encode("utf-8", "surrogatepass"))
            done = level
            keys[n, number] = int.from_bytes(digest.digest())
    return keys


def _count_saved(keys: npt.NDArray[np.uint64], lengths: Indices, level: int, constant: int) -> int:
    """Return the characters that need not be computed if each group is computed once."""
    long = keys[lengths >= level]
    counts = np.unique(long, return_counts=True)[1]
    counts = counts[counts <= max(2, len(keys) // _POPULAR)]
    return int((counts - 1).sum() * (level - constant))


@dataclass(frozen=True, slots=True)
class LateRepeat:
    """A long repeated part of the prompts that stands after a part that differs more.

    Attributes:
        repeated: The part, as a user writes it: ``{document}``, or the constant text.
        where: Key of the setting with the repeated part.
        differing: The part before it, as ``{question}``.
        differing_where: Key of the setting with that part.
        share: Part of all text that servers could reuse, if the repeated part stood first; of the
            sample, so at least.
    """

    repeated: str
    where: str
    differing: str
    differing_where: str
    share: float

    def __str__(self) -> str:
        """Return a hint for users."""
        places = self.where
        if self.differing_where != self.where:
            places = f"{self.differing_where} and {self.where}"
        return (
            f"{places}: {self.repeated} is repeated but comes after {self.differing}, which "
            f"differs more; put it first, so that servers reuse it from their prefix caches (at "
            f"least {100 * self.share:.0f} % of the text)"
        )


def find_late_repeat(prompt: ItemPrompt, rows: Iterable[Row]) -> LateRepeat | None:
    """Find the part of a prompt that servers would reuse if it stood before others.

    Prefix caches reuse only the beginning of a prompt, up to the first part that differs.

    Args:
        prompt: The templates.
        rows: A sample of the rows, of ``sample_rows``.

    Returns:
        The part with the most text to reuse; None if no long part would gain.
    """
    parts = [
        (Template(("", text, "") if n % 2 else (text,)), template.where, bool(n % 2))
        for _, template in prompt.messages
        for n, text in enumerate(template.parts)
        if text
    ]
    table = list[list[str]]()
    for row in rows:
        with suppress(InvalidItemError):  # it fails without a request
            table.append([part.render(row) for part, _, _ in parts])
    if not table:
        return None
    columns = list(zip(*table, strict=True))
    lengths = [sum(map(len, column)) for column in columns]
    different = [len(set(column)) for column in columns]
    today = _count_reused(columns, range(len(columns)))
    ideal = _count_reused(columns, sorted(range(len(columns)), key=lambda at: different[at]))
    gain, best = max(((ideal[at] - today[at], at) for at in today), default=(0, 0))
    if gain < _LEAST_LATE * sum(lengths) or lengths[best] < _LEVELS[0] * len(table):
        return None
    before = next((at for at in range(best) if different[at] > different[best]), None)
    if before is None:
        return None
    (text, where, is_column), (other, other_where, _) = parts[best], parts[before]
    name = f"{{{text.parts[1]}}}" if is_column else f"the text {_shorten(text.parts[0])!r}"
    return LateRepeat(name, where, f"{{{other.parts[1]}}}", other_where, gain / sum(lengths))


def _count_reused(columns: Sequence[Sequence[str]], order: Iterable[int]) -> dict[int, int]:
    """Return the characters of each column that follow a prefix which an earlier row has too."""
    reused = dict[int, int]()
    prefixes: list[int] = []
    for at in order:
        column = columns[at]
        prefixes = [hash(pair) for pair in zip(prefixes or [0] * len(column), column, strict=True)]
        firsts = dict(zip(reversed(prefixes), reversed(column), strict=True))
        reused[at] = sum(map(len, column)) - sum(map(len, firsts.values()))
    return reused


def _shorten(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= _SHOWN else f"{line[:_SHOWN]}…"


def write_order(path: Path, order: Indices) -> None:
    """Write an order of rows, and its inverse, to a file that is not there yet; blocks.

    Raises:
        JournalError: The file cannot be written.
    """
    both = np.empty((2, len(order)), np.uint32 if len(order) < 2**32 else np.uint64)
    both[0] = order
    both[1, order] = np.arange(len(order))
    try:
        with path.open("xb") as file:
            np.save(file, both, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        msg = f"the order of the items cannot be written to {path}: {error.strerror or error}"
        raise JournalError(msg) from error


class OrderedItems:
    """The items of a run in the order of work; positions are places in that order.

    Args:
        store: The items.
        path: The file of the order.
        samples: Items of each row; they follow each other.

    Raises:
        JournalError: The file is damaged or belongs to other items.
    """

    def __init__(self, store: ItemStore, path: Path, samples: int = 1) -> None:
        self._store, self._samples = store, samples
        try:
            both: Any = np.load(path, mmap_mode="r", allow_pickle=False)
            fits = both.shape == (2, -(-len(store) // samples)) and both.dtype.kind == "u"
        except (OSError, ValueError, EOFError) as error:
            raise JournalError(f"{path} is damaged: {error}; start a new run") from error
        if not fits:
            raise JournalError(f"{path} is the order of other items; start a new run")
        self._order, self._inverse = both

    def __len__(self) -> int:
        """Return the number of items."""
        return len(self._store)

    def indices(self, lo: int, hi: int) -> list[int]:
        """Return the indices of the items at the positions ``lo`` to ``hi`` (exclusive)."""
        samples = self._samples
        if samples == 1:
            found: list[int] = self._order[lo:hi].tolist()
            return found
        rows = self._order[lo // samples : -(-hi // samples)].tolist()
        whole = [row * samples + n for row in rows for n in range(samples)]
        skipped = lo % samples
        return whole[skipped : skipped + hi - lo]

    def position(self, index: int) -> int:
        """Return the position of an item."""
        row, sample = divmod(index, self._samples)
        return int(self._inverse[row]) * self._samples + sample

    def read(self, lo: int, hi: int) -> list[Item]:
        """Return the items at the positions ``lo`` to ``hi`` (exclusive)."""
        return self._store.read_at(self.indices(lo, hi))
