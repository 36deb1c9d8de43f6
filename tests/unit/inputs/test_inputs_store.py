from __future__ import annotations

import resource
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.backends.core.errors import InputError, JournalError
from fanfold.backends.core.types import Item, Json
from fanfold.backends.inputs.column_types import encode_schema
from fanfold.backends.inputs.item_store import (
    SCHEMA,
    SUMMARY_KEY,
    VERSION_KEY,
    ItemStore,
    StoreHeader,
    load_input,
)
from fanfold.configs.models import InputConfig

Put = Callable[[str, str | bytes], Path]

TEXT = st.text(st.characters(codec="utf-8"))
VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
ROWS = st.lists(st.dictionaries(TEXT.filter(lambda name: name != "id"), VALUES), min_size=1)


@settings(deadline=None, max_examples=40)
@given(ROWS)
def test_rows_come_back_as_they_were(rows: list[dict[str, Json]]) -> None:
    with TemporaryDirectory() as folder:
        target = Path(folder) / "items.arrow"
        summary = load_input(InputConfig(), target, [], items=rows)
        with ItemStore(target) as store:
            assert store.read(0, len(store)) == [
                Item(at, str(at + 1), row) for at, row in enumerate(rows)
            ]
            assert store.summary() == summary
    assert set(summary.columns) == {name for row in rows for name in row}


def numbers(count: int) -> list[dict[str, int]]:
    return [{"n": n} for n in range(count)]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    return folder / "items.arrow"


def test_the_longest_row_in_any_batch(target: Path) -> None:
    load_input(InputConfig(), target, ["n"], [*numbers(300), {"n": "ä" * 40}, *numbers(300)])
    with ItemStore(target) as store:
        assert store.find_longest_row() == len('{"n":""}') + 80


def test_single_items_in_any_order(target: Path) -> None:
    load_input(InputConfig(), target, ["n"], numbers(700), samples=2)
    with ItemStore(target) as store:
        indices = [1399, 0, 512, 513, 0, 700, 1]
        assert store.read_at(indices) == [store.read(at, at + 1)[0] for at in indices]
        assert store.read_at([]) == []


@pytest.mark.parametrize("count", [1, 255, 256, 257, 700])
def test_any_range(target: Path, count: int) -> None:
    load_input(InputConfig(), target, ["n"], numbers(count))
    with ItemStore(target) as store:
        assert len(store) == count
        for lo in (0, 1, 255, 256, 400, count):
            for hi in (lo, lo + 1, 256, 512, count):
                if lo <= hi <= count:
                    found = store.read(lo, hi)
                    assert [item.index for item in found] == list(range(lo, hi))
                    assert [item.row["n"] for item in found] == list(range(lo, hi))


@pytest.mark.parametrize(("lo", "hi"), [(-1, 1), (2, 1), (0, 4), (4, 4)])
def test_a_range_outside(target: Path, lo: int, hi: int) -> None:
    load_input(InputConfig(), target, [], numbers(3))
    with ItemStore(target) as store, pytest.raises(IndexError, match="of 3 in"):
        store.read(lo, hi)


def test_long_rows_make_small_batches(target: Path) -> None:
    load_input(InputConfig(), target, [], items=[{"x": "y" * 600_000, "n": n} for n in range(5)])
    with pa.ipc.open_file(str(target)) as reader:
        assert reader.num_record_batches == 4
    with ItemStore(target) as store:
        assert [item.row["n"] for item in store.read(1, 5)] == [1, 2, 3, 4]


def test_threads_may_read_together(target: Path) -> None:
    load_input(InputConfig(), target, [], numbers(5000))
    with ItemStore(target) as store, ThreadPoolExecutor(8) as pool:
        parts = pool.map(lambda lo: store.read(lo, lo + 100), range(0, 5000, 100))
        assert [item.row["n"] for part in parts for item in part] == list(range(5000))


def test_the_summary_needs_no_source(target: Path, put: Put) -> None:
    path = put("a.csv", "k,s\na,C\na,C\nb,C1\n")
    spec = InputConfig(path=str(path), id="k", on_duplicate="first", smiles="s")
    summary = load_input(spec, target, ["s"])
    path.unlink()
    with ItemStore(target) as store:
        assert store.summary() == summary
        assert (store.columns, store.digest) == (("k", "s"), summary.digest)
        assert (store.skipped, store.invalid) == (summary.skipped, 1)
    assert (summary.source, summary.items) == (str(path), 2)


