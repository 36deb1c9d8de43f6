from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fanfold.backends.core.errors import JournalError
from fanfold.backends.core.templates import ItemPrompt
from fanfold.backends.inputs.item_order import (
    OrderedItems,
    find_groups,
    find_late_repeat,
    write_order,
)
from fanfold.backends.inputs.item_store import ItemStore, load_input
from fanfold.configs.models import InputConfig

SYSTEM = "system:Answer briefly, and only from the text. " * 10


def choose(
    texts: Sequence[str], long_first: bool = True
) -> tuple[list[int], int] | tuple[None, None]:
    found = find_groups(len(texts), lambda rows: [texts[row] for row in rows], long_first)
    if found is None:
        return None, None
    groups, order = found
    assert sorted(order) == list(range(len(texts)))
    return order.tolist(), groups.prefix


def shuffled(texts: list[str]) -> list[str]:
    random.Random(1).shuffle(texts)
    return texts


def count_changes(names: Sequence[str]) -> int:
    return sum(one != other for one, other in pairwise(names))


def test_prompts_that_share_a_document_follow_each_other() -> None:
    document = "user:document {:03} " * 40
    texts = shuffled(
        [
            SYSTEM + document.replace("{:03}", f"{group:03}") + f"question {number}?"
            for group in range(60)
            for number in range(10)
        ]
    )
    order, prefix = choose(texts)
    assert order is not None
    assert prefix is not None
    assert len(SYSTEM) < prefix <= len(SYSTEM) + len(document)
    assert count_changes([texts[row][:prefix] for row in order]) == 59
    other, same = choose(texts, long_first=False)
    assert other is not None
    assert same == prefix
    assert other[0] == 0  # the group of the first item
    assert count_changes([texts[row][:prefix] for row in other]) == 59


def test_what_all_prompts_share_forms_no_groups() -> None:
    texts = [f"{SYSTEM}user:{number:05} with some more text of its own" for number in range(600)]
    assert choose(texts) == (None, None)


def test_what_most_prompts_share_forms_no_groups_either() -> None:
    """Every server keeps the text of a large group in its cache anyway."""
    texts = [f"{SYSTEM}user:{n:05} own text" for n in range(590)]
    assert choose(texts + [f"other {n}" for n in range(10)]) == (None, None)


def test_groups_go_before_items_without_one_and_larger_ones_first() -> None:
    def group(name: str, size: int) -> list[str]:
        return [f"user:{name} " * 100 + f"{n} " * 20 for n in range(size)]

    parts = [group(f"g{n:02}", 10 + n) for n in range(30)]
    alone = [f"user:alone {n:03} " * (10 + n) for n in range(50)]
    texts = shuffled([*(text for part in parts for text in part), *alone])
    order, _ = choose(texts)
    assert order is not None
    names = [texts[row].split(" ")[0] for row in order]
    assert count_changes(names[:-50]) == 29
    assert names[0] == "user:g29"
    lengths = [len(texts[row]) for row in order[-50:]]
    assert lengths == sorted(lengths, reverse=True)


def test_what_is_shared_further_follows_each_other_within_a_group() -> None:
    texts = shuffled(
        [
            f"user:book {book:02} " * 40 + f"chapter {chapter} " * 120 + f"question {n}"
            for book in range(30)
            for chapter in range(4)
            for n in range(6)
        ]
    )
    order, _ = choose(texts)
    assert order is not None
    assert count_changes([texts[row][:1600] for row in order]) == 30 * 4 - 1


def test_a_few_shared_prompts_among_many_and_small_runs_keep_their_order() -> None:
    texts = [f"user:{n:05} " * 50 for n in range(1000)]
    texts[3] = texts[900] = "user:shared " * 50
    assert choose(texts) == (None, None)
    assert choose(["user:shared " * 50] * 100) == (None, None)


def test_rows_without_a_prompt_are_ordered_too() -> None:
    texts = shuffled([f"user:document {n % 40:02} " * 50 + str(n) for n in range(400)])
    for row in range(0, 400, 7):
        texts[row] = ""
    order, _ = choose(texts)
    assert order is not None


