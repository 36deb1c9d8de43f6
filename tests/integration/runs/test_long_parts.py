"""Parts of documents that turn out to be too long for the model: asked in pieces, paid once."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from fanfold.backends.core.errors import EXIT_BUDGET
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.configs.loader import load_config
from fanfold.graphs.run.pipeline import prepare_pipeline
from fanfold.tests.integration.runs.conftest import STREAMS, Lab, LabMaker

pytestmark = pytest.mark.integration

SCHEMA = {
    "type": "object",
    "additionalProperties": False,
    "required": ["claims", "kind", "score"],
    "properties": {
        "claims": {"type": "array", "minItems": 1, "items": {"type": "string", "maxLength": 20}},
        "kind": {"type": "string", "enum": ["a", "b", "c"]},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
    },
}


def use_papers(lab: Lab, papers: int, words: int = 1200, **split: Any) -> Lab:
    """Give the lab long documents, of which each sentence is different."""
    path = lab.home / "papers.jsonl"
    rows = [
        {"id": f"P{n}", "text": " ".join(f"Finding {n}-{i} is new." for i in range(words // 4))}
        for n in range(papers)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    lab.config["input"] = {
        "path": str(path),
        "id": "id",
        "split": {"tokens": 1200, "overlap": 60} | split,
    }
    lab.config["task"] = {"prompt": "List the claims. {text}", "schema": SCHEMA}
    lab.config["model"] = {"max_tokens": 150}
    lab.config["reduce"] = [{"op": "count"}]
    lab.config["limits"] |= {"hedge": False}
    return lab


def shorten_context(lab: Lab, tokens: int) -> None:
    """Let the servers have a shorter context than they said when the run was prepared."""
    lab.fleet.add_fault(FaultRule("context", value=tokens))


def records(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "journal").glob("*.jsonl"))
    return [orjson.loads(line) for f in files for line in f.read_bytes().splitlines()[1:]]


def assert_pieces_cover(found: list[dict[str, Any]], parts: dict[str, dict[str, Any]]) -> None:
    for record in found:
        part, pieces = parts[record["id"]], record.get("pieces") or []
        if not pieces:
            continue
        assert pieces[0]["start"] == part["start"]
        assert pieces[-1]["end"] == part["end"]
        for one, after in itertools.pairwise(pieces):
            assert one["start"] < after["start"] <= one["end"] < after["end"]


@pytest.mark.parametrize("size", [20, 1], ids=["walked", "by the engine"])
async def test_a_refused_part_is_answered_in_pieces(lab_of: LabMaker, size: int) -> None:
    async with lab_of(ttft_s=0.0, tpot_s=0.0) as lab:
        use_papers(lab, 4).config["shard"] = {"items": size}
        folder = await lab.begin()
        shorten_context(lab, 700)
        result = await lab.live(folder)
        assert (result.exit_code, result.progress["failed"]) == (0, 0)
        table = pq.read_table(folder.results).to_pylist()
        parts = {row["id"]: row["part"] for row in table}
        found = records(folder.path)
        assert_pieces_cover(found, parts)
        split = [record for record in found if record.get("pieces")]
        assert len(split) >= 4
        for record in split:
            assert len(record["output"]["claims"]) >= len(record["pieces"]) > 1
            assert record["output"]["kind"] in {"a", "b", "c"}
            assert 0 <= record["output"]["score"] <= 1
            assert record["requests"] > len(record["pieces"])
            assert record["useful_tokens"] > 0
        pieces = {record["id"]: len(record.get("pieces") or ()) or None for record in found}
        assert {row["id"]: row["pieces"] for row in table} == pieces
        assert not folder.responses.exists(), "no item needs the answers about pieces any more"
        short = [record for record in found if not record.get("pieces")]
        assert all(record["requests"] == 1 for record in short)
        sums = sum(record["prompt_tokens"] + record["completion_tokens"] for record in found)
        assert sum(result.progress["tokens"][name] for name in ("prompt", "completion")) == sums


async def test_parts_reuse_no_answers_of_others(lab_of: LabMaker) -> None:
    """With ``cache: off``, equal documents are asked, each for itself."""
    async with lab_of(ttft_s=0.0, tpot_s=0.0) as lab:
        use_papers(lab, 1, words=600)
        path = Path(lab.config["input"]["path"])
        text = json.loads(path.read_text())["text"]
        rows = [json.dumps({"id": f"P{n}", "text": text}) for n in range(6)]
        path.write_text("\n".join(rows))
        lab.config["model"]["temperature"] = 0.9
        folder = await lab.begin()
        shorten_context(lab, 600)
        assert (await lab.live(folder)).exit_code == 0
        found = [record for record in records(folder.path) if record.get("pieces")]
        assert len(found) >= 6
        assert {record["reused"] for record in found} == {0}
        assert all(record["requests"] > len(record["pieces"]) for record in found)


async def test_an_answer_that_the_context_cuts_is_asked_in_pieces(lab_of: LabMaker) -> None:
    """The prompt fits, and leaves too little room for the answer."""
    async with lab_of(ttft_s=0.0, tpot_s=0.0) as lab:
        use_papers(lab, 1, words=400)
        folder, other = await lab.begin(), await lab.begin(lab.home / "again")
        first = await lab.live(folder)
        (whole,) = records(folder.path)
        shorten_context(lab, whole["prompt_tokens"] + 3)
        again = await lab.live(other)
        assert (first.exit_code, again.exit_code) == (0, 0)
        (record,) = records(lab.home / "again")
        assert len(record["pieces"]) > 1
        assert record["question"] == whole["question"]
        assert record["prompt_tokens"] + record["completion_tokens"] > record["useful_tokens"] > 0


async def test_a_prompt_that_is_too_long_without_its_part_fails(lab_of: LabMaker) -> None:
    async with lab_of(ttft_s=0.0, tpot_s=0.0) as lab:
        use_papers(lab, 2).config["task"]["system"] = "Be brief. " * 100
        folder = await lab.begin()
        shorten_context(lab, 200)
        result = await lab.live(folder)
        assert result.exit_code == 3
        assert {record["error_class"] for record in records(folder.path)} == {"PromptTooLongError"}
        assert folder.responses.is_dir(), "a retry does not pay again for pieces with an answer"
        assert result.progress["tokens"]["prompt"] == 0


BACKENDS: dict[str, dict[str, Any]] = {
    "local": {"kind": "local"},
    "processes": {"kind": "local", "processes": 2},
}


@pytest.mark.parametrize("name", BACKENDS)
async def test_killed_between_pieces(lab_of: LabMaker, name: str) -> None:
    """A later session does not pay again for the pieces that were answered."""
    async with lab_of(ttft_s=0.02) as lab:
        use_papers(lab, 24, words=2400)
        lab.config["backend"] = BACKENDS[name]
        folder = await lab.begin()
        shorten_context(lab, 500)
        for lines in (2, 20):
            await lab.killed_at(lines, "resume", str(lab.out), "--quiet")
        result = await lab.live(folder)
        lab.life_ended()
        assert (result.exit_code, result.progress["failed"]) == (0, 0)
        ended = records(lab.out)
        assert len({record["id"] for record in ended}) == result.progress["items"]
        assert sum(record["reused"] for record in ended) > 0
        streams = STREAMS if name == "local" else 2 * STREAMS
        assert lab.again <= 2 * streams


async def test_the_budget_ends_between_pieces(lab_of: LabMaker) -> None:
    """No piece is paid twice after the limit was raised, and no token is left out of the sums."""
    async with lab_of() as lab:
        use_papers(lab, 12, words=2400).config["budget"] = {"requests": 90}
        folder = await lab.begin()
        shorten_context(lab, 500)
        first = await lab.live(folder)
        assert first.exit_code == EXIT_BUDGET
        assert first.progress["done"] < first.progress["items"]
        lab.life_ended()
        last = await lab.live(overrides=("budget.requests=10000",))
        lab.life_ended()
        assert (last.exit_code, last.progress["failed"]) == (0, 0)
        ended = records(lab.out)
        assert sum(record["reused"] for record in ended) > 0
        assert lab.again == 0
        served = lab.fleet.stats()["totals"]
        assert last.budget is not None
        assert last.budget["requests"]["spent"] == served["requests"]
        assert last.cost is not None
        noted, rest = last.cost.usage, last.cost.unaccounted
        assert noted.requests + rest.requests == served["requests"]
        tokens = served["prompt_tokens"] + served["completion_tokens"]
        assert noted.prompt_tokens + noted.completion_tokens + rest.tokens == tokens


async def test_later_stages_and_merged_documents(lab_of: LabMaker) -> None:
    """A stage that reads the text of the parts again splits them, too."""
    async with lab_of(ttft_s=0.0, tpot_s=0.0) as lab:
        use_papers(lab, 3)
        task = lab.config.pop("task")
        lab.config["stages"] = [
            {
                "name": "first",
                "map": {"prompt": "A part? {part.number}", "schema": {"enum": [1, 2]}},
            },
            {"name": "read", "map": task},
            {"name": "papers", "reduce": {"op": "merge", "field": "read", "text": "text"}},
        ]
        del lab.config["reduce"]
        settings = lab.home / "config.yaml"
        settings.write_bytes(orjson.dumps(lab.config))
        async with lab.process("run", str(settings), "--out", str(lab.out), "--quiet") as process:
            await lab.until((lab.out / "stages" / "first" / "journal").exists)
            shorten_context(lab, 700)
            assert await process.wait() == 0
        read = records(lab.out / "stages" / "read")
        assert {record["status"] for record in read} == {"done"}
        assert sum(bool(record.get("pieces")) for record in read) >= 3
        papers = pq.read_table(lab.out / "stages" / "papers" / "results.parquet").to_pylist()
        assert [row["id"] for row in papers] == ["P0", "P1", "P2"]
        for row in papers:
            assert row["parts"]["missing"] == []
            claims = [
                one for r in read if r["id"].startswith(row["id"]) for one in r["output"]["claims"]
            ]
            assert sorted(row["output"]["claims"]) == sorted(claims)


async def test_both_models_of_a_cascade_split_parts(lab_of: LabMaker) -> None:
    """Over papers: neither model has room for a whole part."""
    spec: dict[str, Any] = {"ttft_s": 0.0, "tpot_s": 0.0}
    async with (
        lab_of(responder="labels", **spec) as lab,
        SimulatedFleet(
            SimulationSpec.fast(nodes=1, model="small", responder="labels", accuracy=0.7, **spec)
        ) as small,
    ):
        use_papers(lab, 30, words=600)
        del lab.config["task"], lab.config["reduce"]
        kind = {"type": "string", "enum": ["a", "b", "c"]}
        schema = {"type": "object", "required": ["kind"], "properties": {"kind": kind}}
        task = {"prompt": "Which kind is {text}?", "schema": schema}
        models = {"model": {"name": "small"}, "endpoints": {"urls": list(small.urls)}}
        cascade = {"field": "kind", "small": models, "target": 0.8}
        lab.config["stages"] = [{"name": "label", "map": task, "cascade": cascade}]
        folder = await prepare_pipeline(load_config(lab.config), lab.out)
        for fleet in (lab.fleet, small):
            fleet.add_fault(FaultRule("context", value=500))
        async with lab.process("resume", str(folder.path), "--quiet") as process:
            assert await process.wait() == 0
        label = folder.path / "stages" / "label"
        rows = pq.read_table(label / "results.parquet").to_pylist()
        assert {row["status"] for row in rows} == {"done"}
        assert {row["output"]["kind"] for row in rows} <= {"a", "b", "c"}
        ended = [record for level in (label / "levels").iterdir() for record in records(level)]
        assert {record["status"] for record in ended} == {"done"}
        split = {record["model"] for record in ended if record.get("pieces")}
        assert split == {"small", "simulated-8b"}
