"""``input.split``: parts of documents as items, with ids and places."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError, InputError
from fanfold.backends.core.types import Item
from fanfold.backends.inputs.base import InputSummary
from fanfold.backends.inputs.item_store import ItemStore, load_input
from fanfold.configs.loader import load_config
from fanfold.configs.models import InputConfig

TEXT = "One sentence of some words. " * 60


def load(
    tmp_path: Path, rows: Sequence[dict[str, Any]], columns: Sequence[str] = (), **more: Any
) -> tuple[InputSummary, list[Item]]:
    split = {"tokens": 100, "overlap": 10} | more.pop("split", {})
    only = more.pop("only", None)
    config = InputConfig.model_validate({"id": "id", "split": split, **more})
    target = tmp_path / "items.arrow"
    summary = load_input(config, target, columns, rows, only=only)
    with ItemStore(target) as store:
        return summary, store.read(0, len(store))


def test_parts_have_ids_and_places(tmp_path: Path) -> None:
    rows = [{"id": "a", "title": "A", "text": TEXT}, {"id": "b", "title": "B", "text": "short"}]
    summary, items = load(tmp_path, rows, ["title", "part.number"])
    *of_a, last = items
    assert [item.id for item in of_a] == [f"a/p{n}" for n in range(1, len(of_a) + 1)]
    assert len(of_a) > 3
    for item in of_a:
        part = item.row["part"]
        assert item.row["text"] == TEXT[part["start"] : part["end"]]
        assert (part["document"], part["of"]) == ("a", len(of_a))
        assert item.row["title"] == "A"
    assert last.id == "b/p1"
    assert last.row["part"] == {"document": "b", "number": 1, "of": 1, "start": 0, "end": 5}
    assert "parts of at most 100 tokens" in summary.source
    assert load(tmp_path, rows)[0].digest == summary.digest


@pytest.mark.parametrize("text", [None, "", " \n ", [], [None], ["", " "]])
def test_a_document_without_text_has_no_parts(tmp_path: Path, text: Any) -> None:
    """It is not asked, and is counted with the rows that were skipped."""
    summary, items = load(tmp_path, [{"id": "a", "text": text}, {"id": "b", "text": "x"}])
    assert [item.id for item in items] == ["b/p1"]
    assert (summary.skipped_total, summary.invalid) == (1, 0)
    (skipped,) = summary.skipped
    assert skipped.id == "a"
    assert "'text' has no text" in skipped.reason
    with pytest.raises(InputError, match=r"no rows \(1 were skipped\)"):
        load(tmp_path, [{"id": "a", "text": text}])


def test_documents_without_text_do_not_count_for_the_limit(tmp_path: Path) -> None:
    rows = [{"id": name, "text": "" if name == "a" else "x"} for name in "abc"]
    _, items = load(tmp_path, rows, limit=1)
    assert [item.id for item in items] == ["b/p1"]


@pytest.mark.parametrize("text", [{"a": "b"}, ["x", {"text": "y"}], [["x"]], ["x", True]])
def test_what_cannot_be_cut_fails_without_a_call(tmp_path: Path, text: Any) -> None:
    summary, (item,) = load(tmp_path, [{"id": "a", "text": text}])
    assert (item.id, item.row["text"]) == ("a/p1", text)
    assert "column 'text' is " in str(item.problem)
    assert "a list of texts, its paragraphs" in str(item.problem)
    assert summary.invalid == 1


def test_a_number_is_one_part(tmp_path: Path) -> None:
    _, (item,) = load(tmp_path, [{"id": "a", "text": 7}])
    assert (item.row["text"], item.problem) == (7, None)


def test_numbers_in_a_list_are_paragraphs_too(tmp_path: Path) -> None:
    _, (item,) = load(tmp_path, [{"id": "a", "text": ["x", 1, None, 2.5]}])
    assert item.row["text"] == "x\n\n1\n\n2.5"


def test_a_list_of_texts_is_read_as_paragraphs(tmp_path: Path) -> None:
    _, items = load(tmp_path, [{"id": "a", "text": [TEXT, TEXT]}])
    whole = f"{TEXT}\n\n{TEXT}"
    assert items[-1].row["part"]["end"] == len(whole)


def test_the_limit_counts_documents(tmp_path: Path) -> None:
    rows = [{"id": name, "text": TEXT} for name in "abc"]
    _, items = load(tmp_path, rows, limit=2)
    assert {item.row["part"]["document"] for item in items} == {"a", "b"}


def test_parts_are_selected_by_their_ids(tmp_path: Path) -> None:
    rows = [{"id": name, "text": TEXT} for name in "ab"]
    _, items = load(tmp_path, rows, only={"b/p2", "a/p1"})
    assert [item.id for item in items] == ["a/p1", "b/p2"]


def test_a_column_of_the_same_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="column 'part'"):
        load(tmp_path, [{"id": "a", "text": TEXT, "part": 1}])


def test_a_missing_text_column_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no column 'body', which input\.split\.column needs"):
        load(tmp_path, [{"id": "a", "text": TEXT}], split={"column": "body"})


def test_an_overlap_of_half_a_part_is_refused() -> None:
    with pytest.raises(ValueError, match="less than half"):
        InputConfig.model_validate({"split": {"tokens": 100, "overlap": 50}})


def settings(**changes: Any) -> dict[str, Any]:
    split = {"tokens": 100, "overlap": 10, "merge": "concat"}
    base = {"input": {"dataset": "abstracts", "split": split}, "endpoints": "auto"}
    return base | {"task": {"prompt": "{text}"}} | changes


def test_merge_adds_a_stage() -> None:
    loaded = load_config(settings(reduce=[{"op": "count"}]))
    assert loaded.config.stages is not None
    parts, documents = loaded.config.stages
    assert (parts.name, documents.name, documents.source) == ("parts", "documents", "parts")
    assert loaded.plain["stages"][1]["reduce"]["field"] == "parts"
    assert parts.reduce
    again = load_config(loaded.plain)  # as a run folder keeps it
    assert again.plain == loaded.plain


def test_merge_follows_the_first_stage() -> None:
    read = {"name": "read", "map": {"prompt": "{text}"}}
    last = {"name": "last", "map": {"prompt": "{documents}"}}
    data = settings(stages=[read, last])
    del data["task"]
    data["input"]["split"]["merge"] = "summarize"
    loaded = load_config(data)
    assert [stage.name for stage in loaded.config.stages or ()] == ["read", "documents", "last"]
    summarize = loaded.plain["stages"][1]["reduce"]
    assert (summarize["op"], summarize["group_by"]) == ("summarize", "part.document")


def test_merge_needs_answers() -> None:
    rank = {"name": "best", "reduce": {"op": "rank", "prompt": "The best."}}
    data = settings(stages=[rank])
    del data["task"]
    with pytest.raises(ConfigurationError, match="merge"):
        load_config(data)
