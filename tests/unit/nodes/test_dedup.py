"""``dedup``: equal texts, similar texts by embeddings, and what the report shows of them."""

from __future__ import annotations

import base64
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pyarrow as pa
import pytest

from fanfold.backends.core.types import Item
from fanfold.backends.core.vectors import KEEP_FIELD, pack_answer
from fanfold.backends.simulated.pooling import embed_text
from fanfold.nodes.operators import Answer, LevelTask, OperatorEnd, Question, StageTools
from fanfold.nodes.operators import dedup as module
from fanfold.nodes.operators.dedup import VECTORS_FILE, Dedup, Grouper, Grouping


class Rows:
    def __init__(self, texts: Sequence[str | None]) -> None:
        self.items = [Item(n, f"i{n}", {"text": text}) for n, text in enumerate(texts)]

    def __len__(self) -> int:
        return len(self.items)

    def read(self, lo: int, hi: int) -> list[Item]:
        return self.items[lo:hi]

    def read_at(self, indices: Sequence[int]) -> list[Item]:
        return [self.items[index] for index in indices]

    def read_ids(self, lo: int, hi: int) -> list[str]:
        return [one.id for one in self.items[lo:hi]]

    def find_longest_row(self) -> int:
        return max(len(orjson.dumps(one.row)) for one in self.items)


@dataclass
class Model:
    """Embeds texts as the simulated fleet does; texts with "fails" fail."""

    asked: list[Question] = field(default_factory=list)

    async def ask(
        self, level: str, task: LevelTask, questions: Iterable[Question]
    ) -> Sequence[Answer]:
        assert (level, task.is_requests) == ("embeddings", True)
        self.asked = list(questions)
        return [self._answer(one) for one in self.asked]

    def _answer(self, question: Question) -> Answer:
        text = question.row["body"]["input"]
        assert question.row[KEEP_FIELD] == "vector"
        if "fails" in text:
            return Answer(question.id, None, "PromptTooLongError", "too long", {})
        size = 32 if "other model" in text else 64
        document = {"data": [{"embedding": embed_text(text, size, 0)}]}
        return Answer(question.id, pack_answer(document), None, None, {})


async def count_tokens(texts: Sequence[str]) -> list[int]:
    return [10 for _ in texts]


async def dedup(
    texts: Sequence[str | None], folder: Path, **settings: Any
) -> tuple[OperatorEnd, Model]:
    model = Model()
    tools = StageTools(Rows(texts), ("text",), model.ask, count_tokens, None, 256, folder)
    return await Dedup(text="{text}", **settings).run(tools), model


def groups(end: OperatorEnd) -> dict[str, list[str]]:
    return {one.id: one.output["duplicates"] for one in end.results}


async def test_equal_texts_are_found_without_a_call(tmp_path: Path) -> None:
    texts = ["A  claim", "a claim ", "caf\u00e9", "cafe\u0301", "x", None, "", "10\u00b2", "102"]
    end, model = await dedup(texts, tmp_path)
    assert groups(end) == {"i0": ["i1"], "i2": ["i3"], "i4": [], "i5": [], "i6": []} | {
        "i7": [],
        "i8": [],
    }
    assert model.asked == []
    assert (end.report["kept"], end.report["equal_texts"], end.report["without_text"]) == (7, 2, 2)
    assert next(one.row for one in end.results) == {"text": "A  claim"}


async def test_case_counts_where_it_has_a_meaning(tmp_path: Path) -> None:
    texts = ["c1ccccc1", "C1CCCCC1"]
    assert len(groups((await dedup(texts, tmp_path))[0])) == 1
    assert len(groups((await dedup(texts, tmp_path, ignore_case=False))[0])) == 2


ONE = "gallium keeps the surface of the copper catalyst active"
NEAR = "gallium keeps the surface of the copper catalyst very active"
FAR = "blocking myosin removed the dependence on stiffness"


