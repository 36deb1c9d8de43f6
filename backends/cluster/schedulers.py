"""Use a batch scheduler: submit, query, signal and cancel jobs, and read their usage."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final, Literal, Protocol

import orjson

from ..core.errors import BackendError, ConfigurationError, FanfoldError
from .job_plan import JobPlan, format_hms
from .walltime import SLURM_END_TIME_ENV

_TIMEOUT_S: Final = 120
_PURGED: Final = re.compile(r"unknown job", re.IGNORECASE)
"""Printed by ``qstat`` for a job that ended a while ago."""

_INVALID_ID: Final = re.compile(r"invalid job id", re.IGNORECASE)
"""Printed by ``squeue`` for a job that ended a while ago."""

_SLURM_ROW: Final = re.compile(r"\s*(\d[\w\[\]%,+-]*)\s+([A-Z_]+)\s*")
_SLURM_ID: Final = re.compile(r"(\d+)(?:;\S*)?")
_PBS_ID: Final = re.compile(r"(\d+(?:\[\])?(?:\.[\w.-]+)?)")

JobState = Literal["queued", "running", "ended", "unknown"]


@dataclass(frozen=True, slots=True)
class SchedulerUsage:
    """What a job used, from the scheduler's accounts.

    Attributes:
        node_s: Node-seconds; a job may lose nodes while it runs.
        wall_s: Seconds that it took.
        state: The scheduler's word for how it ended.
    """

    node_s: float
    wall_s: float
    state: str


class Scheduler(Protocol):
    """A batch scheduler, used through its commands; all calls block.

    Attributes:
        submit_command: The program that submits a script.
        cancel_command: The program with which a user ends a job by its id.
        job_variable: The variable with the id of a job, set in the job.
        end_variable: The variable with the Unix time of a job's end, if it sets one.
        variables: Pattern of the names of its variables, which a job does not inherit from another.
        kept_variables: Those that locate the scheduler, and are inherited.
        keeps_broken_jobs: Whether a job whose first node is lost goes on until its walltime; the
            other nodes then end it.
    """

    submit_command: ClassVar[str]
    cancel_command: ClassVar[str]
    job_variable: ClassVar[str]
    end_variable: ClassVar[str | None]
    variables: ClassVar[str]
    kept_variables: ClassVar[frozenset[str]]
    keeps_broken_jobs: ClassVar[bool]

    def directives(self, plan: JobPlan) -> Iterator[str]:
        """Yield the lines of a job script that the scheduler reads."""

    def submit(self, script: Path, after: str | None = None) -> str:
        """Submit a script; with ``after``, to start once that job has ended for any reason.

        Raises:
            BackendError: The scheduler refuses; with its reason.
            ConfigurationError: The scheduler's commands do not exist here.
        """

    def fetch_states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        """Return the state of jobs.

        One that the scheduler no longer knows has ended. ``unknown`` is a state that fanfold does
        not know, or a job that is missing from a listing with other text in it.
        """

    def drain(self, job: str) -> None:
        """Ask a running job to stop cleanly."""

    def cancel(self, job: str) -> None:
        """End a job, queued or running."""

    def fetch_usage(self, jobs: Sequence[str]) -> dict[str, SchedulerUsage]:
        """Return what jobs used, without those that the scheduler has not accounted yet.

        Raises:
            BackendError: The scheduler keeps no accounts; with its reason.
            ConfigurationError: The scheduler's commands do not exist here.
        """


class Slurm(Scheduler):
    """Slurm, through ``sbatch``, ``squeue``, ``scancel`` and ``sacct``."""

    submit_command = "sbatch"
    cancel_command = "scancel"
    job_variable = "SLURM_JOB_ID"
    end_variable = SLURM_END_TIME_ENV
    variables = "SLURM|SBATCH|SRUN"
    kept_variables = frozenset({"SLURM_CONF"})
    keeps_broken_jobs = True

    def directives(self, plan: JobPlan) -> Iterator[str]:
        """Yield the lines for ``sbatch``."""
        yield f"#SBATCH --job-name=fanfold-{plan.name}"
        yield f"#SBATCH --nodes={plan.nodes}"
        yield f"#SBATCH --time={format_hms(plan.walltime_s)}"
        if plan.account is not None:
            yield f"#SBATCH --account={plan.account}"
        if plan.queue is not None:
            yield f"#SBATCH {plan.site.queue_option}={plan.queue}"
        yield f"#SBATCH --output={plan.folder}/scheduler-%j.log"
        yield "#SBATCH --no-requeue"
        if plan.starts_servers or not plan.starts_workers:
            yield "#SBATCH --no-kill"  # the other nodes end the job if the first is lost
        yield f"#SBATCH --signal=B:USR1@{plan.warning_s}"
        yield from (f"#SBATCH {line}" for line in plan.site.directives)

    def submit(self, script: Path, after: str | None = None) -> str:
        """Submit a script; returns the job's id."""
        depend = [f"--dependency=afterany:{after}"] if after else []
        output = _run_command(["sbatch", "--parsable", *depend, str(script)])
        return _find_job_id("sbatch", _SLURM_ID, output)

    def fetch_states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        """Return the state of jobs."""
        if not jobs:
            return {}
        found, is_whole = self._list_states(f"--user={os.getuid()}")
        states = dict[str, JobState]()
        for job in jobs:
            if job in found or is_whole:
                states[job] = _slurm_state(found.get(job))
            else:
                states[job] = self._fetch_state(job)
        return states

    def _fetch_state(self, job: str) -> JobState:
        """Ask for one job that a listing with other text in it does not have."""
        try:
            found, is_whole = self._list_states(f"--jobs={job}")
        except BackendError as error:
            return "ended" if _INVALID_ID.search(error.message) else "unknown"
        return _slurm_state(found.get(job)) if job in found or is_whole else "unknown"

    def _list_states(self, which: str) -> tuple[dict[str, str], bool]:
        """Return the states by job, and whether the listing has no other text in it."""
        output = _run_command(["squeue", "--noheader", which, "--states=all", "--format=%i %T"])
        lines = [line for line in output.splitlines() if line.strip()]
        rows = [match for line in lines if (match := _SLURM_ROW.fullmatch(line))]
        return {row[1]: row[2] for row in rows}, len(rows) == len(lines)

    def drain(self, job: str) -> None:
        """Signal the job's script."""
        _run_command(["scancel", "--batch", "--signal=USR1", job])

    def cancel(self, job: str) -> None:
        """End a job."""
        _run_command(["scancel", job])

    def fetch_usage(self, jobs: Sequence[str]) -> dict[str, SchedulerUsage]:
        """Return the usage that ``sacct`` reports."""
        if not jobs:
            return {}
        fields = "--format=JobIDRaw,State,ElapsedRaw,NNodes"
        command = ["sacct", "-n", "-P", "-X", "-D", f"--jobs={','.join(jobs)}", fields]
        rows = [line.split("|") for line in _run_command(command).splitlines()]
        used = dict[str, SchedulerUsage]()
        for job, state, elapsed, nodes in (row for row in rows if len(row) == 4):  # noqa: PLR2004 - four fields
            if nodes.isdigit() and elapsed.isdigit():
                used[job] = _add_usage_row(used.get(job), int(nodes), float(elapsed), state)
        return used


