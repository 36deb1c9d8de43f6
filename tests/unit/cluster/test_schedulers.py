"""Commands for Slurm and PBS, against programs that answer as those do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fanfold.backends.cluster.schedulers import (
    SCHEDULERS,
    Pbs,
    SchedulerUsage,
    Slurm,
    try_job_command,
)
from fanfold.backends.core.errors import BackendError, ConfigurationError


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is the whole PATH besides a shell."""
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def program(folder: Path, name: str, *lines: str) -> None:
    file = folder / name
    file.write_text("\n".join(("#!/bin/sh", *lines)) + "\n")
    file.chmod(0o755)


def test_slurm_ids_lose_the_name_of_the_cluster(programs: Path) -> None:
    program(programs, "sbatch", f'echo "$@" > {programs}/said', "echo '12;big'")
    assert Slurm().submit(Path("job.sh"), "11") == "12"
    assert (programs / "said").read_text().split() == [
        "--parsable",
        "--dependency=afterany:11",
        "job.sh",
    ]


def test_slurm_states(programs: Path) -> None:
    program(programs, "squeue", "printf '1 RUNNING\\n2 PENDING\\n3 COMPLETED\\n4 COMPLETING\\n'")
    assert Slurm().fetch_states(["1", "2", "3", "4", "5"]) == {
        "1": "running",
        "2": "queued",
        "3": "ended",
        "4": "running",
        "5": "ended",
    }


ENDED = [
    "BOOT_FAIL",
    "CANCELLED",
    "COMPLETED",
    "DEADLINE",
    "FAILED",
    "LAUNCH_FAILED",
    "NODE_FAIL",
    "OUT_OF_MEMORY",
    "PREEMPTED",
    "RECONFIG_FAIL",
    "TIMEOUT",
]
ALIVE = [
    "PENDING",
    "CONFIGURING",
    "COMPLETING",
    "EXPEDITING",
    "POWER_UP_NODE",
    "REQUEUED",
    "REQUEUE_FED",
    "REQUEUE_HOLD",
    "RESIZING",
    "RESV_DEL_HOLD",
    "RUNNING",
    "SIGNALING",
    "SPECIAL_EXIT",
    "STAGE_OUT",
    "STOPPED",
    "SUSPENDED",
    "UPDATE_DB",
    "REVOKED",
    "SOMETHING_NEW",
]


@pytest.mark.parametrize("word", [*ENDED, *ALIVE])
def test_only_known_states_are_an_end_in_slurm(programs: Path, word: str) -> None:
    program(programs, "squeue", f"echo '7 {word}'")
    state = Slurm().fetch_states(["7"])["7"]
    assert (state == "ended") == (word in ENDED)
    assert (state == "unknown") == (word in {"REVOKED", "SOMETHING_NEW"})


@pytest.mark.parametrize("letter", list("BEFHMQRSTUWXYZ"))
def test_only_known_states_are_an_end_in_pbs(programs: Path, letter: str) -> None:
    said = f'{{"Jobs": {{"7.host": {{"job_state": "{letter}"}}}}}}'
    program(programs, "qstat", f"echo '{said}'")
    state = Pbs().fetch_states(["7.host"])["7.host"]
    assert (state == "ended") == (letter in "FX")
    assert (state == "unknown") == (letter in "YZ")


BANNER = "echo 'Welcome to the cluster. Maintenance: 3 May.'"


@pytest.mark.parametrize(
    ("single", "state"),
    [
        ("echo '9 RUNNING'", "running"),
        ("echo '9 COMPLETED'", "ended"),
        ("true", "ended"),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", "ended"),
        ("echo 'slurm_load_jobs error: Unable to contact controller' >&2; exit 1", "unknown"),
        (BANNER, "unknown"),
        ("echo '9'", "unknown"),
    ],
)
def test_a_job_that_a_broken_listing_lacks_is_asked_for_alone(
    programs: Path, single: str, state: str
) -> None:
    alone = f'case "$*" in *--jobs=9*) {single}; exit;; esac'
    program(programs, "squeue", alone, BANNER, "echo '8 RUNNING'")
    assert Slurm().fetch_states(["8", "9"]) == {"8": "running", "9": state}


def test_pbs_asks_alone_for_a_job_that_a_listing_lacks(programs: Path) -> None:
    running = '{"Jobs": {"7.host": {"job_state": "R"}}}'
    program(programs, "qstat", f"{BANNER}; echo '{running}'")
    assert Pbs().fetch_states(["7.host"]) == {"7.host": "running"}
    other = '{"Jobs": {"8.host": {"job_state": "Q"}}}'
    alone = f'case "$*" in *" 8.host") echo \'{other}\'; exit;; esac'
    both = 'case "$*" in *"7.host 8.host") ;; *) echo "qstat: Unknown Job Id" >&2; exit 153;; esac'
    program(
        programs, "qstat", f'case "$*" in *7.host*) ;; *) {alone};; esac', both, f"echo '{running}'"
    )
    assert Pbs().fetch_states(["7.host", "8.host"]) == {"7.host": "running", "8.host": "queued"}


@pytest.mark.parametrize(
    ("said", "job"),
    [
        ("12", "12"),
        ("12;big", "12"),
        ("Welcome. 3 May: maintenance.\n\n12;big\n", "12"),
        ("12\nYour project has 9 hours left", "12"),
    ],
)
def test_an_id_is_the_line_that_looks_like_one(programs: Path, said: str, job: str) -> None:
    program(programs, "sbatch", f"printf '{said}'")
    assert Slurm().submit(Path("job.sh")) == job
    program(programs, "qsub", f"printf '{said.replace('12;big', '12').replace('12', '12.host')}'")
    assert Pbs().submit(Path("job.sh")) == f"{job}.host"


