"""Begin, end and cancel of the jobs of a chain."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

from ...backends.cluster.chain import (
    BUDGET,
    DONE,
    FAILURES,
    INTERRUPTED,
    NOTHING_TO_DO,
    USAGE,
    Chain,
    ChainFile,
    Job,
    Verdict,
    chain_file,
    verdict,
)
from ...backends.cluster.schedulers import Scheduler, State, refusal, scheduler
from ...backends.core.errors import ConfigurationError, FanfoldError, SiteError
from ...backends.servers.events import last_words
from ...backends.storage.journal_index import Ledger
from ...backends.storage.run_folder import RunFolder, open_folder, run_ids
from ..run.console import say

_ENDS: Final = (DONE, FAILURES, USAGE, BUDGET)
"""Exit codes that end a chain, whatever became of the servers."""
_UNSERVED: Final = "no model server was left"
_PATIENCE_S: Final = 10.0
_LOOK_S: Final = 0.2
_SIGNALLED: Final = 128
"""What a shell adds to the number of the signal that ended a program."""


def begin(path: Path, name: str) -> int:
    """Note that a job begins, and submit its successor; return 0 if there is something to do.

    Args:
        path: The run folder.
        name: The job's id.
    """
    folder, file = open_folder(path), chain_file(path)
    chain = _known(file, name)
    finished, left = _counted(folder)
    for lost in _lost(chain, name):
        file.note("lost", job=lost.id, outcome="lost", finished=finished)
    chain = file.read()
    found = verdict(chain, left)
    if not found.on:
        file.note("ended", job=name, outcome="nothing to do", code=None, finished=finished)
        _halt(file, chain, found)
        return NOTHING_TO_DO
    _clear(path / "cluster" / "servers")
    file.note("began", job=name, finished=finished)
    say([f"job {name}: {found.why}"])
    chain = file.read()
    _follow(path, file, chain, name, verdict(chain, left))
    return 0


def end(path: Path, name: str, code: int, unserved: bool = False) -> int:
    """Note how a job ended; take the successor back, or see that there is one.

    Args:
        path: The run folder.
        name: The job's id.
        code: Exit code of its run.
        unserved: Whether no model server was left before it ended.
    """
    folder, file = open_folder(path), chain_file(path)
    _known(file, name)
    finished, left = _counted(folder)
    unserved = unserved and code not in _ENDS
    outcome = _UNSERVED if unserved else _outcome(code)
    if unserved:
        cluster = path / "cluster"
        words = last_words(cluster / "servers", cluster / f"serve-{name}.log")
        say([f"job {name}: {_UNSERVED}, and none could come; what was said last:", *words])
    file.note("ended", job=name, outcome=outcome, code=code, finished=finished, unserved=unserved)
    chain = file.read()
    found = verdict(chain, left)
    if found.on:
        _follow(path, file, chain, name, found)
    else:
        waiting = chain.successor(name)
        if waiting is not None:
            _withdraw(file, chain, waiting.id)
        _halt(file, chain, found)
    return code


def _known(file: ChainFile, name: str) -> Chain:
    """Return the chain once it names the job; whoever submits a job notes it a moment later.

    Raises:
        ConfigurationError: It does not.
    """
    patience = time.monotonic() + _PATIENCE_S
    while (chain := file.read()).job(name) is None:
        if time.monotonic() > patience:
            msg = f"job {name} is not of this run's chain; submit jobs by: fanfold submit"
            raise ConfigurationError(msg)
        time.sleep(_LOOK_S)
    return chain


def _counted(folder: RunFolder) -> tuple[int, int]:
    """Return how many items are finished, and how many are left."""
    about = folder.read_provenance()
    with Ledger(folder.journal, run_ids(about), about["input"]["items"]) as ledger:
        counts = ledger.counts()
    return counts.done + counts.failed, counts.open


def _lost(chain: Chain, name: str) -> list[Job]:
    """Return the jobs that began before this one and never said how they ended."""
    return [j for j in chain.unfinished() if j.began is not None and j.id != name]


def _clear(servers: Path) -> None:
    """Forget the endpoints of the job before, which may have been killed."""
    if servers.is_dir():
        for file in servers.iterdir():
            if file.is_file():
                file.unlink(missing_ok=True)
        for file in servers.glob("logs/*.failed"):  # of that job; its servers may come up now
            file.unlink(missing_ok=True)
    servers.mkdir(parents=True, exist_ok=True)


def _follow(path: Path, file: ChainFile, chain: Chain, name: str, found: Verdict) -> None:
    """Submit the job after this one, unless there is one, or none is to be."""
    this = chain.job(name)
    if not found.on or this is None or chain.successor(name) is not None:
        if not found.on:
            say([f"no further job: {found.why}"])
        return
    script = path / "cluster" / "job.sh"
    try:
        after = scheduler(chain.terms["scheduler"]).submit(script, name)
    except (SiteError, ConfigurationError) as error:
        why = f"the next job could not be submitted: {error.message}"
        by_hand = f"go on from a login node: fanfold submit {path} …"
        if this.ended is None:
            say([why, f"it is tried again at the end of this one; if that fails, {by_hand}"])
        else:
            say([why, by_hand])
            file.note("halted", why=f"{why}; {by_hand}")
        return
    file.note(
        "submitted",
        job=after,
        nodes=this.nodes,
        walltime_s=this.walltime_s,
        after=name,
        by_hand=False,
    )
    say([f"job {after} follows when this one has ended"])


def _withdraw(file: ChainFile, chain: Chain, name: str) -> None:
    asked = scheduler(chain.terms["scheduler"])
    refused = refusal(asked, name, asked.cancel)
    if refused is None:
        file.note("withdrawn", job=name, outcome="withdrawn before it began")
    else:
        say([f"job {name} could not be withdrawn: {refused.message}", "it ends as it begins"])


def _halt(file: ChainFile, chain: Chain, found: Verdict) -> None:
    say([f"the chain ends: {found.why}"])
    if chain.halted is None:
        file.note("halted", why=found.why)


def _outcome(code: int) -> str:
    words = {
        DONE: "finished",
        FAILURES: "finished, some items failed",
        INTERRUPTED: "interrupted",
        USAGE: "wrong setting",
        BUDGET: "budget spent",
    }
    if code in words:
        return words[code]
    return f"signal {code - _SIGNALLED}" if code > _SIGNALLED else f"exit code {code}"


_BY_HAND: Final = {"slurm": "scancel", "pbs": "qdel"}
_NONE_FOLLOWS: Final = "no job follows; what is finished stays, and fanfold submit goes on with it"


def cancel(path: Path, at_once: bool) -> None:
    """Let no job follow, and end those that wait or run; each of them is tried.

    Args:
        path: The run folder.
        at_once: Whether running jobs are ended by the scheduler rather than asked to.

    Raises:
        ConfigurationError: No job was ever submitted, or the scheduler's commands are not here.
        SiteError: Jobs could not be ended; says which, why, and what to do.
    """
    open_folder(path)
    file = chain_file(path)
    chain = file.read()
    if others := [job.id for job in chain.jobs if job.foreign and job.ended is None]:
        names = ", ".join(others)
        say([f"{names}: jobs of the run that this folder was copied from; not cancelled"])
    if all(job.foreign for job in chain.jobs):
        raise ConfigurationError(f"{path}: no job of this run was ever submitted")
    if chain.halted is None:
        file.note("halted", why="cancelled by fanfold cancel")
    asked = scheduler(chain.terms["scheduler"])
    states = _states(asked, chain.unfinished(), path)
    did, refused = defaultdict[str, list[str]](list), dict[str, FanfoldError]()
    for job in chain.unfinished():
        outcome = _ended(asked, file, job, states[job.id], at_once)
        if isinstance(outcome, FanfoldError):
            refused[job.id] = outcome
        else:
            did[outcome].append(job.id)
    say([f"{', '.join(jobs)}: {outcome}" for outcome, jobs in did.items()])
    if refused:
        raise SiteError(_advice(path, chain, refused))
    say([_NONE_FOLLOWS])


def _states(asked: Scheduler, jobs: Sequence[Job], path: Path) -> dict[str, State]:
    """Return what the scheduler says of jobs, or what the chain's notes let expect.

    Raises:
        ConfigurationError: The scheduler's commands are not here.
    """
    try:
        return asked.states([job.id for job in jobs])
    except ConfigurationError as error:
        msg = f"{error.message}: fanfold cancel {path}\nNo job follows those that are there."
        raise ConfigurationError(msg) from None
    except SiteError as error:
        say([error.message, "each job is tried all the same"])
        return {job.id: "running" if job.began else "queued" for job in jobs}


def _ended(
    asked: Scheduler, file: ChainFile, job: Job, state: State, at_once: bool
) -> str | FanfoldError:
    """End one job; return what became of it, or why it could not be."""
    if state == "ended":
        outcome = "is gone already"
    elif state == "running" and not at_once:
        outcome = "is asked to end; items in flight are waited for (--now ends it at once)"
        return refusal(asked, job.id, asked.drain) or outcome
    else:
        if (error := refusal(asked, job.id, asked.cancel)) is not None:
            return error
        outcome = "is withdrawn" if state == "queued" else "is cancelled"
    if job.began is None and state != "running":
        before = "cancelled" if state == "queued" else "gone"
        file.note("withdrawn", job=job.id, outcome=f"{before} before it began")
    return outcome


def _advice(path: Path, chain: Chain, refused: Mapping[str, FanfoldError]) -> str:
    why = (f"job {job} could not be ended: {error.message}" for job, error in refused.items())
    by_hand = " ".join((_BY_HAND[chain.terms["scheduler"]], *refused))
    return "\n".join(
        (
            *why,
            f"try again: fanfold cancel {path}   or by hand: {by_hand}",
            "no job follows in any case: one that waits ends as it begins",
        )
    )