def test_the_digest_tells_inputs_apart(target: Path) -> None:
    one = [{"id": "a", "x": "b"}]
    more = [*one, {"id": "b", "x": "b"}]
    inputs: dict[str, tuple[InputConfig, list[dict[str, str]]]] = {
        "same": (InputConfig(), one),
        "row": (InputConfig(), [{"id": "a", "x": "c"}]),
        "id": (InputConfig(id="x"), one),
        "more": (InputConfig(), more),
    }
    digests = {
        name: load_input(config, target, [], items).digest
        for name, (config, items) in inputs.items()
    }
    assert len(set(digests.values())) == 4
    assert load_input(InputConfig(limit=1), target, [], more).digest == digests["same"]


def test_a_failed_spill_leaves_the_old_store(target: Path) -> None:
    load_input(InputConfig(), target, [], numbers(3))
    with pytest.raises(InputError):
        load_input(InputConfig(), target, ["missing"], numbers(3))
    with ItemStore(target) as store:
        assert len(store) == 3
    assert [path.name for path in target.parent.iterdir()] == ["items.arrow"]


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("count", [10, 50_000])
def test_a_disk_that_takes_no_more(target: Path, count: int) -> None:
    with (
        largest_file(512),
        pytest.raises(JournalError, match=r"cannot be written to .*items\.arrow: File too large"),
    ):
        load_input(InputConfig(), target, [], numbers(count))
    assert list(target.parent.iterdir()) == []


def test_no_folder_to_write_to(tmp_path: Path, put: Put) -> None:
    with pytest.raises(JournalError, match="No such file or directory; free disk space or choose"):
        load_input(InputConfig(), tmp_path / "nowhere" / "items.arrow", [], numbers(1))
    with pytest.raises(JournalError, match="Not a directory"):
        load_input(InputConfig(), put("file", "x") / "items.arrow", [], numbers(1))


def arrow_file(path: Path, schema: pa.Schema, summary: bytes | None) -> None:
    empty = pa.record_batch([pa.array([], field.type) for field in schema], schema=schema)
    with pa.ipc.new_file(str(path), schema) as sink:
        sink.write_batch(empty, custom_metadata={SUMMARY_KEY: summary} if summary else None)


def test_files_that_are_no_store(target: Path) -> None:
    with pytest.raises(
        JournalError, match=r"items\.arrow is not a complete item store.*No such file"
    ):
        ItemStore(target)
    for content in (b"", b"x", b"x" * 10_000):
        target.write_bytes(content)
        with pytest.raises(JournalError, match=r"items\.arrow is not a complete item store"):
            ItemStore(target)
    arrow_file(target, pa.schema({"x": pa.int64()}), None)
    with pytest.raises(JournalError, match="it has other content"):
        ItemStore(target)
    arrow_file(target, SCHEMA.with_metadata({VERSION_KEY: b"99"}), None)
    with pytest.raises(JournalError, match="it has layout 99, this fanfold reads 2: finish"):
        ItemStore(target)


@pytest.mark.parametrize("summary", [None, b"{", b"[]", b"{}", b'{"starts": [0]}'])
def test_stores_with_a_damaged_summary(target: Path, summary: bytes | None) -> None:
    arrow_file(target, SCHEMA, summary)
    with pytest.raises(JournalError, match="is not a complete item store"):
        ItemStore(target)


def test_a_store_that_lacks_a_batch(target: Path) -> None:
    header = StoreHeader(
        (0, 256), 300, ("n",), "", (), 0, 0, "items", encode_schema(pa.schema({})), None
    )
    arrow_file(target, SCHEMA, header.to_json())
    with pytest.raises(JournalError, match="its summary and its batches differ"):
        ItemStore(target)


@pytest.mark.parametrize("cut", [1, 8, 100, 20_000])
def test_a_truncated_store(target: Path, cut: int) -> None:
    load_input(InputConfig(), target, [], numbers(3000))
    target.write_bytes(target.read_bytes()[:-cut])
    with pytest.raises(JournalError, match=r"items\.arrow is not a complete item store"):
        ItemStore(target)


def test_a_store_with_overwritten_rows(target: Path) -> None:
    load_input(InputConfig(), target, [], items=[{"x": "needle"}])
    target.write_bytes(target.read_bytes().replace(b'{"x":"needle"}', b'{"x":"needle!!'))
    with (
        ItemStore(target) as store,
        pytest.raises(JournalError, match="is not a complete item store"),
    ):
        store.read(0, 1)
