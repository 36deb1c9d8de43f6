"""Reports of a run's jobs: how their node-hours were used, and the sources of the figures."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest

from fanfold.backends.cluster.chain import EXIT_NOTHING_TO_DO

from .conftest import Shell

pytestmark = pytest.mark.integration


@pytest.fixture
def begin(shell: Shell, tmp_path: Path) -> float:
    """A finished run of two jobs: the servers of the first reported counts, not of the second."""
    at = time.time()
    assert shell("run", "c.yaml", "--out", "r").code == 0
    terms = {"scheduler": "slurm", "site": "trial"}
    told = [*job(at - 200, "1", terms), *job(at - 50, "2")]
    told += [ended(at - 100, "1", 5, "interrupted"), ended(at + 50, "2", 0, "finished")]
    note(told)
    record = Path("r/cluster/servers/logs/n1.jsonl")
    record.parent.mkdir(parents=True)
    record.write_bytes(
        lines(
            {"at": at - 200, "event": "begin", "instances": 1},
            {"at": at - 160, "event": "ready", "instance": 0},
            {"at": at - 150, "event": "load", "running": [4], "waiting": [0]},
            {"at": at - 110, "event": "load", "running": [0], "waiting": [0]},
            {"at": at - 102, "event": "end", "why": "stopped"},
        )
    )
    program = tmp_path / "bin" / "sacct"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho '1|COMPLETED|110|1'\n")
    program.chmod(0o755)
    shell.patch.setenv("PATH", f"{program.parent}:/bin")
    return at


def lines(*records: dict[str, Any]) -> bytes:
    return b"".join(orjson.dumps({"v": 1} | one) + b"\n" for one in records)


def job(at: float, name: str, terms: dict[str, str] | None = None) -> list[dict[str, Any]]:
    hand = {"by_hand": terms is not None, "terms": terms or {}, "after": None}
    facts = {"job": name, "nodes": 1, "walltime_s": 3600} | hand
    began = {"at": clock(at), "event": "began", "job": name, "finished": 0}
    return [{"at": clock(at), "event": "submitted"} | facts, began]


def ended(at: float, name: str, code: int, outcome: str) -> dict[str, Any]:
    facts = {"at": clock(at), "event": "ended", "job": name, "finished": 3}
    return facts | {"code": code, "outcome": outcome}


def note(told: list[dict[str, Any]]) -> None:
    Path("r/cluster").mkdir(exist_ok=True)
    with Path("r/cluster/chain.jsonl").open("ab") as file:
        file.write(lines(*told))


def clock(at: float) -> str:
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


@pytest.mark.usefixtures("begin")
def test_cost_reports_the_use_of_jobs_with_counts_and_names_the_others(shell: Shell) -> None:
    """Of 110 s by Slurm 40 s had a full batch; 100 s by the chain's own times are unknown."""
    chain = json.loads(shell("cost", "r", "--json").out)["chain"]
    assert (chain["jobs_by_scheduler"], chain["jobs_by_fanfold"]) == (1, 1)
    assert chain["node_hours"] == round(210 / 3600, 4)
    assert chain["busy_node_hours"] == round(40 / 3600, 4)
    assert chain["idle_node_hours"] == round(70 / 3600, 4)
    assert chain["unknown_node_hours"] == round(100 / 3600, 4)
    useful = chain["useful"]
    assert (useful["jobs_by_servers_counts"], useful["jobs_without_counts"]) == (1, 1)
    assert useful["full_batch_items"] == 4
    assert useful["share"] == round(40 / 110, 4)
    assert sum(useful["lost"].values()) + useful["share"] == pytest.approx(1, abs=0.0005)
    assert useful["lost"]["drain"] == round(10 / 110, 4)
    assert useful["lost"]["start-up"] == round(60 / 110, 4)
    assert json.loads(shell("status", "r", "--usage", "--json").out)["chain"] == chain

    said = shell("cost", "r").out
    assert "node-hours held" in said
    assert "by the scheduler's times of 1 of 2 jobs, else fanfold's" in said
    assert "by the servers' own counts of 1 of 2 jobs: servers with at least 90 % of 4" in said
    assert "0.028 node-hours unknown: the servers of these nodes reported no counts" in said
    rows = [[cell.strip() for cell in row.split("│")] for row in said.splitlines()]
    assert ["useful: batch full", "0.011", "36.4%"] in [row[1:4] for row in rows]
    assert ["unknown", "0.028"] in [row[1:3] for row in rows]
    assert "lost: down" in said


@pytest.mark.usefixtures("begin")
def test_without_counts_the_useful_share_is_unknown(shell: Shell) -> None:
    Path("r/cluster/servers/logs/n1.jsonl").unlink()
    chain = json.loads(shell("cost", "r", "--json").out)["chain"]
    assert chain["useful"]["share"] is None
    assert chain["unknown_node_hours"] == chain["node_hours"] == round(210 / 3600, 4)
    unknown = "unknown: the servers of these nodes reported no counts"
    said = shell("cost", "r").out
    assert f"use {unknown}" in said
    assert "useful: batch full" not in said
    assert f"useful share: {unknown}" in shell("status", "r", "--usage").out


