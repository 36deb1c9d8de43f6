from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fanfold.backends.core.errors import InputError, MissingExtraError
from fanfold.backends.core.types import Item, Row
from fanfold.backends.inputs.item_store import load_input
from fanfold.configs.models import InputConfig

Load = Callable[..., list[Item]]
Put = Callable[[str, str | bytes], Path]


def test_unparsable_smiles_stay_with_a_problem(
    tmp_path: Path, put: Put, capfd: pytest.CaptureFixture[str]
) -> None:
    path = put("a.jsonl", '{"s": "CCO "}\n{"s": "C1CC"}\n{"s": " "}\n{"s": 5}\n{"s": null}\n')
    target = tmp_path / "items.arrow"
    summary = load_input(InputConfig(path=str(path), smiles="s"), target, [])
    assert (summary.items, summary.invalid, summary.skipped) == (5, 4, ())
    assert capfd.readouterr() == ("", "")


def test_problems(load: Load) -> None:
    rows: list[Row] = [{"s": "CCO"}, {"s": "C1CC"}, {"s": " "}, {"s": 5}]
    assert [item.problem for item in load(InputConfig(smiles="s"), items=rows)] == [
        None,
        "SMILES 'C1CC' cannot be parsed by RDKit",
        "SMILES is blank",
        "SMILES 5 is not text",
    ]


def test_without_a_column_nothing_is_checked(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    assert load(InputConfig(), items=[{"s": "C1CC"}])[0].problem is None


def test_shipped_molecules_parse(load: Load) -> None:
    items = load(InputConfig(dataset="molecules", smiles="smiles"))
    assert [item.problem for item in items] == [None] * 20


def test_a_missing_column(load: Load) -> None:
    with pytest.raises(InputError, match=r"no column 'smile', which input\.smiles needs"):
        load(InputConfig(dataset="molecules", smiles="smile"))


def test_without_rdkit(load: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "rdkit", None)
    with pytest.raises(MissingExtraError, match="checking SMILES needs the extra 'chem'"):
        load(InputConfig(dataset="molecules", smiles="smiles"))