DOCUMENTS = [
    {"document": f"document {n % 40} " * 60, "title": f"title {n % 40}", "question": f"{n} why?"}
    for n in range(400)
]


def test_a_repeated_column_after_one_that_differs_is_found() -> None:
    prompt = ItemPrompt.parse({"prompt": "{question}\n\n{document}", "system": SYSTEM})
    found = find_late_repeat(prompt, DOCUMENTS)
    assert found is not None
    assert (found.repeated, found.differing) == ("{document}", "{question}")
    text = sum(len(row["document"]) + len(row["question"]) + 2 for row in DOCUMENTS)
    reused = sum(len(row["document"]) for row in DOCUMENTS[40:])
    assert found.share == pytest.approx(reused / (text + 400 * len(SYSTEM)), rel=0.01)
    assert "task.prompt: {document} is repeated but comes after {question}" in str(found)


def test_constant_text_after_a_column_is_found() -> None:
    rules = "Answer in one word. " * 40
    prompt = ItemPrompt.parse(
        {
            "messages": [
                {"role": "system", "content": "About {question}"},
                {"role": "user", "content": f"{rules}{{document}}"},
            ]
        }
    )
    found = find_late_repeat(prompt, DOCUMENTS)
    assert found is not None
    assert found.repeated == "the text 'Answer in one word. Answer in one word. …'"
    assert str(found).startswith("task.messages[0].content and task.messages[1].content: ")


@pytest.mark.parametrize(
    "prompt",
    [
        "{document}\n{question}",
        "{title}: {document}\n{question}",  # the title differs as the document does
        "Answer: {question}",
        "{question} {title}",  # short: fewer characters than a server caches
        "constant",
    ],
)
def test_prompts_whose_order_is_good_give_no_hint(prompt: str) -> None:
    assert find_late_repeat(ItemPrompt.parse({"prompt": prompt}), DOCUMENTS) is None
    assert find_late_repeat(ItemPrompt.parse({"prompt": prompt}), []) is None


def test_texts_that_do_not_repeat_give_no_hint() -> None:
    rows = [{"document": f"{n} " * 200, "question": f"{n} why?"} for n in range(400)]
    prompt = ItemPrompt.parse({"prompt": "{question}\n{document}"})
    assert find_late_repeat(prompt, rows) is None


@pytest.fixture
def store_of(tmp_path: Path) -> object:
    def make(rows: int, samples: int = 1) -> ItemStore:
        target = tmp_path / "items.arrow"
        load_input(
            InputConfig(id="id"),
            target,
            ["x"],
            [{"id": f"r{n}", "x": n} for n in range(rows)],
            samples=samples,
        )
        return ItemStore(target)

    return make


@pytest.mark.parametrize("samples", [1, 3])
def test_stored_orders_are_read_by_position(store_of: object, tmp_path: Path, samples: int) -> None:
    assert callable(store_of)
    order = np.random.default_rng(0).permutation(600)
    write_order(tmp_path / "order.npy", order)
    with store_of(600, samples) as store:
        items = OrderedItems(store, tmp_path / "order.npy", samples)
        assert len(items) == len(store) == 600 * samples
        wanted = [int(row) * samples + n for row in order for n in range(samples)]
        assert items.indices(0, len(items)) == wanted
        assert items.indices(4, 11) == wanted[4:11]
        assert [items.position(index) for index in wanted] == list(range(len(wanted)))
        assert items.read(100, 400) == [store.read(i, i + 1)[0] for i in wanted[100:400]]
        with pytest.raises(IndexError):
            store.read_at([0, len(store)])


def test_orders_of_other_items_and_damaged_ones_are_refused(
    store_of: object, tmp_path: Path
) -> None:
    assert callable(store_of)
    path = tmp_path / "order.npy"
    write_order(path, np.arange(300))
    with store_of(400) as store:
        with pytest.raises(JournalError, match="is the order of other items"):
            OrderedItems(store, path)
        path.write_bytes(path.read_bytes()[:200])
        with pytest.raises(JournalError, match=r"order\.npy is damaged"):
            OrderedItems(store, path)
    with pytest.raises(JournalError, match="cannot be written"):
        write_order(path, np.arange(300))
