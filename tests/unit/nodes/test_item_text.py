"""Items and ids by their indices: the same as one read each, in few reads."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import orjson
import pytest

from fanfold.backends.core.types import Item
from fanfold.nodes.operators import Answer, LevelTask, Question, StageTools
from fanfold.nodes.operators.item_text import read_ids, read_items


class Rows:
    """Items in memory, and the ranges that were read."""

    def __init__(self, count: int) -> None:
        self.items = [Item(n, f"i{n}", {"n": n}) for n in range(count)]
        self.ranges = list[tuple[int, int]]()

    def __len__(self) -> int:
        return len(self.items)

    def read(self, lo: int, hi: int) -> list[Item]:
        self.ranges.append((lo, hi))
        return self.items[lo:hi]

    def read_at(self, indices: Sequence[int]) -> list[Item]:
        return [self.items[index] for index in indices]

    def read_ids(self, lo: int, hi: int) -> list[str]:
        return [one.id for one in self.read(lo, hi)]

    def find_longest_row(self) -> int:
        return max(len(orjson.dumps(one.row)) for one in self.read(0, len(self)))


async def no_answers(
    level: str, task: LevelTask, questions: Iterable[Question]
) -> Sequence[Answer]:
    del level, task, questions
    return []


async def no_tokens(_texts: Sequence[str]) -> list[int]:
    return []


@pytest.mark.parametrize(
    ("indices", "reads"),
    [
        ([], []),
        ([7], [(7, 8)]),
        (list(range(600)), [(0, 256), (256, 512), (512, 600)]),
        (list(range(1, 600, 2)), [(1, 256), (257, 512), (513, 600)]),
        ([3, 1, 2, 2, 40], [(3, 4), (1, 3), (2, 3), (40, 41)]),
        ([0, 32, 65], [(0, 33), (65, 66)]),
    ],
)
def test_reads_include_short_gaps(indices: list[int], reads: list[tuple[int, int]]) -> None:
    rows = Rows(600)
    tools = StageTools(rows, ("n",), no_answers, no_tokens, None, 100)
    assert [item.index for item in read_items(tools, indices)] == indices
    assert rows.ranges == reads
    assert list(read_ids(tools, iter(indices))) == [f"i{n}" for n in indices]
    assert rows.ranges == [*reads, *reads]
