"""Begin, end and cancel the jobs of a chain."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ...backends.cluster.chain import (
    EXIT_NOTHING_TO_DO,
    ChainFile,
    Job,
    JobChain,
    NextJob,
    chain_file,
    next_job,
)
from ...backends.cluster.schedulers import SCHEDULERS, JobState, Scheduler, try_job_command
from ...backends.core.errors import (
    EXIT_BUDGET,
    EXIT_DONE,
    EXIT_FAILURES,
    EXIT_INTERRUPTED,
    EXIT_USAGE,
    BackendError,
    ConfigurationError,
    FanfoldError,
)
from ...backends.servers.events import last_errors
from ...backends.storage.journal import Journal
from ...backends.storage.run_folder import RunFolder, get_run_ids, open_folder
from ..run.console import print_messages
from ..run.stage_folder import is_pipeline_finished, list_stage_runs

_ENDS: Final = (EXIT_DONE, EXIT_FAILURES, EXIT_USAGE, EXIT_BUDGET)
"""Exit codes that end a chain, whatever the state of the servers."""
_UNSERVED: Final = "no model server was left"
_PATIENCE_S: Final = 10.0
_LOOK_S: Final = 0.2
_SIGNALLED: Final = 128
"""Number that a shell adds to the signal that ended a program."""


def begin_job(path: Path, name: str) -> int:
    """Record that a job begins, and submit its successor; return 0 if there is work left.

    Args:
        path: The run folder.
        name: The job's id.
    """
    folder, file = open_folder(path), chain_file(path)
    chain = _wait_for_job(file, name)
    finished, left = _count_items(folder)
    for lost in _find_lost_jobs(chain, name):
        file.append("lost", job=lost.id, outcome="lost", finished=finished)
    chain = file.read()
    found = next_job(chain, left)
    if not found.is_due:
        file.append("ended", job=name, outcome="nothing to do", code=None, finished=finished)
        _halt_chain(file, chain, found)
        return EXIT_NOTHING_TO_DO
    _clear(path / "cluster" / "servers")
    file.append("began", job=name, finished=finished)
    print_messages([f"job {name}: {found.reason}"])
    chain = file.read()
    _submit_next(path, file, chain, name, next_job(chain, left))
    return 0


def end_job(path: Path, name: str, code: int, unserved: bool = False) -> int:
    """Record how a job ended; withdraw its successor, or make sure that there is one.

    Args:
        path: The run folder.
        name: The job's id.
        code: Exit code of its run.
        unserved: Whether no model server was left.
    """
    folder, file = open_folder(path), chain_file(path)
    _wait_for_job(file, name)
    finished, left = _count_items(folder)
    unserved = unserved and code not in _ENDS
    outcome = _UNSERVED if unserved else _describe_exit(code)
    if unserved:
        cluster = path / "cluster"
        words = last_errors(cluster / "servers", cluster / f"serve-{name}.log")
        print_messages([f"job {name}: {_UNSERVED}, and none could start; last messages:", *words])
    file.append("ended", job=name, outcome=outcome, code=code, finished=finished, unserved=unserved)
    chain = file.read()
    found = next_job(chain, left)
    if found.is_due:
        _submit_next(path, file, chain, name, found)
    else:
        waiting = chain.find_successor(name)
        if waiting is not None:
            _withdraw_job(file, chain, waiting.id)
        _halt_chain(file, chain, found)
    return code


def _wait_for_job(file: ChainFile, name: str) -> JobChain:
    """Return the chain once it lists the job; a job is recorded shortly after its submission.

    Raises:
        ConfigurationError: The chain does not list it in time.
    """
    patience = time.monotonic() + _PATIENCE_S
    while (chain := file.read()).find_job(name) is None:
        if time.monotonic() > patience:
            msg = f"job {name} is not in this run's chain; submit jobs with: fanfold submit"
            raise ConfigurationError(msg)
        time.sleep(_LOOK_S)
    return chain


def _count_items(folder: RunFolder) -> tuple[int, int]:
    """Return the number of items that are finished, and of those that are left.

    Of a pipeline, the items of stages to come are unknown: they count as one.
    """
    finished = left = 0
    for run in list_stage_runs(folder) if folder.is_pipeline else [folder]:
        about = run.read_provenance()
        with Journal(run.journal, get_run_ids(about), about["input"]["items"]) as journal:
            counts = journal.count_items()
        finished, left = finished + counts.done + counts.failed, left + counts.open
    if folder.is_pipeline:
        left = 0 if is_pipeline_finished(folder) else max(1, left)
    return finished, left


def _find_lost_jobs(chain: JobChain, name: str) -> list[Job]:
    """Return the jobs that began before this one and never recorded their end."""
    return [j for j in chain.unfinished_jobs() if j.began is not None and j.id != name]


def _clear(servers: Path) -> None:
    """Remove the endpoints of the previous job, which may have been killed."""
    if servers.is_dir():
        for file in servers.iterdir():
            if file.is_file():
                file.unlink(missing_ok=True)
        for file in servers.glob("logs/*.failed"):  # its servers may start this time
            file.unlink(missing_ok=True)
    servers.mkdir(parents=True, exist_ok=True)


def _submit_next(path: Path, file: ChainFile, chain: JobChain, name: str, found: NextJob) -> None:
    """Submit the job after this one, unless there is one already or none is due."""
    this = chain.find_job(name)
    if not found.is_due or this is None or chain.find_successor(name) is not None:
        if not found.is_due:
            print_messages([f"no further job: {found.reason}"])
        return
    script = path / "cluster" / "job.sh"
    try:
        after = SCHEDULERS[chain.options["scheduler"]].submit(script, name)
    except (BackendError, ConfigurationError) as error:
        why = f"the next job could not be submitted: {error.message}"
        by_hand = f"resume from a login node: fanfold submit {path} …"
        if this.ended is None:
            print_messages(
                [why, f"fanfold retries at the end of this job; if that fails, {by_hand}"]
            )
        else:
            print_messages([why, by_hand])
            file.append("halted", why=f"{why}; {by_hand}")
        return
    file.append(
        "submitted",
        job=after,
        nodes=this.nodes,
        walltime_s=this.walltime_s,
        after=name,
        by_hand=False,
    )
    print_messages([f"job {after} starts after this one has ended"])


def _withdraw_job(file: ChainFile, chain: JobChain, name: str) -> None:
    scheduler = SCHEDULERS[chain.options["scheduler"]]
    refused = try_job_command(scheduler, name, scheduler.cancel)
    if refused is None:
        file.append("withdrawn", job=name, outcome="withdrawn before it began")
    else:
        print_messages(
            [
                f"job {name} could not be withdrawn: {refused.message}",
                "it will end as soon as it starts",
            ]
        )


def _halt_chain(file: ChainFile, chain: JobChain, found: NextJob) -> None:
    print_messages([f"end of the chain: {found.reason}"])
    if chain.halt_reason is None:
        file.append("halted", why=found.reason)


def _describe_exit(code: int) -> str:
    words = {
        EXIT_DONE: "finished",
        EXIT_FAILURES: "finished, some items failed",
        EXIT_INTERRUPTED: "interrupted",
        EXIT_USAGE: "wrong setting",
        EXIT_BUDGET: "budget spent",
    }
    if code in words:
        return words[code]
    return f"signal {code - _SIGNALLED}" if code > _SIGNALLED else f"exit code {code}"


_NONE_FOLLOWS: Final = "no further job; finished items are kept, and fanfold submit resumes the run"


def cancel_jobs(path: Path, at_once: bool) -> None:
    """Stop the chain, and cancel each job that waits or runs.

    Args:
        path: The run folder.
        at_once: Kill running jobs instead of letting them drain.

    Raises:
        ConfigurationError: No job was ever submitted, or the scheduler's commands are missing.
        BackendError: Some jobs could not be ended; the message says which, why, and what to do.
    """
    open_folder(path)
    file = chain_file(path)
    chain = file.read()
    if others := [job.id for job in chain.jobs if job.foreign and job.ended is None]:
        names = ", ".join(others)
        print_messages(
            [f"{names}: not cancelled: jobs of the run that this folder was copied from"]
        )
    if all(job.foreign for job in chain.jobs):
        raise ConfigurationError(f"{path}: no job of this run was ever submitted")
    if chain.halt_reason is None:
        file.append("halted", why="cancelled by fanfold cancel")
    scheduler = SCHEDULERS[chain.options["scheduler"]]
    states = _states(scheduler, chain.unfinished_jobs(), path)
    outcomes, refused = defaultdict[str, list[str]](list), dict[str, FanfoldError]()
    for job in chain.unfinished_jobs():
        outcome = _end_job(scheduler, file, job, states[job.id], at_once)
        if isinstance(outcome, FanfoldError):
            refused[job.id] = outcome
        else:
            outcomes[outcome].append(job.id)
    print_messages([f"{', '.join(jobs)}: {outcome}" for outcome, jobs in outcomes.items()])
    if refused:
        raise BackendError(_advice(path, scheduler, refused))
    print_messages([_NONE_FOLLOWS])


def _states(scheduler: Scheduler, jobs: Sequence[Job], path: Path) -> dict[str, JobState]:
    """Return the job states from the scheduler, or those that the chain's records suggest.

    Raises:
        ConfigurationError: The scheduler's commands are missing.
    """
    try:
        return scheduler.fetch_states([job.id for job in jobs])
    except ConfigurationError as error:
        msg = f"{error.message}: fanfold cancel {path}\nNo job follows the current ones."
        raise ConfigurationError(msg) from None
    except BackendError as error:
        print_messages([error.message, "trying to cancel each job anyway"])
        return {job.id: "running" if job.began else "queued" for job in jobs}


def _end_job(
    scheduler: Scheduler, file: ChainFile, job: Job, state: JobState, at_once: bool
) -> str | FanfoldError:
    """End one job; return the outcome or the error."""
    is_running = state == "running" or (state == "unknown" and job.began is not None)
    if state == "ended":
        outcome = "is gone already"
    elif is_running and not at_once:
        outcome = "draining: finishes the items in flight (use --now to kill it)"
        return try_job_command(scheduler, job.id, scheduler.drain) or outcome
    else:
        if (error := try_job_command(scheduler, job.id, scheduler.cancel)) is not None:
            return error
        outcome = "is withdrawn" if state == "queued" else "is cancelled"
    if job.began is None and state in {"queued", "ended"}:
        before = "cancelled" if state == "queued" else "gone"
        file.append("withdrawn", job=job.id, outcome=f"{before} before it began")
    return outcome


def _advice(path: Path, scheduler: Scheduler, refused: Mapping[str, FanfoldError]) -> str:
    why = (f"job {job} could not be ended: {error.message}" for job, error in refused.items())
    by_hand = " ".join((scheduler.cancel_command, *refused))
    return "\n".join(
        (
            *why,
            f"try again: fanfold cancel {path}   or by hand: {by_hand}",
            "no job follows in any case: a waiting job ends as soon as it starts",
        )
    )
