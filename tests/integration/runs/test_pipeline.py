"""Pipelines on a real fleet: stages follow each other, survive kill -9, and share one budget."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import uuid
from functools import partial
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from fanfold import load_results
from fanfold.backends.budget.spend_log import SpendLogs
from fanfold.backends.storage.run_folder import RunFolder, get_run_ids
from fanfold.configs.loader import load_config
from fanfold.graphs.run.pipeline_report import list_raise_options, read_pipeline
from fanfold.graphs.run.stage_folder import is_finished
from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.integration.runs.test_workers_kill import marked
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration

STREAMS = 2
ITEMS = 60
SCREEN = {
    "prompt": "What is {x}?",
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["score", "kind"],
        "properties": {
            "score": {"type": "number", "minimum": 0, "maximum": 1},
            "kind": {"type": "string", "enum": ["a", "b"]},
        },
    },
}
CLAIM = {
    "prompt": "Is {x} of kind {screen.kind}?",
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["claim"],
        "properties": {"claim": {"type": "string", "maxLength": 30}},
    },
}
SUMMARIZE = {
    "op": "summarize",
    "prompt": "Summarize.",
    "text": "{x}" + " and whatever else is known about it" * 2,
    "group_by": "screen.kind",
    "group_tokens": 100,
    "statements": 2,
}
RUNS = ("stages/screen", "stages/claims", "stages/summary/levels/1", "stages/summary/levels/2")
"""The first runs of the pipeline, in order."""


def staged(lab: Lab, **changes: Any) -> Lab:
    for key in ("task", "reduce"):
        del lab.config[key]
    lab.config |= {
        "model": {"max_tokens": 1000},
        "limits": {"streams": STREAMS, "hedge": False},
        "stages": [
            {"name": "screen", "map": SCREEN, "reduce": [{"op": "count"}]},
            {"name": "claims", "where": "output.score > 0.2", "map": CLAIM},
            {"name": "summary", "join": "id", "reduce": SUMMARIZE},
        ],
    } | changes
    return lab


async def command(lab: Lab, *arguments: str, code: int = 0) -> dict[str, Any]:
    """Run the command line to its end; return what it prints as JSON."""
    async with lab.process(*arguments, "--json") as process:
        said, _ = await asyncio.wait_for(process.communicate(), 600)
        assert process.returncode == code, said
    found: dict[str, Any] = json.loads(said) if said else {}
    return found


async def begin(lab: Lab, out: Path, *, code: int = 0) -> dict[str, Any]:
    settings = lab.home / "pipeline.yaml"
    settings.write_bytes(orjson.dumps(lab.config))
    return await command(lab, "run", str(settings), "--out", str(out), code=code)


def lines_of(folder: Path) -> int:
    files = (folder / "journal").glob("*.jsonl")
    return sum(max(0, file.read_bytes().count(b"\n") - 1) for file in files)


def has_lines(folder: Path) -> bool:
    return lines_of(folder) >= 1


def outputs(root: Path) -> bytes:
    """Return all results of all stages and levels, without times and costs."""
    found = list[Any]()
    for file in sorted(root.glob("stages/**/items.arrow")):
        table = load_results(file.parent).to_arrow()
        times = ("latency_s", "finished_at", "endpoint", "attempts", "fingerprint")
        paid = ("requests", "reused", "wasted_tokens")
        rows = table.drop_columns([n for n in (*times, *paid) if n in table.column_names])
        found.append([str(file.relative_to(root)), rows.to_pylist()])
    return orjson.dumps(found)


async def test_three_stages_end_to_end(lab_of: LabMaker) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.0, tpot_s=0.0) as lab:
        staged(lab)
        said = await begin(lab, lab.out)
        screen, claims, summary = said["stages"]
        assert [one["state"] for one in said["stages"]] == ["finished"] * 3
        assert (screen["items"], screen["results"], screen["failed"]) == (ITEMS, ITEMS, 0)
        table = pq.read_table(lab.out / "stages/screen/results.parquet").to_pylist()
        chosen = {row["id"]: row["output"] for row in table if row["output"]["score"] > 0.2}
        assert claims["passed_on"] == {
            "passed": len(chosen),
            "failed": 0,
            "unselected": ITEMS - len(chosen),
        }
        rows = pq.read_table(lab.out / "stages/claims/results.parquet").to_pylist()
        assert {row["id"]: row["screen"] for row in rows} == chosen
        assert [row["id"] for row in rows] == [row["id"] for row in table if row["id"] in chosen]
        results = pq.read_table(lab.out / "stages/summary/results.parquet").to_pylist()
        kinds = {output["kind"] for output in chosen.values()}
        assert {row["id"] for row in results} == kinds
        assert sum(row["output"]["items"] for row in results) == len(chosen) == summary["items"]
        assert len(summary["levels"]) > 2
        assert summary["report"]["levels"] == len(summary["levels"])
        stages = {
            json.loads(line)["stage"]
            for file in lab.out.glob("stages/**/journal/*.jsonl")
            for line in file.read_text().splitlines()[1:]
        }
        assert stages == {"screen", "claims", "summary"}
        kept = {file.parent.name for file in lab.out.glob("stages/**/checkpoints.sqlite")}
        assert kept == {"screen", "claims"}  # levels of an operator need no file
        again = await command(lab, "resume", str(lab.out))
        assert again["stages"] == said["stages"]  # nothing is asked again


@pytest.mark.parametrize(
    "backend",
    [
        pytest.param({"kind": "local"}, id="local"),
        pytest.param({"kind": "local", "processes": 2}, id="processes", marks=pytest.mark.long),
    ],
)
async def test_killed_in_each_stage_and_level(lab_of: LabMaker, backend: dict[str, Any]) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.1) as lab:
        staged(lab)
        await begin(lab, lab.home / "undisturbed")
        expected = outputs(lab.home / "undisturbed")
        lab.config["backend"] = backend
        lab.fleet.reset()
        arguments: tuple[str, ...] = ()
        for number, key in enumerate(RUNS):
            folder = lab.out / key
            async with lab.process(*arguments) as process:
                await lab.until(partial(has_lines, folder))
                process.kill()
                assert await asyncio.wait_for(process.wait(), DEADLINE_S) == -signal.SIGKILL
            await lab.until(lab.fleet_is_idle)
            assert not is_finished(RunFolder(folder))  # it was at work
            assert all(is_finished(RunFolder(lab.out / done)) for done in RUNS[:number])
            arguments = ("resume", str(lab.out))
        moved = lab.home / "moved"
        shutil.move(lab.out, moved)
        said = await command(lab, "resume", str(moved))
        assert [one["state"] for one in said["stages"]] == ["finished"] * 3
        assert outputs(moved) == expected
        asked = [int(one["asked"]) for one in lab.fleet.stats(prompts=True)["prompts"].values()]
        assert sum(asked) - len(asked) <= len(RUNS) * 2 * STREAMS
        sessions = RunFolder(moved).read_provenance()["sessions"]
        assert [one["outcome"] for one in sessions] == [None] * len(RUNS) + ["finished"]


async def test_the_budget_ends_in_the_second_stage(lab_of: LabMaker) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.0, tpot_s=0.0) as lab:
        staged(lab, budget={"requests": ITEMS + 10, "reserve_for_reduce": {"requests": 5}})
        said = await begin(lab, lab.out, code=4)
        screen, claims, summary = said["stages"]
        assert (screen["state"], claims["state"], summary["state"]) == (
            "finished",
            "begun",
            "waiting",
        )
        assert screen["requests"] == ITEMS
        assert 0 < claims["requests"] <= 10
        assert said["budget"]["requests"]["spent"] <= ITEMS + 10
        counted = sum(int(o["asked"]) for o in lab.fleet.stats(prompts=True)["prompts"].values())
        assert counted <= ITEMS + 10
        raised = await command(lab, "resume", str(lab.out), "--budget-requests", "1000")
        assert [one["state"] for one in raised["stages"]] == ["finished"] * 3
        folder = RunFolder(lab.out)
        logs = SpendLogs(folder.budget, get_run_ids(folder.read_provenance()))
        total = sum(one["requests"] for one in raised["stages"])
        assert logs.total_spent({}).requests == total
        counted = sum(int(o["asked"]) for o in lab.fleet.stats(prompts=True)["prompts"].values())
        assert counted == total


async def test_a_stage_has_limits_of_its_own(lab_of: LabMaker) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.0, tpot_s=0.0) as lab:
        staged(lab, budget={"requests": 1000})
        lab.config["stages"][1]["budget"] = {"requests": 6}
        said = await begin(lab, lab.out, code=4)
        assert [one["state"] for one in said["stages"]] == ["finished", "begun", "waiting"]
        assert 0 < said["stages"][1]["requests"] <= 6
        spent = said["stages"][1]["requests"]
        again = await command(lab, "resume", str(lab.out), "--budget-requests", "2000", code=4)
        assert again["stages"][1]["requests"] == spent  # that is not the limit it has reached
        state = read_pipeline(RunFolder(lab.out), load_config(lab.out / "run.yaml"))
        assert list_raise_options(state, again["budget"]) == ["--set stages.1.budget.requests=N"]
        assert list_raise_options(state, {"requests": {"spent": 10, "cap": 10}}) == [
            "--budget-requests N"
        ]
        raised = await command(
            lab, "resume", str(lab.out), "--set", "stages.1.budget.requests=1000"
        )
        assert [one["state"] for one in raised["stages"]] == ["finished"] * 3


async def test_the_map_leaves_what_the_reduce_needs(lab_of: LabMaker) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.0, tpot_s=0.0) as lab:
        staged(lab, budget={"requests": ITEMS + 8})
        del lab.config["stages"][1]  # 60 items, then a summary of all of them
        lab.config["stages"][1]["reduce"] = SUMMARIZE | {"group_by": None}
        said = await begin(lab, lab.out, code=4)
        screen, summary = said["stages"]
        assert (screen["state"], summary["state"]) == ("begun", "waiting")
        assert screen["requests"] < ITEMS  # the rest of the limit is kept for the summary
        raised = await command(lab, "resume", str(lab.out), "--budget-requests", "1000")
        assert [one["state"] for one in raised["stages"]] == ["finished"] * 2


async def test_levels_that_ask_other_questions_are_refused(lab_of: LabMaker) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.1) as lab:
        staged(lab)
        level = lab.out / "stages/summary/levels/1"
        async with lab.process() as process:
            await lab.until(partial(has_lines, level))
            process.kill()
            await asyncio.wait_for(process.wait(), DEADLINE_S)
        about = level / "provenance.json"
        changed = json.loads(about.read_text())
        changed["input"]["digest"] = "0" * len(changed["input"]["digest"])
        about.write_text(json.dumps(changed))
        lab.fleet.reset()
        async with lab.process("resume", str(lab.out)) as process:
            await asyncio.wait_for(process.communicate(), 600)
        assert process.returncode == 2  # "differ from those that an earlier session has asked"
        assert not lab.fleet.stats(prompts=True)["prompts"]


async def test_failed_items_are_counted_and_not_passed_on(lab_of: LabMaker) -> None:
    async with lab_of(items=20, ttft_s=0.0, tpot_s=0.0) as lab:
        text = lab.input.read_text().replace("thing 7", "thing 7" + " very" * 50000)
        lab.input.write_text(text)
        staged(lab)
        lab.config["stages"][1] = {"name": "claims", "map": CLAIM}
        said = await begin(lab, lab.out, code=3)
        assert (said["stages"][0]["results"], said["stages"][0]["failed"]) == (19, 1)
        assert said["stages"][1]["passed_on"] == {"passed": 19, "failed": 1, "unselected": 0}
        assert said["exit_code"] == 3


async def test_changed_settings_of_a_begun_stage_are_refused(lab_of: LabMaker) -> None:
    async with lab_of(items=10, ttft_s=0.0, tpot_s=0.0) as lab:
        staged(lab)
        await begin(lab, lab.out)
        settings = lab.home / "pipeline.yaml"
        changes: list[tuple[int, dict[str, Any]]] = [
            (1, {"where": "output.score > 0.5"}),
            (1, {"map": CLAIM | {"prompt": "Other {x}"}}),
            (2, {"reduce": SUMMARIZE | {"prompt": "Other"}}),
            (2, {"model": {"temperature": 0.3}}),
        ]
        before = (lab.out / "run.yaml").read_bytes()
        for number, change in changes:
            changed = json.loads(orjson.dumps(lab.config))
            changed["stages"][number] |= change
            settings.write_bytes(orjson.dumps(changed))
            await command(lab, "run", str(settings), "--out", str(lab.out), code=2)
            assert (lab.out / "run.yaml").read_bytes() == before


PROCESSES = {"kind": "local", "processes": 2}


def workers_of(root: Path) -> dict[str, set[str]]:
    """Return, for each run of a pipeline, the process ids of the workers that wrote its journal."""
    found = dict[str, set[str]]()
    for folder in sorted(root.glob("stages/**/journal")):
        files = (file for file in folder.glob("*-*.jsonl") if file.read_bytes().count(b"\n") > 1)
        found[str(folder.parent.relative_to(root))] = {f.stem.split("-")[-2] for f in files}
    return found


async def test_all_runs_use_the_same_worker_processes(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.0, tpot_s=0.0) as lab:
        staged(lab, backend=PROCESSES)
        token = uuid.uuid4().hex
        monkeypatch.setenv("FANFOLD_TEST_TOKEN", token)
        said = await begin(lab, lab.out)
        assert [one["state"] for one in said["stages"]] == ["finished"] * 3
        workers = workers_of(lab.out)
        del workers["stages/summary"]  # an operator's results, which no worker writes
        assert len(workers) == 2 + len(said["stages"][2]["levels"])
        assert all(workers.values())
        assert len(set().union(*workers.values())) == 2
        await lab.until(lambda: not marked(token))


async def test_a_pipeline_that_is_stopped_leaves_no_worker(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.1) as lab:
        staged(lab, backend=PROCESSES)
        token = uuid.uuid4().hex
        monkeypatch.setenv("FANFOLD_TEST_TOKEN", token)
        async with lab.process() as process:
            await lab.until(partial(has_lines, lab.out / "stages/claims"))
            process.send_signal(signal.SIGINT)
            assert await asyncio.wait_for(process.wait(), DEADLINE_S) == 5
        await lab.until(lambda: not marked(token))
        (session,) = RunFolder(lab.out).read_provenance()["sessions"]
        assert "SIGINT" in session["outcome"]
        assert not (lab.out / "stages/claims/results.parquet").exists()


def find_workers(root: Path) -> list[int]:
    """Return the worker processes that have written journals and are alive."""
    pids = {int(pid) for found in workers_of(root).values() for pid in found}
    return [pid for pid in pids if Path(f"/proc/{pid}").exists()]


@pytest.mark.long
@pytest.mark.parametrize(
    "backend",
    [
        pytest.param(PROCESSES, id="processes"),
        pytest.param({"kind": "launched", "workers": 2}, id="launched"),
    ],
)
async def test_workers_of_a_pipeline_that_are_killed_in_and_between_stages(
    lab_of: LabMaker, monkeypatch: pytest.MonkeyPatch, backend: dict[str, Any]
) -> None:
    async with lab_of(items=ITEMS, ttft_s=0.2) as lab:
        staged(lab)
        await begin(lab, lab.home / "undisturbed")
        expected = outputs(lab.home / "undisturbed")
        lab.config["backend"] = backend
        token = uuid.uuid4().hex
        monkeypatch.setenv("FANFOLD_TEST_TOKEN", token)
        lab.fleet.reset()
        async with lab.process() as process:
            await lab.until(partial(has_lines, lab.out / "stages/screen"))
            await lab.until(lambda: find_workers(lab.out))
            os.kill(find_workers(lab.out)[0], signal.SIGKILL)  # in a stage
            await lab.until((lab.out / "stages/screen/results.parquet").exists)
            for pid in find_workers(lab.out):
                os.kill(pid, signal.SIGKILL)  # between two stages, or as the next one begins
            assert await asyncio.wait_for(process.wait(), 300) == 0
        assert outputs(lab.out) == expected
        asked = [int(one["asked"]) for one in lab.fleet.stats(prompts=True)["prompts"].values()]
        assert sum(asked) - len(asked) <= 2 * 2 * STREAMS
        await lab.until(lambda: not marked(token))
