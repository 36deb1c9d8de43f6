"""Several samples of each row: killed, on workers, extended, with failures."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from fanfold import load_results
from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.simulated.faults import FaultRule
from fanfold.tests.integration.runs.conftest import TASK, Lab, LabMaker

pytestmark = pytest.mark.integration

SAMPLES = 3
STREAMS = 16


def with_samples(lab: Lab, samples: int = SAMPLES, **model: Any) -> Lab:
    """Ask each row several times; each sample has a seed, so that answers differ and repeat."""
    lab.config["task"] = TASK | {"samples": samples}
    lab.config["model"] = {"temperature": 0.8, "seed": 100} | model
    lab.config["reduce"] = [*lab.config["reduce"], {"op": "count"}]
    return lab


def records(folder: Path) -> list[dict[str, Any]]:
    files = sorted((folder / "journal").glob("*.jsonl"))
    return [orjson.loads(line) for f in files for line in f.read_bytes().splitlines()[1:]]


def assert_whole(lab: Lab, aggregate: list[dict[str, Any]], again: int, samples: int) -> None:
    """Assert that each row has one result, as undisturbed, and each sample was asked for once."""
    found = json.loads((lab.out / "aggregate.json").read_bytes())
    assert orjson.dumps(found["aggregate"]) == orjson.dumps(aggregate)
    table = pq.read_table(lab.out / "results.parquet")
    undisturbed = pq.read_table(lab.home / "undisturbed" / "results.parquet")
    for name in ("id", "output", "agreement", "spread", "samples"):
        assert table.column(name).to_pylist() == undisturbed.column(name).to_pylist()
    assert table.column("id").to_pylist() == [f"i{n}" for n in range(lab.items)]
    lab.life_ended()
    book = lab.fleet.stats(prompts=True)["prompts"]
    assert len(book) == lab.items * samples
    assert lab.again <= again


async def test_killed_and_resumed(lab_of: LabMaker) -> None:
    """In the middle of a row too: nothing is asked twice but what was in flight."""
    async with lab_of(items=60) as lab:
        aggregate = await with_samples(lab).undisturbed()
        *_, counted, agreement = aggregate
        assert counted["done"] == 60
        assert (agreement["rows"], agreement["answers"], agreement["partial"]) == (60, 180, 0)
        assert 0.4 < agreement["agreement"]["kind"] < 0.9
        await lab.killed_at(50)
        await lab.killed_at(130, "resume", str(lab.out), "--quiet")
        result = await lab.live()
        assert (result.exit_code, result.progress["items"]) == (0, 180)
        assert_whole(lab, aggregate, 2 * STREAMS, SAMPLES)
        ids = Counter(record["id"] for record in records(lab.out))
        assert set(ids) == {f"i{n}{end}" for n in range(60) for end in ("", "~2", "~3")}


BACKENDS: dict[str, dict[str, Any]] = {
    "processes": {"kind": "local", "processes": 2},
    "records in results": {"kind": "local", "processes": 2, "shared_folder": False},
    "parsl": {"kind": "parsl", "workers": 2},
    "launched": {"kind": "launched", "workers": 2},
}


@pytest.mark.parametrize("name", BACKENDS)
async def test_on_workers(lab_of: LabMaker, name: str) -> None:
    """Shards of whole rows fold on the worker, others in the coordinator: with the same result."""
    async with lab_of(items=40, ttft_s=0.01) as lab:
        aggregate = await with_samples(lab).undisturbed()
        lab.config["limits"]["hedge"] = False
        await lab.killed_at(20)
        lab.config["backend"] = BACKENDS[name]
        lab.config["shard"] = {"items": 16}  # rounded up to whole rows
        settings = tuple(f"backend.{key}={value}" for key, value in BACKENDS[name].items())
        result = await lab.live(overrides=(*settings, "shard.items=16"))
        assert result.exit_code == 0
        assert_whole(lab, aggregate, STREAMS, SAMPLES)


async def test_samples_that_fail(lab_of: LabMaker) -> None:
    """The others are folded; a row fails if all of its samples do; retries make it whole."""
    async with lab_of(items=40, ttft_s=0.0, tpot_s=0.0) as lab:
        with_samples(lab).config["limits"]["hedge"] = False
        lab.config["task"] |= {"repairs": 0}
        lab.fleet.add_fault(FaultRule("bad_schema", p=0.6, draw="item"))
        result = await lab.live(await lab.begin())
        assert result.exit_code == 3
        *_, counted, agreement = result.aggregate
        table = pq.read_table(lab.out / "results.parquet").to_pylist()
        failed = Counter(r["id"].partition("~")[0] for r in records(lab.out) if r["error"])
        assert agreement["partial"] == sum(0 < failed[row["id"]] < SAMPLES for row in table) > 0
        assert counted["failed"] == agreement["without_answer"] > 0
        assert sum(failed.values()) == result.progress["failed"]
        for row in table:
            assert row["samples"] == SAMPLES - failed[row["id"]]
            assert row["status"] == ("done" if row["samples"] else "failed")
            assert (row["error_class"] is None) == (row["status"] == "done")
        lines = (lab.out / "failures.jsonl").read_bytes().splitlines()
        assert Counter(orjson.loads(line)["row_id"] for line in lines) == failed
        results = load_results(lab.out)
        assert (results.items, len(results), results.failed) == (40, 40, counted["failed"])
        assert len(results.samples()) == 120
        lab.fleet.reset()  # removes the faults
        again = await lab.live(retry_failed=True)
        assert again.exit_code == 0
        assert again.aggregate[-1]["answers"] == 120
        assert again.progress["requests"] == 120 + sum(failed.values())


async def test_rows_across_the_slices_of_a_shard_are_counted_once(lab_of: LabMaker) -> None:
    """A retry reads the ended items of a shard in slices, which must not divide a row."""
    async with lab_of(items=100, ttft_s=0.0, tpot_s=0.0) as lab:
        lab.config["shard"] = {"items": 300}
        aggregate = await with_samples(lab).undisturbed()
        lab.config["limits"]["hedge"] = False
        lab.config["task"] |= {"repairs": 0}
        lab.fleet.add_fault(FaultRule("bad_schema", p=0.01, draw="item"))  # 36, 193 and 292
        result = await lab.live(await lab.begin())
        assert 0 < result.progress["failed"] < 10
        lab.fleet.reset()
        again = await lab.live(retry_failed=True)
        assert again.exit_code == 0
        assert again.aggregate == aggregate


async def test_a_cache_answers_no_sample_with_another(lab_of: LabMaker) -> None:
    """Without seeds the samples ask the same; each has its own answer, once over two runs."""
    async with lab_of(items=10, ttft_s=0.0, tpot_s=0.0) as lab:
        with_samples(lab, 4, seed=None).config["limits"]["hedge"] = False
        lab.config |= {"cache": str(lab.home / "answers"), "cache_sampled": True}
        first = await lab.live(await lab.begin())
        assert (first.progress["requests"], first.progress["reused"]) == (40, 0)
        assert first.aggregate[-1]["agreement"]["kind"] < 1
        second = await lab.live(await lab.begin(lab.home / "second"))
        assert (second.progress["requests"], second.progress["reused"]) == (0, 40)
        assert second.aggregate == first.aggregate


async def test_the_fold_may_change(lab_of: LabMaker) -> None:
    """Of a finished run, without a request; the number of samples may not."""
    async with lab_of(items=10, ttft_s=0.0, tpot_s=0.0) as lab:
        first = await with_samples(lab).live(await lab.begin())
        asked = lab.fleet.stats()["totals"]
        result = await lab.live(overrides=("task.fold=vote",))
        assert result.exit_code == 0
        assert result.progress["requests"] == first.progress["requests"]
        assert "score" in result.aggregate[-1]["agreement"]
        assert lab.fleet.stats()["totals"] == asked
        with pytest.raises(ConfigurationError, match=r"task.samples: 3 → 4"):
            await lab.live(overrides=("task.samples=4",))