def test_a_submission_without_an_id_says_that_the_job_may_run(programs: Path) -> None:
    for name, scheduler in (("sbatch", Slurm()), ("qsub", Pbs())):
        program(programs, name, "echo Welcome")
        with pytest.raises(BackendError, match=rf"{name}: printed no job id .*Welcome.*queue"):
            scheduler.submit(Path("job.sh"))


def test_slurm_accounts_or_why_there_are_none(programs: Path) -> None:
    program(programs, "sacct", "printf '1|COMPLETED|3600|4\\n2|PENDING||4\\n'")
    assert Slurm().fetch_usage(["1", "2"]) == {"1": SchedulerUsage(14400, 3600, "COMPLETED")}
    program(programs, "sacct", "echo 'Slurm accounting storage is disabled' >&2", "exit 1")
    with pytest.raises(BackendError, match="sacct failed: Slurm accounting storage is disabled"):
        Slurm().fetch_usage(["1"])


def test_slurm_begins_another_row_when_a_job_loses_a_node(programs: Path) -> None:
    """What Slurm 22.05 said of a job of three nodes; another job had the same id long ago."""
    rows = ("2|COMPLETED|999|9", "2|RESIZING|33|3", "2|COMPLETED|7|2", "3|CANCELLED by 0|4|1")
    program(programs, "sacct", f"printf '%s\\n' {' '.join(map(repr, rows))}")
    assert Slurm().fetch_usage(["2", "3"]) == {
        "2": SchedulerUsage(33 * 3 + 7 * 2, 40, "COMPLETED"),
        "3": SchedulerUsage(4, 4, "CANCELLED by 0"),
    }


def test_pbs_says_it_in_json(programs: Path) -> None:
    said = (
        '{"Jobs": {"7.host.site": {"job_state": "F", "resources_used": {"walltime": "01:00:30"},'
        ' "Resource_List": {"nodect": 4}}, "8.host.site": {"job_state": "H"}}}'
    )
    program(programs, "qstat", f"echo '{said}'")
    assert Pbs().fetch_states(["7.host", "8.host", "9.host"]) == {
        "7.host": "ended",
        "8.host": "queued",
        "9.host": "ended",
    }
    assert Pbs().fetch_usage(["7.host", "8.host"]) == {
        "7.host": SchedulerUsage(4 * 3630, 3630, "F")
    }


def test_pbs_depends_and_signals(programs: Path) -> None:
    for name in ("qsub", "qsig", "qdel"):
        program(programs, name, f'echo {name} "$@" >> {programs}/said', "echo 5.host")
    assert Pbs().submit(Path("job.sh"), "4.host") == "5.host"
    Pbs().drain("5.host")
    Pbs().cancel("5.host")
    assert (programs / "said").read_text().splitlines() == [
        "qsub -W depend=afterany:4.host job.sh",
        "qsig -s SIGUSR1 5.host",
        "qdel 5.host",
    ]


def test_pbs_forgets_jobs(programs: Path) -> None:
    program(programs, "qstat", "echo 'qstat: Unknown Job Id 7.host' >&2", "exit 153")
    assert Pbs().fetch_states(["7.host"]) == {"7.host": "ended"}
    program(programs, "qstat", "echo 'qstat: cannot connect to server' >&2", "exit 1")
    with pytest.raises(BackendError, match="cannot connect"):
        Pbs().fetch_states(["7.host"])


@pytest.mark.parametrize(("said", "refused"), [("7 COMPLETED", False), ("7 PENDING", True)])
def test_a_job_that_is_gone_is_no_refusal(programs: Path, said: str, refused: bool) -> None:
    why = "scancel: error: Kill job error on job id 7: Invalid job id specified"
    program(programs, "scancel", f"echo '{why}' >&2", "exit 1")
    program(programs, "squeue", f"echo '{said}'")
    error = try_job_command(Slurm(), "7", Slurm().cancel)
    assert (error is not None) == refused
    program(programs, "squeue", "exit 1")
    assert try_job_command(Slurm(), "7", Slurm().cancel) is not None, "nobody says that it is gone"


def test_what_a_scheduler_refuses_is_told(programs: Path) -> None:
    program(programs, "sbatch", "echo 'sbatch: error: invalid account' >&2", "exit 1")
    with pytest.raises(BackendError, match="sbatch failed: sbatch: error: invalid account"):
        SCHEDULERS["slurm"].submit(Path("job.sh"))


def test_without_a_scheduler_the_login_node_is_named(programs: Path) -> None:
    os.environ["PATH"] = str(programs)
    with pytest.raises(ConfigurationError, match="qsub: command not found; submit from a login"):
        SCHEDULERS["pbs"].submit(Path("job.sh"))


def test_a_successor_does_not_inherit_its_predecessors_job(
    programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "4")
    monkeypatch.setenv("SLURM_CONF", "/etc/slurm.conf")
    monkeypatch.setenv("FANFOLD_END_TIME", "1")
    monkeypatch.setenv("MY_KEY", "k")
    program(programs, "sbatch", f"env > {programs}/env", "echo 5")
    Slurm().submit(Path("job.sh"))
    names = {line.partition("=")[0] for line in (programs / "env").read_text().splitlines()}
    assert {"SLURM_CONF", "MY_KEY"} <= names
    assert not {"SLURM_JOB_ID", "FANFOLD_END_TIME"} & names
