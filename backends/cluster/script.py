"""Job scripts: what a scheduler runs, written to be read and edited."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...configs.site import SiteConfig, fill
from ..contract.errors import ConfigurationError

_PLAIN: Final = re.compile(r"[A-Za-z0-9_./+=@,:-]+")
_MINUTE: Final = 60
_STOP_S: Final = 30
"""So long servers have for ending; fanfold serve gives each of them 20 s."""
_MOST_RESERVE: Final = 0.2
"""At most this share of a job is kept for stopping; trials have jobs of a minute."""


@dataclass(frozen=True, slots=True)
class JobPlan:
    """What a job of a chain is.

    Attributes:
        run: The run folder, absolute.
        name: The run's name.
        command: How fanfold is started, e.g. ``[python, -m, fanfold]``.
        site: The site.
        nodes: Nodes of the job.
        walltime_s: Most seconds of the job.
        drain_s: Seconds that a stop waits for items in flight.
        serves: Whether the job starts model servers on its nodes.
        queue: Queue, partition or quality of service.
        account: Account or project.
        archive: An environment by ``fanfold pack`` to copy to the nodes, absolute.
    """

    run: Path
    name: str
    command: Sequence[str]
    site: SiteConfig
    nodes: int
    walltime_s: int
    drain_s: float
    serves: bool
    queue: str | None = None
    account: str | None = None
    archive: Path | None = None

    @property
    def folder(self) -> Path:
        """Return the folder of scripts, logs and servers."""
        return self.run / "cluster"

    @property
    def reserve_s(self) -> int:
        """Return the seconds that are kept at the job's end."""
        return min(self.site.reserve_s, int(self.walltime_s * _MOST_RESERVE))

    @property
    def warning_s(self) -> int:
        """Return how many seconds before its end the scheduler signals the job."""
        return min(self.reserve_s + int(self.drain_s), self.walltime_s // 2)

    def check(self) -> None:
        """Check what the site asks for and the scheduler's lines can hold.

        Raises:
            ConfigurationError: An option is missing, or holds what a scheduler cannot read.
        """
        for option in self.site.required:
            if getattr(self, option) is None:
                msg = f"site {self.site.name} needs --{option}; your allocation says which"
                raise ConfigurationError(msg)
        if self.archive is not None and self.site.broadcast is None:
            msg = f"--pack: site {self.site.name} has no 'broadcast' line to copy it to the nodes"
            raise ConfigurationError(msg)
        given = {"--out": str(self.run), "--queue": self.queue, "--account": self.account}
        for name, text in given.items():
            if text is not None and not _PLAIN.fullmatch(text):
                msg = f"{name} {text!r}: schedulers read only letters, digits and _./+=@,:- there"
                raise ConfigurationError(msg)
        if self.walltime_s < _MINUTE:
            raise ConfigurationError(
                f"--walltime: {self.walltime_s} s; a job takes a minute at least"
            )


def clock(seconds: int) -> str:
    """Return seconds as ``HH:MM:SS``."""
    return f"{seconds // 3600:02}:{seconds % 3600 // 60:02}:{seconds % 60:02}"


def job_script(plan: JobPlan) -> str:
    """Return the script that the scheduler runs on the first node."""
    return _text(
        "#!/bin/bash",
        *_directives(plan),
        "",
        f"# One job of the run {plan.name!r}, for the site {plan.site.name} ({plan.site.tested}).",
        "# 'fanfold submit' wrote this file and writes it anew; change the site file instead.",
        *_variables(plan),
        'exec > "$cluster/job-$job.log" 2>&1',
        *_environment(plan),
        "",
        "# A signal, by the scheduler near the end or by 'fanfold cancel', is for the run.",
        "work= asked=",
        'asked() { [ -n "$asked" ] || { asked=1; [ -z "$work" ] || kill -USR1 "$work"; }; }',
        "trap asked TERM USR1",
        "",
        "# Is there anything to do? If so, the successor is submitted now and waits for this job:",
        "# it comes even if this node is lost.",
        '"${fanfold[@]}" chain begin "$run" --job "$job" || exit 0',
        *(_servers(plan) if plan.serves else ()),
        *_coordinator(),
        *(_stopping(plan) if plan.serves else ()),
        "",
        "# Note how it ended; take the successor back when nothing is left to do.",
        '"${fanfold[@]}" chain end "$run" --job "$job" --code "$code"',
    )


def node_script(plan: JobPlan) -> str:
    """Return the script that the launcher starts on each node."""
    host = f' --host "{plan.site.host}"' if plan.site.host else ""
    return _text(
        "#!/bin/bash",
        f"# On each node of a job of the run {plan.name!r}: serve the model until SIGUSR2.",
        "trap '' USR1   # the scheduler's warning is for the coordinator, not for servers",
        "serve= asked=",
        'trap \'asked=1; [ -z "$serve" ] || kill -TERM "$serve" 2>/dev/null\' USR2 TERM',
        _assigned("run", str(plan.run)),
        *_unpacking(plan),
        f'"${{fanfold[@]}}" serve "$run" --servers "$run/cluster/servers"{host} &',
        'serve=$!; [ -z "$asked" ] || kill -TERM "$serve"',
        *(_watching(plan) if plan.site.scheduler == "slurm" else ()),
        'while kill -0 "$serve" 2>/dev/null; do wait "$serve"; done',
        *(('kill "$watch" 2>/dev/null',) if plan.site.scheduler == "slurm" else ()),
        *_ending(plan),
    )


def _directives(plan: JobPlan) -> Iterator[str]:
    if plan.site.scheduler == "slurm":
        yield from (f"#SBATCH {line}" for line in _slurm(plan))
    else:
        yield from (f"#PBS {line}" for line in _pbs(plan))


def _slurm(plan: JobPlan) -> Iterator[str]:
    yield f"--job-name=fanfold-{plan.name}"
    yield f"--nodes={plan.nodes}"
    yield f"--time={clock(plan.walltime_s)}"
    if plan.account is not None:
        yield f"--account={plan.account}"
    if plan.queue is not None:
        yield f"{plan.site.queue_option}={plan.queue}"
    yield f"--output={plan.folder}/scheduler-%j.log"
    yield "--no-requeue"
    yield "--no-kill"
    yield f"--signal=B:USR1@{plan.warning_s}"
    yield from plan.site.directives


def _pbs(plan: JobPlan) -> Iterator[str]:
    chunk = f":{plan.site.chunk}" if plan.site.chunk else ""
    yield f"-N fanfold-{plan.name}"[:18]  # PBS takes 15 characters of a name in its older versions
    yield f"-l select={plan.nodes}{chunk}"
    yield f"-l walltime={clock(plan.walltime_s)}"
    if plan.site.filesystems is not None:
        yield f"-l filesystems={plan.site.filesystems}"
    if plan.account is not None:
        yield f"-A {plan.account}"
    if plan.queue is not None:
        yield f"-q {plan.queue}"
    yield "-j oe"
    yield f"-o {plan.folder}/"
    yield "-r n"
    yield from plan.site.directives


def _variables(plan: JobPlan) -> Iterator[str]:
    yield _assigned("run", str(plan.run))
    yield "cluster=$run/cluster"
    yield f"fanfold=({shlex.join(plan.command)})"
    end = f"$(($(date +%s) + {plan.walltime_s}))"
    if plan.site.scheduler == "slurm":
        yield "job=$SLURM_JOB_ID"
        yield f"end=${{SLURM_JOB_END_TIME:-{end}}}"
    else:
        yield "job=$PBS_JOBID"
        yield f"end={end}"
    yield f"export FANFOLD_END_TIME=$((end - {plan.reserve_s}))   # the coordinator drains before"


def _environment(plan: JobPlan) -> Iterator[str]:
    site = plan.site
    if site.modules:
        yield f"module load {shlex.join(site.modules)}"
    yield from site.setup
    for name, value in (site.environment | site.proxies).items():
        yield f"export {_assigned(name, value)}"


def _servers(plan: JobPlan) -> Iterator[str]:
    values = _values(plan)
    if plan.archive is not None:
        yield ""
        yield "# The environment, copied once to each node's own storage."
        yield f"export FANFOLD_COPY={values['copy']}"
        yield f"{fill(plan.site.broadcast or '', values)} || exit 1"
    yield ""
    if plan.site.scheduler == "slurm":
        yield "# A sign of life for the other nodes: Slurm keeps a job whose first node is lost."
        yield f'(while touch "$cluster/alive"; do sleep {_every(plan)}; done) & alive=$!'
        yield ""
    yield "# The model's servers: one process on each node, which starts and watches that node's."
    launcher = fill(plan.site.launcher, values)
    yield f"(trap '' USR1; exec {launcher} \\"
    yield '  bash "$cluster/node.sh") > "$cluster/serve-$job.log" 2>&1 &'
    yield "servers=$!"


def _values(plan: JobPlan) -> dict[str, object]:
    local = plan.site.local
    copy = f"{local}/fanfold-$job.tar.gz"
    archive = shlex.quote(str(plan.archive)) if plan.archive is not None else ""
    return {"nodes": plan.nodes, "archive": archive, "copy": copy, "local": local}


def _coordinator() -> Iterator[str]:
    yield ""
    yield "# The run: asks all nodes from here until nothing is left, or the time is nearly up."
    yield '"${fanfold[@]}" resume "$run" &'
    yield 'work=$!; [ -z "$asked" ] || kill -USR1 "$work"'
    yield 'while kill -0 "$work" 2>/dev/null; do wait "$work"; done'
    yield 'wait "$work"; code=$?'
    yield "trap '' TERM USR1"


def _stopping(plan: JobPlan) -> Iterator[str]:
    yield ""
    yield "# Launchers pass SIGUSR2 on to the nodes, where SIGTERM may be SIGKILL by then."
    yield 'kill -USR2 "$servers" 2>/dev/null'
    yield f'for _ in $(seq {_STOP_S}); do kill -0 "$servers" 2>/dev/null || break; sleep 1; done'
    yield 'kill -TERM "$servers" 2>/dev/null; wait "$servers"'
    if plan.site.scheduler == "slurm":
        yield 'kill "$alive"'


def _unpacking(plan: JobPlan) -> Iterator[str]:
    if plan.archive is None:
        yield f"fanfold=({shlex.join(plan.command)})"
        return
    yield "environment=${FANFOLD_COPY%.tar.gz}"
    yield 'mkdir -p "$environment" && tar -xzf "$FANFOLD_COPY" -C "$environment" || exit 1'
    yield 'fanfold=("$environment/bin/fanfold")'


def _ending(plan: JobPlan) -> Iterator[str]:
    if plan.archive is None:
        yield 'wait "$serve"'
        return
    yield 'wait "$serve"; code=$?'
    yield 'rm -rf "$environment" "$FANFOLD_COPY"'
    yield 'exit "$code"'


def _every(plan: JobPlan) -> int:
    """Return the seconds between two signs of life, and between two looks for them."""
    return max(1, plan.site.silence_s // 10)


def _watching(plan: JobPlan) -> Iterator[str]:
    yield "# Slurm keeps a job whose first node is lost until its walltime: this node ends it."
    yield "("
    yield "  silent=0"
    yield '  while [ "$silent" -lt 2 ]; do'
    yield f"    sleep {_every(plan)}"
    yield '    age=$(($(date +%s) - $(stat -c %Y "$run/cluster/alive")))'
    yield f'    [ "$age" -gt {plan.site.silence_s} ] && silent=$((silent + 1)) || silent=0'
    yield "  done"
    yield f"  sleep $((RANDOM % {_every(plan)}))   # not all nodes at once"
    yield '  echo "the first node of job $SLURM_JOB_ID is silent: the job is ended"'
    yield '  scancel "$SLURM_JOB_ID"'
    yield ") &"
    yield "watch=$!"


def _assigned(name: str, value: str) -> str:
    return f"{name}={shlex.quote(value)}"


def _text(*lines: str) -> str:
    return "\n".join(lines) + "\n"