def _add_usage_row(
    before: SchedulerUsage | None, nodes: int, wall_s: float, state: str
) -> SchedulerUsage:
    """Return the usage of a job with one more row.

    If a job loses a node and continues, its row ends as ``RESIZING`` and another one begins.
    Otherwise a further row is of another job: ids are reused at some time.
    """
    node_s = nodes * wall_s
    if before is not None and before.state == "RESIZING":
        return SchedulerUsage(before.node_s + node_s, before.wall_s + wall_s, state)
    return SchedulerUsage(node_s, wall_s, state)


_SLURM_STATES: Final[dict[JobState, str]] = {
    "queued": "PENDING CONFIGURING EXPEDITING POWER_UP_NODE REQUEUED REQUEUE_FED REQUEUE_HOLD "
    "RESV_DEL_HOLD SPECIAL_EXIT",
    "running": "RUNNING COMPLETING RESIZING SIGNALING STAGE_OUT STOPPED SUSPENDED UPDATE_DB",
    "ended": "BOOT_FAIL CANCELLED COMPLETED DEADLINE FAILED LAUNCH_FAILED NODE_FAIL OUT_OF_MEMORY "
    "PREEMPTED RECONFIG_FAIL TIMEOUT",
}
"""Job states of Slurm (slurm.schedmd.com/job_state_codes.html); any other one is unknown."""