async def test_similar_texts_are_found_by_embeddings(tmp_path: Path) -> None:
    texts = [ONE, FAR, NEAR, ONE.upper(), "", "it fails", "other model"]
    end, model = await dedup(texts, tmp_path, by="embeddings", threshold=0.8)
    assert groups(end) == {"i0": ["i3", "i2"], "i1": [], "i4": [], "i5": [], "i6": []}
    assert [one.id for one in model.asked] == ["i0", "i1", "i2", "i5", "i6"]
    report = end.report
    assert (report["equal_texts"], report["similar_texts"]) == (1, 1)
    assert (report["without_embedding"], report["other_lengths"]) == (1, 1)
    assert any("1 text with an embedding of another length" in line for line in report["lines"])
    (above,), (below,) = report["above"], report["below"]
    assert above["similarity"] >= 0.8 > below["similarity"]
    assert (above["kept"]["text"], above["other"]["text"]) == (ONE, NEAR)
    assert below["other"]["text"] == FAR
    assert report["largest"] == {"id": "i0", "text": ONE, "size": 3, "others": ["i3", "i2"]}
    assert any(ONE in line and NEAR in line for line in report["lines"])
    table = pa.ipc.open_file(str(tmp_path / VECTORS_FILE)).read_all()
    assert table.schema.field("vector").type == pa.list_(pa.float16(), 64)
    assert table.column("id").to_pylist() == ["i0", "i1", "i2", "i5"][:3]


async def test_a_second_session_finds_the_same(tmp_path: Path) -> None:
    texts = [f"{ONE} {n // 3}" for n in range(40)]
    first, _ = await dedup(texts, tmp_path, by="embeddings")
    second, _ = await dedup(texts, tmp_path, by="embeddings")
    assert list(first.results) == list(second.results)
    assert first.report == second.report


async def test_too_many_texts_are_compared_as_texts_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_VECTORS", 3)
    end, model = await dedup(["a", "b", "c", "d", "A"], tmp_path, by="embeddings")
    assert model.asked == []
    assert end.report["by"] == "text"
    assert end.report["kept"] == 4
    assert any("embeddings were not compared" in line for line in end.report["lines"])


async def test_all_embeddings_may_fail(tmp_path: Path) -> None:
    end, _ = await dedup(["fails 1", "fails 2"], tmp_path, by="embeddings")
    assert end.report["without_embedding"] == end.report["kept"] == 2


def compare_all(vectors: Any, threshold: float) -> list[int]:
    """Return the text that stands for each, one after the other."""
    scores = vectors.astype(np.float32) @ vectors.astype(np.float32).T
    stands = list[int]()
    for n in range(len(vectors)):
        kept = [other for other in range(n) if stands[other] == other]
        best = max(kept, key=lambda other: scores[n, other], default=n)
        stands.append(best if kept and scores[n, best] >= threshold else n)
    return stands


@pytest.mark.parametrize("block", [1, 7, 64, 1000])
def test_blocks_do_not_change_the_groups(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_BLOCK", block)
    random = np.random.default_rng(3)
    centres = random.normal(size=(40, 16))
    points = centres[random.integers(0, 40, 300)] + 0.4 * random.normal(size=(300, 16))
    vectors = (points / np.linalg.norm(points, axis=1, keepdims=True)).astype(np.float16)
    grouper = Grouper(vectors, 0.85)
    for start in grouper.blocks:
        grouper.add_block(start)
    found: Grouping = grouper.end()
    assert found.kept == compare_all(vectors, 0.85)
    assert 40 <= len(set(found.kept)) < 300
    assert all(pair.similarity >= 0.85 for pair in found.above)
    assert all(pair.similarity < 0.85 for pair in found.below)
    assert len(found.above) == len(found.below) == 3


def test_the_simulated_model_puts_similar_texts_near_to_each_other() -> None:
    one, near, far = (np.array(embed_text(text, 64, 0)) for text in (ONE, NEAR, FAR))
    assert one @ near > 0.85
    assert abs(one @ far) < 0.5


@pytest.mark.parametrize("kind", ["numbers", "base64"])
def test_vectors_are_read_in_both_forms(kind: str) -> None:
    given: Any = [3.0, 4.0]
    if kind == "base64":
        given = base64.b64encode(struct.pack("<2f", *given)).decode()
    packed = pack_answer({"data": [{"embedding": given}]})
    assert struct.unpack("<2e", base64.b64decode(packed)) == pytest.approx((0.6, 0.8), abs=1e-3)