def test_the_scheduler_is_asked_once_a_minute(shell: Shell, tmp_path: Path, begin: float) -> None:
    calls, kept = tmp_path / "calls", Path("r/cluster/scheduler.json")
    program = tmp_path / "bin" / "sacct"
    program.write_text(f"#!/bin/sh\necho x >> {calls}\necho '1|COMPLETED|110|1'\n")
    queue = program.with_name("squeue")
    queue.write_text(f"#!/bin/sh\necho x >> {calls}\necho '3 RUNNING'\n")
    queue.chmod(0o755)

    def count() -> int:
        assert shell("status", "r", "--usage").code == 0
        return len(calls.read_text().split())

    first = count()
    assert [count(), count()] == [first, first]
    old = orjson.loads(kept.read_bytes())
    for change in ({"at": old["at"] - 60}, {"at": old["at"] + 9999}, {"v": 9}, {"states": 3}):
        kept.write_bytes(orjson.dumps(old | change))
        before = len(calls.read_text().split())
        assert count() == before + first
    kept.write_bytes(b"{")
    assert count() > first
    before = count()
    note([*job(begin, "3")])
    assert count() > before  # another job is of interest


@pytest.mark.usefixtures("begin")
def test_without_a_scheduler_it_says_so(shell: Shell) -> None:
    shell.patch.setenv("PATH", "/nowhere")
    for command in (["cost", "r", "--by", "model"], ["status", "r", "--usage"]):
        said = shell(*command)
        assert said.code == 0
        words = "no data from the scheduler: sacct: command not found; ask from a login node"
        assert words in said.out
        assert "by fanfold's own times" in said.out


def test_inside_a_job_it_counts_until_now_and_no_scheduler_is_asked(
    shell: Shell, begin: float
) -> None:
    note(job(begin - 5, "3"))
    Path("bin/sacct").write_text("#!/bin/sh\ntouch asked\n")
    shell.patch.setenv("SLURM_JOB_ID", "3")
    said = shell("resume", "r")
    assert "Jobs: 3 so far, 0.0" in said.err
    assert "Useful share: " in said.err
    chain = json.loads(shell("resume", "r", "--json").out)["chain"]
    seconds = 100 + 100 + time.time() - begin + 5
    assert 205 / 3600 - 0.0001 <= chain["node_hours"] <= seconds / 3600 + 0.0001
    assert chain["jobs_by_fanfold"] == 3
    assert chain["jobs"][2]["state"] == "running"
    assert not Path("asked").exists()


def test_a_run_without_jobs_tells_of_none(shell: Shell) -> None:
    ran = shell("run", "c.yaml", "--out", "r", "--json")
    assert "chain" not in json.loads(ran.out)
    assert "chain" not in json.loads(shell("cost", "r", "--json").out)
    assert "jobs" not in shell("cost", "r").out


def test_the_jobs_of_a_pipeline_are_shown(shell: Shell) -> None:
    """The chain counts the items of all stages; those of stages to come are one item."""
    shell.write(task=None, reduce=[], stages=[{"name": "one", "map": {"prompt": "Judge {text}."}}])
    assert shell("run", "c.yaml", "--out", "r").code == 0
    terms = {"scheduler": "slurm", "site": "trial"}
    note([*job(time.time() - 200, "1", terms), ended(time.time() - 100, "1", 5, "interrupted")])
    found = json.loads(shell("status", "r", "--json").out)
    assert [one["job"] for one in found["chain"]["jobs"]] == ["1"]
    assert "interrupted" in shell("status", "r").out
    note(job(time.time() - 50, "2")[:1])
    said = shell("chain", "begin", "r", "--job", "2")
    assert said.code == EXIT_NOTHING_TO_DO
    assert "all items are finished" in said.err
    about = Path("r/stages/one/provenance.json")
    kept = json.loads(about.read_text())
    kept["sessions"][-1]["outcome"] = None  # as after a kill: its results may be missing
    about.write_text(json.dumps(kept))
    note(job(time.time() - 20, "3", terms)[:1])
    said = shell("chain", "begin", "r", "--job", "3")
    assert said.code == 0
    assert "1 item left" in said.err


@pytest.mark.parametrize("more", [(), ("--dry-run",)])
def test_a_pipeline_of_two_models_is_refused_before_a_script_is_printed(
    shell: Shell, more: tuple[str, ...]
) -> None:
    stages = [
        {"name": name, "map": {"prompt": "Judge {text}."}, "model": {"name": name}}
        for name in ("small", "large")
    ]
    node = {"serve": "serve {model} {port}"}
    shell.write(task=None, reduce=[], stages=stages, node=node, endpoints={"file": "servers"})
    place = ("--site", "polaris", "--nodes", "1", "--walltime", "1h", "--queue", "q")
    found = shell("submit", "c.yaml", "--out", "jobs", *place, "--account", "a", *more)
    assert found.code == 2
    assert "the models small, large of node.serve" in found.err
    assert "#PBS" not in found.out
    assert not Path("jobs").exists()
    backend = {"kind": "launched", "node_endpoints": True}
    shell.write(
        task=None,
        reduce=[],
        stages=stages,
        node=node,
        endpoints={"file": "servers"},
        backend=backend,
    )
    found = shell("submit", "c.yaml", "--out", "jobs", *place, "--account", "a", "--dry-run")
    assert found.code == 0
    assert "FANFOLD_LAUNCHER" in found.out
    assert " serve " not in found.out
