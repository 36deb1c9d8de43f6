"""``dedup``: the items without those that say the same as an earlier one."""

from __future__ import annotations

import asyncio
import heapq
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from ...backends.core.errors import JournalError
from ...backends.core.terminal import count_nouns
from ...backends.core.types import Item, Json
from ...backends.core.vectors import EMBEDDINGS_URL, KEEP_FIELD, KEEP_VECTOR, unpack_halves
from .base import (
    Answer,
    LevelPlan,
    LevelTask,
    Operator,
    OperatorEnd,
    Question,
    SizeEstimate,
    StageResult,
    StageTools,
)
from .item_text import list_text_columns, read_ids, read_items, render_item

MOST_VECTORS: Final = 50_000
"""Different texts up to which embeddings are compared; time grows with the square."""
VECTORS_FILE: Final = "vectors.arrow"
_SLICE: Final = 256
_BLOCK: Final = 1024
"""Vectors that are compared at once."""
_EXAMPLES: Final = 3
"""Pairs of each side of the threshold that the report shows."""
_MEMBERS: Final = 5
"""Items of the largest group that the report shows."""
_SHOWN: Final = 120
"""Characters of a text in the report."""

Halves = npt.NDArray[np.float16]
Floats = npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two texts, by their numbers.

    Attributes:
        earlier: The one that is kept.
        later: The other one.
        similarity: Cosine similarity of their vectors.
    """

    earlier: int
    later: int
    similarity: float


@dataclass
class Grouping:
    """Which texts say the same as an earlier one, by their vectors.

    Attributes:
        kept: The text that stands for each one: itself if it is kept.
        above: Pairs at or above the threshold that are nearest to it.
        below: Pairs below the threshold that are nearest to it.
    """

    kept: list[int]
    above: list[Pair] = field(default_factory=list)
    below: list[Pair] = field(default_factory=list)


class Grouper:
    """Compares vectors in blocks: each text with the most similar one that is kept so far.

    A text is kept unless its similarity to one that is kept reaches the threshold. So each text
    that is left out is similar to the one that stands for it; there are no chains.

    Args:
        vectors: Unit vectors, one a row.
        threshold: Least similarity of texts that say the same.
    """

    def __init__(self, vectors: Halves, threshold: float) -> None:
        self._vectors, self._threshold = vectors, threshold
        self._kept = list[int]()
        self._above = list[tuple[float, int, int]]()
        self._below = list[tuple[float, int, int]]()
        self._stands = list[int]()

    @property
    def blocks(self) -> range:
        """Return the starts of the blocks, in the order in which they are added."""
        return range(0, len(self._vectors), _BLOCK)

    def add_block(self, start: int) -> None:
        """Group the texts of a block; blocks."""
        block = self._read(slice(start, start + _BLOCK))
        nearest, similarity = self._compare_kept(block)
        within = block @ block.T
        fresh = list[int]()  # positions in the block that are kept
        for at in range(len(block)):
            best, found = int(nearest[at]), float(similarity[at])
            if fresh:
                inside = within[at, fresh]
                position = int(inside.argmax())
                if float(inside[position]) > found:
                    best, found = start + fresh[position], float(inside[position])
            if found >= self._threshold:
                self._stands.append(best)
                _push(self._above, (-found, best, start + at))
            else:
                self._stands.append(start + at)
                fresh.append(at)
                if best >= 0:
                    _push(self._below, (found, best, start + at))
        self._kept += [start + at for at in fresh]

    def end(self) -> Grouping:
        """Return the groups."""
        above = [Pair(a, b, -score) for score, a, b in sorted(self._above, reverse=True)]
        below = [Pair(a, b, score) for score, a, b in sorted(self._below, reverse=True)]
        return Grouping(self._stands, above, below)

    def _read(self, which: slice | list[int]) -> Floats:
        return self._vectors[which].astype(np.float32)

    def _compare_kept(self, block: Floats) -> tuple[npt.NDArray[np.int64], Floats]:
        """Return the most similar text that is kept, and its similarity; -1 if there is none."""
        nearest = np.full(len(block), -1, np.int64)
        similarity = np.full(len(block), -2.0, np.float32)
        for lo in range(0, len(self._kept), 4 * _BLOCK):
            some = self._kept[lo : lo + 4 * _BLOCK]
            scores = block @ self._read(some).T
            position = scores.argmax(axis=1)
            found = scores[np.arange(len(block)), position]
            better = found > similarity
            similarity[better] = found[better]
            nearest[better] = np.asarray(some)[position[better]]
        return nearest, similarity


def _push(heap: list[tuple[float, int, int]], one: tuple[float, int, int]) -> None:
    """Keep the largest few."""
    (heapq.heappush if len(heap) < _EXAMPLES else heapq.heappushpop)(heap, one)


@dataclass(slots=True)
class _Texts:
    """The different texts of a stage.

    Attributes:
        first: Index of the first item of each text, in order.
        copies: Ids of the further items of a text, by its number.
        blank: Numbers of the texts that are empty; their items are all kept.
    """

    first: list[int] = field(default_factory=list)
    copies: dict[int, list[str]] = field(default_factory=dict)
    blank: set[int] = field(default_factory=set)


@dataclass(slots=True)
class _LeftOut:
    """Texts that cannot be compared by their embeddings.

    Attributes:
        failed: Texts whose request failed.
        other_lengths: Texts whose embedding has another length than the first one.
    """

    failed: int = 0
    other_lengths: int = 0


@dataclass(frozen=True)
class Dedup(Operator):
    """Keep one item of those that say the same; see ``DedupConfig`` for the settings."""

    op: ClassVar[str] = "dedup"
    passes_columns: ClassVar[bool] = True
    result_schema: ClassVar[Mapping[str, Any]] = {
        "type": "object",
        "additionalProperties": False,
        "required": ["size", "duplicates"],
        "properties": {
            "size": {"type": "integer"},
            "duplicates": {"type": "array", "items": {"type": "string"}},
        },
    }

    by: str = "text"
    text: str | None = None
    threshold: float = 0.9
    ignore_case: bool = True

    @property
    def columns(self) -> tuple[str, ...]:
        """Return the columns of ``text``."""
        return list_text_columns(self.text)

    def plan(self, size: SizeEstimate) -> list[LevelPlan]:
        """Return the request of each item; none if there are too many or texts are compared."""
        if self.by == "text" or size.items > MOST_VECTORS:
            return []
        return [LevelPlan("embeddings", size.items, int(size.items * size.tokens_per_item), 0)]

    async def run(self, tools: StageTools) -> OperatorEnd:
        """Compare the texts, then their embeddings."""
        texts = await asyncio.to_thread(self._find_copies, tools)
        grouping, left_out = None, _LeftOut()
        asked = [n for n in range(len(texts.first)) if n not in texts.blank]
        if self.by == "embeddings" and 1 < len(asked) <= MOST_VECTORS:
            grouping, left_out = await self._group(tools, texts, asked)
        groups = _Groups(self, tools, texts, grouping)
        await asyncio.to_thread(groups.load)
        report = await asyncio.to_thread(groups.report, left_out)
        return OperatorEnd(groups, report)

    def normalize(self, text: str) -> str:
        """Return the text that equal texts share."""
        blanked = " ".join(unicodedata.normalize("NFC", text).split())
        return blanked.casefold() if self.ignore_case else blanked

    def _find_copies(self, tools: StageTools) -> _Texts:
        found, known = _Texts(), dict[bytes, int]()
        for item in _iter_items(tools):
            text = self.normalize(render_item(item, self.text))
            number = len(found.first)
            if text:
                digest = blake2b(text.encode(), digest_size=16).digest()
                number = known.setdefault(digest, number)
            else:
                found.blank.add(number)
            if number == len(found.first):
                found.first.append(item.index)
            else:
                found.copies.setdefault(number, []).append(item.id)
        return found

    async def _group(
        self, tools: StageTools, texts: _Texts, asked: Sequence[int]
    ) -> tuple[Grouping, _LeftOut]:
        """Group texts by their embeddings; return also those that cannot be compared."""
        questions = self._questions(tools, [texts.first[n] for n in asked])
        answers = await tools.ask("embeddings", LevelTask({}, is_requests=True), questions)
        path = tools.folder / VECTORS_FILE
        found_at, vectors, left_out = await asyncio.to_thread(_write_vectors, path, answers)
        numbers = [asked[at] for at in found_at]
        grouper = Grouper(vectors, self.threshold)
        for start in grouper.blocks:  # between blocks, a stop takes effect
            await asyncio.to_thread(grouper.add_block, start)
        found = grouper.end()
        stands = list(range(len(texts.first)))
        for at, other in enumerate(found.kept):
            stands[numbers[at]] = numbers[other]

        def name(pairs: Sequence[Pair]) -> list[Pair]:
            return [Pair(numbers[p.earlier], numbers[p.later], p.similarity) for p in pairs]

        grouping = Grouping(stands, name(found.above), name(found.below))
        return grouping, left_out

    def _questions(self, tools: StageTools, indices: Sequence[int]) -> Iterator[Question]:
        for item in read_items(tools, indices):
            body = {"input": render_item(item, self.text), "encoding_format": "base64"}
            row = {"url": EMBEDDINGS_URL, "body": body, KEEP_FIELD: KEEP_VECTOR}
            yield Question(item.id, row)


class _Groups:
    """The results, read from the items whenever they are iterated."""

    def __init__(
        self, dedup: Dedup, tools: StageTools, texts: _Texts, grouping: Grouping | None
    ) -> None:
        self._dedup, self._tools, self._texts = dedup, tools, texts
        self._grouping = grouping
        self._stands = range(len(texts.first)) if grouping is None else grouping.kept
        self._members = dict[int, list[str]]()
        """Ids of the items that are left out, by the number of the text that stands for them."""

    def load(self) -> None:
        """Collect the ids of the items that are left out; blocks."""
        left_out = [n for n, stands in enumerate(self._stands) if n != stands]
        ids = read_ids(self._tools, (self._texts.first[n] for n in left_out))
        names = dict(zip(left_out, ids, strict=True))
        for number, stands in enumerate(self._stands):
            own = [names[number]] if number in names else []
            own += self._texts.copies.get(number, [])
            if own:
                self._members.setdefault(stands, []).extend(own)

    def __iter__(self) -> Iterator[StageResult]:
        """Yield the items that are kept; blocks."""
        kept = [n for n, stands in enumerate(self._stands) if n == stands]
        items = read_items(self._tools, [self._texts.first[n] for n in kept])
        for number, item in zip(kept, items, strict=True):
            members = self._members.get(number, [])
            output = {"size": 1 + len(members), "duplicates": members}
            yield StageResult(item.id, output, item.row)

    def report(self, left_out: _LeftOut) -> dict[str, Any]:
        """Return counts, pairs from both sides of the threshold, and the largest group; blocks."""
        dedup, total = self._dedup, len(self._tools.items)
        kept = sum(n == stands for n, stands in enumerate(self._stands))
        copies = total - len(self._texts.first)
        is_compared = self._grouping is not None
        found: dict[str, Any] = {
            "op": dedup.op,
            "by": "embeddings" if is_compared else "text",
            "items": total,
            "kept": kept,
            "equal_texts": copies,
            "similar_texts": total - copies - kept,
            "without_text": len(self._texts.blank),
            "without_embedding": left_out.failed,
            "other_lengths": left_out.other_lengths,
        }
        if is_compared:
            assert self._grouping is not None, "the texts were compared"
            found["threshold"] = dedup.threshold
            found["above"] = [self._show(pair) for pair in self._grouping.above]
            found["below"] = [self._show(pair) for pair in self._grouping.below]
        largest = max(self._members, key=lambda n: (len(self._members[n]), -n), default=None)
        if largest is not None:
            members = self._members[largest]
            found["largest"] = {
                **self._describe(largest),
                "size": 1 + len(members),
                "others": members[:_MEMBERS],
            }
        found["lines"] = list(self._list_lines(found))
        return found

    def _describe(self, number: int) -> dict[str, Json]:
        index = self._texts.first[number]
        (item,) = self._tools.items.read(index, index + 1)
        text = " ".join(render_item(item, self._dedup.text).split())
        return {
            "id": item.id,
            "text": text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…",
        }

    def _show(self, pair: Pair) -> dict[str, Json]:
        return {
            "similarity": round(pair.similarity, 4),
            "kept": self._describe(pair.earlier),
            "other": self._describe(pair.later),
        }

    def _list_lines(self, found: Mapping[str, Any]) -> Iterator[str]:
        yield (
            f"{found['kept']:,} of {count_nouns(found['items'], 'item')} kept; left out: "
            f"{found['equal_texts']:,} with an equal text, {found['similar_texts']:,} with a "
            "similar one"
        )
        if self._dedup.by == "embeddings" and found["by"] == "text" and len(self._stands) > 1:
            yield (
                f"more than {MOST_VECTORS:,} different texts: embeddings were not compared; "
                "select fewer items by where"
            )
        if found["without_embedding"]:
            yield f"{count_nouns(found['without_embedding'], 'text')} without an embedding, kept"
        if found["other_lengths"]:
            texts = count_nouns(found["other_lengths"], "text")
            yield (
                f"{texts} with an embedding of another length than the first one, kept; do all "
                "endpoints serve the same model?"
            )
        for side, words in (("above", "the same"), ("below", "different")):
            for pair in found.get(side, ()):
                kept, other = pair["kept"], pair["other"]
                yield (
                    f"{words} ({pair['similarity']:.3f}, threshold {self._dedup.threshold:g}): "
                    f"[{kept['id']}] {kept['text']} | [{other['id']}] {other['text']}"
                )
        if (largest := found.get("largest")) is not None:
            more = ", …" if largest["size"] - 1 > len(largest["others"]) else ""
            size = count_nouns(largest["size"], "item")
            yield (
                f"largest group: {size}, [{largest['id']}] {largest['text']}; "
                f"also {', '.join(largest['others'])}{more}"
            )


def _iter_items(tools: StageTools) -> Iterator[Item]:
    for lo in range(0, len(tools.items), _SLICE):
        yield from tools.items.read(lo, min(len(tools.items), lo + _SLICE))


def _write_vectors(path: Path, answers: Sequence[Answer]) -> tuple[list[int], Halves, _LeftOut]:
    """Write the vectors of all answers to a file.

    Answers that failed, and vectors of another length than the first one, are left out.

    Returns:
        The numbers of the answers that have a vector, the vectors, and what has none.

    Raises:
        JournalError: The file cannot be written.
    """
    numbers, names, parts, size = list[int](), list[str](), list[bytes](), 0
    left_out = _LeftOut()
    for number, answer in enumerate(answers):
        if not answer.is_done:
            left_out.failed += 1
            continue
        halves = unpack_halves(answer.output)
        size = size or len(halves)
        if len(halves) == size:
            numbers.append(number)
            names.append(answer.id)
            parts.append(halves)
        else:
            left_out.other_lengths += 1
    data = b"".join(parts)
    width = size // 2
    vectors = np.frombuffer(data, "<f2").reshape(len(numbers), width)
    values = pa.array(vectors.reshape(-1), pa.float16())
    rows = pa.FixedSizeListArray.from_arrays(values, max(width, 1))
    batch = pa.record_batch([pa.array(names, pa.string()), rows], ["id", "vector"])
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with pa.OSFile(str(temporary), "w") as file, pa.ipc.new_file(file, batch.schema) as sink:
            sink.write_batch(batch)
        temporary.replace(path)
    except OSError as error:
        raise JournalError(f"{path}: cannot be written: {error.strerror or error}") from error
    return numbers, vectors, left_out
