"""Pipelines over public data from end to end: abstracts with labels, and molecules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest

import fanfold

from .conftest import Shell

pytestmark = [pytest.mark.integration, pytest.mark.long]

DATA: Final = Path(str(fanfold.__file__)).resolve().parents[1] / "shared" / "data"


def find(name: str) -> str:
    """Return the path of a data set, which is not part of the project."""
    path = DATA / name
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    return str(path)


def make_schema(**properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": list(properties),
        "properties": properties,
    }


def run(shell: Shell, **sections: Any) -> dict[str, dict[str, Any]]:
    """Run a pipeline on the simulated fleet; return its stages by name."""
    shell.write(task=None, reduce=None, **sections)
    said = shell("run", "c.yaml", "--out", "run", "--json")
    assert said.code == 0, said.err
    assert shell("report", "run").code == 0
    return {one["stage"]: one for one in json.loads(said.out)["stages"]}


def read_results(shell: Shell, stage: str) -> list[dict[str, Any]]:
    lines = shell("results", "run", "--stage", stage).out.splitlines()
    return [json.loads(line) for line in lines]


def test_abstracts_are_split_merged_ranked_and_summarized(shell: Shell) -> None:
    path = find("pubmedqa_500.jsonl")
    schema = make_schema(
        answer={"type": "string", "enum": ["yes", "no", "maybe"]},
        score={"type": "number", "minimum": 0, "maximum": 1},
        findings={
            "type": "array",
            "maxItems": 3,
            "items": {"type": "string", "maxLength": 100},
        },
    )
    rank = {"op": "rank", "k": 10, "prompt": "Best evidence.", "text": "{question} {papers.answer}"}
    review = {"op": "summarize", "prompt": "Sum up.", "text": "{findings}", "group_by": "year"}
    split = {"column": "abstract", "tokens": 300, "overlap": 30}
    found = run(
        shell,
        input={"path": path, "id": "pmid", "split": split},
        model={"max_tokens": 1000},
        stages=[
            {"name": "read", "map": {"prompt": "{question}\n\n{abstract}", "schema": schema}},
            {
                "name": "papers",
                "reduce": {"op": "merge", "field": "read", "how": "vote", "text": "abstract"},
            },
            {"name": "top", "where": "output.score > 0.5", "reduce": rank},
            {
                "name": "findings",
                "from": "read",
                "reduce": {"op": "extract", "path": "read.findings[]"},
            },
            {"name": "unique", "reduce": {"op": "dedup", "text": "{findings}"}},
            {"name": "review", "reduce": review | {"verify": 20}},
        ],
    )
    rows = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
    papers = read_results(shell, "papers")
    assert [one["id"] for one in papers] == [row["pmid"] for row in rows]
    assert found["read"]["items"] == sum(one["parts"]["of"] for one in papers) > len(papers)
    assert [one["output"]["rank"] for one in read_results(shell, "top")] == list(range(1, 11))
    unique = {one["id"] for one in read_results(shell, "unique")}
    cited = {
        source
        for one in read_results(shell, "review")
        for statement in one["output"]["statements"]
        for source in statement["sources"]
    }
    assert cited
    assert cited <= unique
    assert found["review"]["report"]["verified"]["pairs"] == 20


def test_molecules_are_scored_and_ranked(shell: Shell) -> None:
    schema = make_schema(logS={"type": "number", "minimum": -12, "maximum": 2})
    rank = {"op": "rank", "k": 10, "prompt": "Rank by solubility in water.", "text": "{smiles}"}
    found = run(
        shell,
        input={"path": find("esol.csv")},
        endpoints={"simulated": {"nodes": 4, "responder": "esol", "time_scale": 50}},
        stages=[
            {"name": "score", "map": {"prompt": "SMILES: {smiles}", "schema": schema}},
            {"name": "shortlist", "where": "output.logS > -1", "reduce": rank},
        ],
    )
    assert (found["score"]["results"], found["score"]["failed"]) == (1128, 0)
    counts = found["shortlist"]["passed_on"]
    best = [one["output"]["logS"] > -1 for one in read_results(shell, "score")]
    assert counts == {"passed": sum(best), "failed": 0, "unselected": 1128 - sum(best)}
    assert [one["score"]["logS"] > -1 for one in read_results(shell, "shortlist")] == [True] * 10
