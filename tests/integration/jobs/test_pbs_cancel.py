"""``fanfold cancel`` on the stand-in for PBS."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fanfold.backends.core.errors import BackendError, ConfigurationError
from fanfold.graphs.jobs.chain import cancel_jobs

from .conftest import Cluster, Trial, ended, until

pytestmark = pytest.mark.integration
SLOW = {"limits": {"requests_per_s": 20, "streams": 8}}
ITEMS = 400


@pytest.fixture
def trial(pbs: Cluster) -> Trial:
    """A chain whose first job works, and whose second one waits for it."""
    found = pbs.submit(ITEMS, SLOW)
    until(lambda: len(found.finished()) >= 4, "the first items")
    return found


def check_end(trial: Trial) -> None:
    until(lambda: ended(trial), "the end of the chain")
    assert trial.chain.halt_reason == "cancelled by fanfold cancel"
    assert len(trial.chain.jobs) == 2, trial.logs()
    assert trial.chain.jobs[0].code == 5, trial.logs()
    assert len(trial.finished()) < ITEMS
    assert set(trial.finished().values()) == {1}


def test_items_in_flight_end_and_none_follows(pbs: Cluster, trial: Trial) -> None:
    with pytest.raises(ConfigurationError, match=r"job 1\.standin of this run is running"):
        pbs.submit(ITEMS, SLOW)
    cancel_jobs(trial.path, at_once=False)
    check_end(trial)
    assert trial.chain.jobs[1].outcome == "cancelled before it began"


def test_a_job_that_cannot_be_cancelled_keeps_no_other_one(pbs: Cluster, trial: Trial) -> None:
    """All are tried; the one that is left ends as it begins."""
    (pbs.folder / "pbs" / "2" / "kept").touch()
    with pytest.raises(BackendError) as caught:
        cancel_jobs(trial.path, at_once=False)
    message = caught.value.message
    assert "job 2.standin could not be ended: qdel failed: qdel: Server could not" in message
    assert f"try again: fanfold cancel {trial.path}   or by hand: qdel 2.standin" in message
    check_end(trial)
    assert trial.chain.jobs[1].outcome == "nothing to do"


def test_a_job_that_is_forgotten_is_gone(
    pbs: Cluster, trial: Trial, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(pbs.folder / "pbs" / "2")
    cancel_jobs(trial.path, at_once=False)
    assert "2.standin: is gone already" in capsys.readouterr().err
    check_end(trial)
    assert trial.chain.jobs[1].outcome == "gone before it began"
    cancel_jobs(trial.path, at_once=True)  # nothing is left to be cancelled, and that is no error


def test_a_scheduler_that_does_not_tell_is_asked_to_cancel(
    pbs: Cluster, trial: Trial, capsys: pytest.CaptureFixture[str]
) -> None:
    (pbs.folder / "pbs" / "mute").touch()
    cancel_jobs(trial.path, at_once=False)
    assert "qstat: cannot connect to server" in capsys.readouterr().err
    check_end(trial)
    assert trial.chain.jobs[1].outcome == "cancelled before it began"


def test_a_run_without_jobs_has_nothing_to_cancel(pbs: Cluster, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigurationError, match="not a run folder"):
        cancel_jobs(tmp_path / "empty", at_once=False)
    assert not (pbs.folder / "pbs" / "1").exists()
