from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fanfold.backends.core.errors import InputError, MissingExtraError
from fanfold.backends.core.types import Item
from fanfold.backends.inputs.item_store import load_input
from fanfold.configs.models import InputConfig

Load = Callable[..., list[Item]]


@pytest.mark.parametrize(
    ("name", "count", "columns"),
    [
        ("molecules", 20, ("mol_id", "name", "smiles")),
        ("abstracts", 12, ("id", "title", "abstract")),
        ("topics", 10, ("topic_id", "topic", "background", "constraint")),
        ("records", 20, ("record_id", "text", "label")),
        ("tables", 6, ("table_id", "title", "rows", "columns", "summary")),
    ],
)
def test_shipped(
    tmp_path: Path, load: Load, name: str, count: int, columns: tuple[str, ...]
) -> None:
    summary = load_input(InputConfig(dataset=name), tmp_path / "items.arrow", columns)
    assert (summary.items, summary.columns, summary.invalid) == (count, columns, 0)
    assert (summary.first.id, summary.source) == (f"{name[0].upper()}01", f"dataset {name}")
    assert all(all(item.row.values()) for item in load(InputConfig(dataset=name)))


def test_nci(tmp_path: Path) -> None:
    target = tmp_path / "items.arrow"
    summary = load_input(InputConfig(dataset="rdkit-nci5k"), target, ["smiles", "mol_id"])
    assert (summary.items, summary.columns) == (4991, ("mol_id", "smiles"))
    assert (summary.invalid, summary.skipped_total) == (0, 8)
    assert [one.id for one in summary.skipped][:3] == ["2110", "2917", "3249"]
    assert "cannot be parsed by RDKit" in summary.skipped[0].reason
    assert summary.first == Item(0, "1", {"mol_id": "1", "smiles": "CC1=CC(=O)C=CC1=O"})


def test_nci_with_limit_and_check(tmp_path: Path) -> None:
    spec = InputConfig(dataset="rdkit-nci5k", id="mol_id", smiles="smiles", limit=2097)
    summary = load_input(spec, tmp_path / "items.arrow", ["smiles"])
    assert (summary.items, summary.skipped_total, summary.invalid) == (2097, 0, 0)


def test_nci_without_rdkit(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(
        MissingExtraError, match=r"dataset: molecules.*pip install 'fanfold\[chem\]'"
    ):
        load(InputConfig(dataset="rdkit-nci5k"))
    assert len(load(InputConfig(dataset="molecules"), "smiles")) == 20


def test_nci_in_an_rdkit_without_data(
    tmp_path: Path, load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rdkit.RDConfig.RDDataDir", str(tmp_path))
    with pytest.raises(
        InputError, match=r"first_5K\.smi, which is missing in this build of RDKit; insta"
    ):
        load(InputConfig(dataset="rdkit-nci5k"))


def test_an_unknown_dataset(load: Load) -> None:
    with pytest.raises(
        InputError,
        match="unknown dataset 'molecule'; available: molecules, abstracts, topics, records, "
        r"tables, rdkit-nci5k; did you mean 'molecules'\?",
    ):
        load(InputConfig(dataset="molecule"))