def _slurm_state(word: str | None) -> JobState:
    """Return the state of a job; None, which is not listed any more, has ended."""
    if word is None:
        return "ended"
    return next((s for s, words in _SLURM_STATES.items() if word in words.split()), "unknown")


class Pbs(Scheduler):
    """PBS Professional or OpenPBS, through ``qsub``, ``qstat``, ``qsig`` and ``qdel``."""

    submit_command = "qsub"
    cancel_command = "qdel"
    job_variable = "PBS_JOBID"
    end_variable = None
    variables = "PBS"
    kept_variables = frozenset({"PBS_CONF_FILE", "PBS_EXEC", "PBS_SERVER", "PBS_HOME"})
    keeps_broken_jobs = False

    def directives(self, plan: JobPlan) -> Iterator[str]:
        """Yield the lines for ``qsub``."""
        chunk = f":{plan.site.chunk}" if plan.site.chunk else ""
        name = f"#PBS -N fanfold-{plan.name}"
        yield name[:23]  # older versions of PBS accept 15 characters of a name
        yield f"#PBS -l select={plan.nodes}{chunk}"
        yield f"#PBS -l walltime={format_hms(plan.walltime_s)}"
        if plan.site.filesystems is not None:
            yield f"#PBS -l filesystems={plan.site.filesystems}"
        if plan.account is not None:
            yield f"#PBS -A {plan.account}"
        if plan.queue is not None:
            yield f"#PBS -q {plan.queue}"
        yield "#PBS -j oe"
        yield f"#PBS -o {plan.folder}/"
        yield "#PBS -r n"
        yield from (f"#PBS {line}" for line in plan.site.directives)

    def submit(self, script: Path, after: str | None = None) -> str:
        """Submit a script; returns the job's id."""
        depend = ["-W", f"depend=afterany:{after}"] if after else []
        return _find_job_id("qsub", _PBS_ID, _run_command(["qsub", *depend, str(script)]))

    def fetch_states(self, jobs: Sequence[str]) -> dict[str, JobState]:
        """Return the state of jobs."""
        found = self._query_jobs(jobs)
        for job in jobs if len(jobs) > 1 else ():
            if job not in found:  # one of several may be left out for any reason
                found |= self._query_jobs([job])
        return {job: _pbs_state(found.get(job)) for job in jobs}

    def drain(self, job: str) -> None:
        """Signal the job."""
        _run_command(["qsig", "-s", "SIGUSR1", job])

    def cancel(self, job: str) -> None:
        """End a job."""
        _run_command(["qdel", job])

    def fetch_usage(self, jobs: Sequence[str]) -> dict[str, SchedulerUsage]:
        """Return the usage that ``qstat`` reports."""
        used = {}
        for name, one in self._query_jobs(jobs).items():
            wall, nodes = (
                _mapping(one.get("resources_used")).get("walltime"),
                _mapping(one.get("Resource_List")).get("nodect"),
            )
            if wall is not None and str(nodes).isdigit():
                wall_s = _seconds(str(wall))
                used[name] = SchedulerUsage(
                    int(str(nodes)) * wall_s, wall_s, str(one.get("job_state"))
                )
        return used

    def _query_jobs(self, jobs: Sequence[str]) -> dict[str, Mapping[str, object]]:
        """Return the ``qstat`` entries of jobs, including ended ones."""
        if not jobs:
            return {}
        try:
            output = _run_command(["qstat", "-x", "-f", "-F", "json", *jobs], errors_too=True)
        except BackendError as error:
            if not _PURGED.search(error.message):
                raise
            return {}  # it knows none of them any more
        begin, end = output.find("{"), output.rfind("}") + 1  # a greeting may precede it
        try:
            found = orjson.loads(output[begin:end] or "{}").get("Jobs", {})
            found = {name: _mapping(one) for name, one in found.items()}
        except (orjson.JSONDecodeError, AttributeError):
            raise BackendError(f"qstat: output is not JSON: {output[:200]!r}") from None
        return {job: one for job in jobs for name, one in found.items() if _is_same_job(job, name)}


