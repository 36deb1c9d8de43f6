"""Pipelines in the jobs of a chain, on the stand-in for PBS: the next job goes on in the stage."""

from __future__ import annotations

import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.storage.run_folder import RunFolder
from fanfold.configs.loader import load_config
from fanfold.graphs.run.pipeline_report import read_pipeline

from .conftest import SETTINGS, Cluster, Trial, ended, served, until

pytestmark = pytest.mark.integration

ITEMS = 40
AGAIN = {
    "prompt": "And {text}, {first.score}?",
    "schema": {
        "type": "object",
        "required": ["kind"],
        "properties": {"kind": {"type": "string", "enum": ["a", "b"]}},
    },
}
LAUNCHED: dict[str, Any] = {"kind": "launched", "node_endpoints": True}


def pipeline(per_item_s: float, second: dict[str, Any] | None = None) -> dict[str, Any]:
    """Settings of two stages whose models the nodes serve."""
    stages = [
        {"name": "first", "map": SETTINGS["task"], "reduce": [{"op": "count"}]},
        {"name": "again", "map": AGAIN} | (second or {}),
    ]
    return served(per_item_s) | {"task": None, "reduce": [], "stages": stages}


def done(trial: Trial, stage: str) -> Counter[str]:
    """Return how often each item of a stage has ended, over all journal files."""
    found = Counter[str]()
    for file in (trial.path / "stages" / stage / "journal").glob("*.jsonl"):
        records = [orjson.loads(line) for line in file.read_bytes().split(b"\n")[:-1]]
        found.update(one["id"] for one in records if one.get("status") == "done")
    return found


def models(trial: Trial, stage: str) -> set[str]:
    files = (trial.path / "stages" / stage / "journal").glob("*.jsonl")
    lines = [orjson.loads(line) for f in files for line in f.read_bytes().splitlines()[1:]]
    return {line["model"] for line in lines}


def check_finished(trial: Trial) -> None:
    assert trial.chain.halt_reason == "all items are finished", trial.logs()
    folder = RunFolder(trial.path)
    state = read_pipeline(folder, load_config(folder.settings))
    assert [one.results for one in state.stages] == [ITEMS, ITEMS]
    for stage in ("first", "again"):
        assert set(done(trial, stage).values()) == {1}, "no item was asked twice"


def test_the_next_job_goes_on_in_the_stage_in_which_the_first_was_warned(pbs: Cluster) -> None:
    trial = pbs.submit(ITEMS, pipeline(0.3))
    until(lambda: ended(trial) or len(done(trial, "again")) >= 4, "the second stage")
    subprocess.run(["qsig", "-s", "SIGUSR1", trial.chain.jobs[0].id], check=True)
    until(lambda: ended(trial), "the end of the chain")
    check_finished(trial)
    assert [job.code for job in trial.chain.jobs] == [5, 0, None], trial.logs()
    first, second, _ = trial.chain.jobs
    assert first.finished_items >= ITEMS + 4
    assert first.finished_items + second.finished_items == 2 * ITEMS
    assert trial.logs().count("all servers have ended") == 4  # two nodes in each of two jobs


def test_workers_start_the_servers_of_each_stage(pbs: Cluster) -> None:
    """Two models: those of the first stage end before those of the second start."""
    second = {"model": {"name": "large"}}
    settings = pipeline(0.3, second) | {"backend": LAUNCHED}
    settings["node"]["linger_s"] = 1.0
    trial = pbs.submit(ITEMS, settings)
    until(lambda: ended(trial) or len(done(trial, "again")) >= 4, "the second stage")
    subprocess.run(["qsig", "-s", "SIGUSR1", trial.chain.jobs[0].id], check=True)
    until(lambda: ended(trial), "the end of the chain")
    check_finished(trial)
    assert [job.code for job in trial.chain.jobs] == [5, 0, None], trial.logs()
    assert [models(trial, stage) for stage in ("first", "again")] == [{"sim"}, {"large"}]
    assert not list((trial.path / "cluster").glob("serve-*.log")), "no fanfold serve beside them"
    logs = list((trial.path / "cluster" / "servers" / "logs").glob("*.jsonl"))
    assert len(logs) == 2
    until(lambda: all(list_ends(log)[-1] == "end" for log in logs), "the end of all servers")
    for log in logs:
        ends = list_ends(log)
        assert len(ends) >= 4
        assert ends == ["begin", "end"] * (len(ends) // 2), "two models at a time"


def list_ends(log: Path) -> list[str]:
    events = [orjson.loads(line)["event"] for line in log.read_bytes().splitlines()]
    return [event for event in events if event in ("begin", "end")]


def test_two_models_need_workers_on_the_nodes(pbs: Cluster) -> None:
    with pytest.raises(ConfigurationError, match=r"the models sim, large of node\.serve"):
        pbs.submit(ITEMS, pipeline(0.3, {"model": {"name": "large"}}))
    settings = pipeline(0.3)
    with pytest.raises(ConfigurationError, match=r"model\.name of stage first is missing"):
        pbs.submit(ITEMS, settings | {"model": {}})
    assert not (pbs.folder / "run").exists()
