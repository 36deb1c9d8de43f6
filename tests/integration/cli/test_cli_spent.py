"""Reports of a run's cost: at its end, in its tables, and by ``fanfold cost``."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

import pyarrow.parquet as pq
import pytest

from fanfold.tests.journals import edit_journal

from .conftest import Served, Shell

pytestmark = pytest.mark.integration

PRICE = {"prompt": 1000, "cached_prompt": 500, "completion": 4000}
"""Dollars per million tokens: enough for cents to show."""


def simulated(*faults: dict[str, Any]) -> dict[str, Any]:
    return {"simulated": {"nodes": 2, "time_scale": 50, "faults": list(faults)}}


def test_nothing_is_said_of_dollars_where_nothing_has_a_price(shell: Shell) -> None:
    said = shell("run", "c.yaml", "--out", "r")
    assert said.code == 0, said.err
    told = json.loads(shell("status", "r", "--json").out)
    assert (told["usd"], told["wasted_usd"], told["node_usd"]) == (None, None, None)
    assert told["node_hours"] > 0
    assert told["budget"] == {}
    assert set(told["in_doubt"].values()) == {0, None}
    seen = [said.err, *(shell(*command).out for command in (["cost", "r"], ["status", "r"]))]
    assert not [text for text in seen if "USD" in text]
    table = shell("cost", "r", "--by", "model").out.splitlines()
    assert table[1].split() == [
        "model",
        "requests",
        "prompt",
        "cached",
        "completion",
        "wasted",
    ]
    for options in ((), ("--by", "model")):
        assert "set model.price" in shell("cost", "r", *options).err
    assert [line.split()[0] for line in table[2:]] == ["simulated-8b", "total"]
    assert pq.read_table("r/results.parquet").column("usd").to_pylist() == [None] * 3
    row = next(csv.DictReader(io.StringIO(shell("results", "r", "--format", "csv").out)))
    assert (row["usd"], row["wasted_tokens"]) == ("", "0")


def test_what_was_sent_back_is_wasted(shell: Shell) -> None:
    shell.write(
        endpoints=simulated({"kind": "bad_schema", "p": 1, "first_round": True}),
        model={"price": PRICE},
        limits={"hedge": False},
    )
    said = shell("run", "c.yaml", "--out", "r", "--json")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    tokens = told["tokens"]
    assert told["requests"] == 6
    assert 0 < tokens["wasted"] < tokens["prompt"] + tokens["completion"]
    assert tokens["useful"] + tokens["wasted"] == tokens["prompt"] + tokens["completion"]
    usd = (1000 * tokens["prompt"] + 4000 * tokens["completion"]) / 1e6
    assert told["usd"] == pytest.approx(usd)
    assert 0 < told["wasted_usd"] < usd
    rows = [json.loads(line) for line in shell("results", "r").out.splitlines()]
    assert sum(row["usd"] for row in rows) == pytest.approx(usd)
    assert sum(row["wasted_tokens"] for row in rows) == tokens["wasted"]
    assert all(row["repairs"] == 1 for row in rows)
    words = f"{told['usd']:.2f} USD, of which {told['wasted_usd']:.2f} wasted"
    again = shell("resume", "r")
    assert f"Cost: {words}" in again.err
    assert words in shell("status", "r").out

    said = shell("cost", "r")
    assert said.code == 0
    assert said.out.startswith("simulated: true")
    assert f"{told['usd']:.2f} USD" in said.out
    for by in ("model", "endpoint", "node", "day"):
        found = json.loads(shell("cost", "r", "--by", by, "--json").out)
        assert found["usd"] == told["usd"]
        assert found["running"] is False
        assert sum(row["requests"] for row in found[by]) == 6
        assert sum(row["usd"] for row in found[by]) == pytest.approx(usd)
        assert sum(row["tokens"]["wasted"] for row in found[by]) == tokens["wasted"]
    said = shell("cost", "r", "--by", "planet")
    assert said.code == 2
    assert "--by planet: choose one of model, endpoint, node, day" in said.err


def test_tables_of_cost_fit_80_columns(shell: Shell) -> None:
    shell.write(endpoints=simulated({"kind": "500", "p": 0.5}), model={"price": PRICE})
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    for command in (["cost", "r"], ["cost", "r", "--by", "endpoint"], ["status", "--endpoints"]):
        lines = shell(*command, *["r"] * (command[-1] == "--endpoints")).out.splitlines()
        assert max(map(len, lines)) <= 80
        assert not [line for line in lines if "…" in line]
    assert "wasted" in lines[-3] or "wasted" in lines[-2]


def test_a_budget_is_told_with_what_is_spent_of_it(shell: Shell) -> None:
    shell.write(model={"price": PRICE | {"node_hour": 3.6}, "max_tokens": 64})
    said = shell("run", "c.yaml", "--out", "r", "--json", "--budget-usd", "2")
    assert said.code == 0, said.err
    told = json.loads(said.out)
    assert told["budget"]["usd"]["cap"] == 2
    assert told["budget"]["usd"]["spent"] == pytest.approx(told["usd"], abs=1e-8)
    assert told["node_usd"] == pytest.approx(3.6 * told["node_hours"], rel=1e-3)
    assert told["usd"] > told["node_usd"] > 0
    later = json.loads(shell("status", "r", "--json").out)
    assert later["budget"] == told["budget"]
    assert "budget.usd" in shell("status", "r").out
    assert "node-hours held" in shell("resume", "r").err


def test_a_price_by_node_leaves_no_budget_waiting_for_ever(shell: Shell) -> None:
    """The reservation for node time is not given to waiting requests."""
    shell.write(
        model={"price": PRICE | {"node_hour": 1}, "max_tokens": 64},
        endpoints=simulated(),
    )
    said = shell("run", "c.yaml", "--out", "r", "--budget-requests", "2")
    assert said.code == 4, said.err
    assert "the budget is exhausted" in said.err


def test_deployments_of_other_names_have_rows_of_their_own(shell: Shell, fleet: Served) -> None:
    shell.write(endpoints={"urls": [*fleet.urls]}, limits={"streams": 1})
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    (file,) = (shell.folder / "r" / "journal").glob("*.jsonl")
    edit_journal(file, '"model":"simulated-8b"', '"model":"other-8b"')
    found = json.loads(shell("cost", "r", "--by", "model", "--json").out)["model"]
    assert {row["name"]: row["requests"] for row in found} == {"simulated-8b": 2, "other-8b": 1}


def test_damage_is_told(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    (file,) = (shell.folder / "r" / "journal").glob("*.jsonl")
    edit_journal(file, '"nano_usd":0', '"nano_usd":"0"')
    said = shell("cost", "r")
    assert said.code == 1
    assert "nano_usd is '0', not an integer" in said.err
    assert shell("cost", "nowhere").code == 2