def _find_job_id(program: str, form: re.Pattern[str], output: str) -> str:
    """Return the job's id from the output of a submission, which may also have a greeting.

    Raises:
        BackendError: No line has the form of an id.
    """
    found = [match[1] for line in output.splitlines() if (match := form.fullmatch(line.strip()))]
    if not found:
        msg = (
            f"{program}: printed no job id but {output.strip()[:200]!r}; the job may be submitted: "
            "look for it in the queue, and cancel it there before another attempt"
        )
        raise BackendError(msg)
    return found[-1]


def _is_same_job(a: str, b: str) -> bool:
    """Return True if two ids name the same job; the server's name may be short or long."""
    return a == b or a.partition(".")[0] == b.partition(".")[0]


def _mapping(value: object) -> Mapping[str, object]:
    return value if isinstance(value, dict) else {}


_PBS_STATES: Final[dict[str, JobState]] = {
    **dict.fromkeys("QHWTM", "queued"),
    **dict.fromkeys("REBSU", "running"),
    **dict.fromkeys("FX", "ended"),
}
"""Job states of PBS (qstat(1B)); any other one is unknown."""


def _pbs_state(job: Mapping[str, object] | None) -> JobState:
    """Return the state of a job's entry; None, which PBS does not know any more, has ended."""
    return "ended" if job is None else _PBS_STATES.get(str(job.get("job_state")), "unknown")


def _seconds(text: str) -> float:
    """Return the seconds of ``HH:MM:SS``."""
    total = 0.0
    for part in text.split(":"):
        total = 60 * total + float(part)
    return total


SCHEDULERS: Final[dict[str, Scheduler]] = {"pbs": Pbs(), "slurm": Slurm()}
"""The batch schedulers, by their name in a site file; :mod:`configs.site` has the settings."""

_INHERITED: Final = re.compile(
    rf"({'|'.join(one.variables for one in SCHEDULERS.values())}"
    r"|PMI|PALS|FANFOLD_(END|LAUNCHER|JOB|NODES))_?"
)
"""Variables of the submitting job that its successor must not inherit."""
_KEPT: Final = frozenset().union(*(one.kept_variables for one in SCHEDULERS.values()))


def try_job_command(
    scheduler: Scheduler, job: str, command: Callable[[str], None]
) -> FanfoldError | None:
    """Run a scheduler command on one job, and return the error if it fails.

    Also returns None if it fails because the job has ended.

    Args:
        scheduler: The scheduler.
        job: The job's id.
        command: Its ``cancel`` or ``drain``.
    """
    try:
        command(job)
    except FanfoldError as error:
        try:
            has_ended = scheduler.fetch_states([job])[job] == "ended"
        except FanfoldError:
            return error
        return None if has_ended else error
    return None


def check_scheduler(kind: str) -> None:
    """Check that jobs can be submitted from here.

    Raises:
        ConfigurationError: The scheduler's commands do not exist here.
    """
    program = SCHEDULERS[kind].submit_command
    if shutil.which(program) is None:
        raise ConfigurationError(_absent(program))


def _absent(program: str) -> str:
    submits = program in {one.submit_command for one in SCHEDULERS.values()}
    what = "submit" if submits else "ask"
    return f"{program}: command not found; {what} from a login node of the cluster"


def _run_command(command: Sequence[str], errors_too: bool = False) -> str:
    """Run a command of the scheduler and return its output.

    Args:
        command: The command.
        errors_too: Also return the output if the command failed but printed some.

    Raises:
        ConfigurationError: The command does not exist.
        BackendError: It failed or timed out.
    """
    environment = {k: v for k, v in os.environ.items() if k in _KEPT or not _INHERITED.match(k)}
    try:
        completed = subprocess.run(
            command,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
            env=environment,
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise ConfigurationError(_absent(command[0])) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BackendError(f"{command[0]}: {error}") from error
    if completed.returncode and not (errors_too and completed.stdout.strip()):
        reason = (
            completed.stderr.strip()
            or completed.stdout.strip()
            or f"exit code {completed.returncode}"
        )
        raise BackendError(f"{command[0]} failed: {reason}")
    return completed.stdout
