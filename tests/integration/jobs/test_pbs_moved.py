"""Run folders that are moved or copied while jobs use them, on the stand-in for PBS."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from fanfold.backends.cluster.schedulers import Pbs
from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.storage.run_folder import open_folder
from fanfold.configs.overrides import Overrides
from fanfold.graphs.jobs.chain import cancel_jobs
from fanfold.graphs.jobs.submit import SubmitOptions, submit_job
from fanfold.graphs.jobs.usage import job_report

from .conftest import Cluster, Trial, ended, served, until

pytestmark = pytest.mark.integration
ITEMS = 60
SLOW = {"limits": {"requests_per_s": 20, "streams": 8}}


def submitted(pbs: Cluster, folder: str | Path, *overrides: str) -> Trial:
    """Submit a run folder that there is."""
    order = SubmitOptions(str(pbs.site), nodes=2, walltime="1h")
    submit_job(str(folder), None, Overrides(list(overrides)), order, dry=False)
    return Trial(Path(folder))


def all_ended(*jobs: str) -> bool:
    return set(Pbs().fetch_states(jobs).values()) == {"ended"}


def test_a_folder_that_moves_while_its_jobs_wait(
    pbs: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The waiting job says so and ends; submitted from its new place, the run goes on."""
    trial = pbs.submit(ITEMS, SLOW)
    until(lambda: len(trial.finished()) >= 8 and len(trial.chain.jobs) == 2, "the first items")
    moved = Trial(pbs.folder / "elsewhere" / "moved")
    moved.path.parent.mkdir()
    trial.path.rename(moved.path)
    subprocess.run(["qsig", "-s", "SIGUSR1", "1.standin"], check=True)
    until(lambda: all_ended("1.standin", "2.standin"), "the end of both jobs")
    said = (pbs.folder / "pbs" / "2" / "output").read_text()
    assert f"{trial.path}: no such run folder; if it was moved, submit it" in said
    assert not trial.path.exists()
    monkeypatch.chdir(moved.path.parent)
    assert str(trial.path) in (moved.path / "cluster" / "job.sh").read_text()
    submitted(pbs, "moved")
    for script in (moved.path / "cluster").glob("*.sh"):
        assert str(trial.path) not in script.read_text()
    until(lambda: ended(moved), "the end of the chain")
    moved.assert_each_once(ITEMS)
    outcomes = [job.outcome for job in moved.chain.jobs]
    assert outcomes[:3] == ["lost", "gone before it began", "finished"]
    assert open_folder(moved.path).read_provenance()["earlier"] == []


@pytest.mark.long
def test_servers_of_a_moved_run_are_found_in_its_new_place(pbs: Cluster) -> None:
    """The settings name the servers' folder relative to the run's."""
    trial = pbs.submit(ITEMS, served(0.2), jobs=1)
    until(lambda: len(trial.finished()) >= 8, "the first items")
    subprocess.run(["qsig", "-s", "SIGUSR1", "1.standin"], check=True)
    until(lambda: ended(trial) and all_ended("1.standin"), "the end of the first job")
    assert "file: ./cluster/servers" in (trial.path / "run.yaml").read_text()
    moved = Trial(pbs.folder / "moved")
    trial.path.rename(moved.path)
    submitted(pbs, moved.path)
    until(lambda: ended(moved), "the end of the chain")
    moved.assert_each_once(ITEMS)
    assert not trial.path.exists()
    for name in ("run.yaml", "provenance.json", "checkpoints.sqlite", "cluster/chain.jsonl"):
        data = (moved.path / name).read_bytes()
        assert str(trial.path).encode() not in data
        assert str(moved.path).encode() not in data


def test_the_jobs_of_a_run_are_none_of_its_copys(
    pbs: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    """A copy neither waits for them nor cancels them, and has jobs of its own."""
    trial = pbs.submit(ITEMS, SLOW)
    until(lambda: len(trial.finished()) >= 8 and len(trial.chain.jobs) == 2, "the first items")
    copy = Trial(pbs.folder / "copy")
    shutil.copytree(trial.path, copy.path)
    with pytest.raises(ConfigurationError, match="no job of this run was ever submitted"):
        cancel_jobs(copy.path, at_once=True)
    assert (
        "1.standin, 2.standin: not cancelled: jobs of the run that this folder was copied"
        in capsys.readouterr().err
    )
    facts = job_report(copy.path)
    assert facts is not None
    assert {job["state"] for job in facts["jobs"]} == {"of the run that this one was copied from"}
    submitted(pbs, copy.path)
    until(lambda: ended(copy) and ended(trial), "the end of both chains")
    for one in (trial, copy):
        one.assert_each_once(ITEMS)
    assert [job.outcome for job in trial.chain.jobs] == ["finished", "withdrawn before it began"]
    assert [job.foreign for job in copy.chain.jobs] == [True, True, False, False]
    run, other = (open_folder(one.path).read_provenance() for one in (trial, copy))
    assert other["earlier"] == [run["run"]] != [other["run"]]


def test_a_run_that_is_handed_to_submit_from_another_directory(
    pbs: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Begun by a job, gone on with under a symbolic link, by another name."""
    trial = pbs.submit(ITEMS, SLOW, jobs=1)
    until(lambda: len(trial.finished()) >= 8, "the first items")
    subprocess.run(["qsig", "-s", "SIGUSR1", "1.standin"], check=True)
    until(lambda: ended(trial) and all_ended("1.standin"), "the end of the first job")
    (pbs.folder / "deeper").mkdir()
    (pbs.folder / "deeper" / "link").symlink_to(trial.path)
    monkeypatch.chdir(pbs.folder / "deeper")
    submitted(pbs, "link")
    until(lambda: ended(trial), "the end of the chain")
    trial.assert_each_once(ITEMS)
    about = open_folder(trial.path).read_provenance()
    assert about["earlier"] == []
    assert {tuple(life["command"][1:]) for life in about["sessions"]} == {("resume", "DIR")}
