"""Write job, node, launcher and worker scripts from a site and a plan."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final

from ...configs.site import fill
from .chain import EXIT_NOTHING_TO_DO
from .job_plan import JobPlan
from .schedulers import SCHEDULERS, Scheduler

ARCHIVE_NAME: Final = "archive.tar.gz"
"""Name of the archive in the folder that a job creates on each node."""
ENVIRONMENT_FOLDER: Final = "environment"
"""Name of the folder beside it into which it is unpacked."""

_CHECK: Final = """\
# Never run programs from a folder that other users can write or replace.
private() {
  [ ! -L "$1" ] && [ -O "$1" ] && [[ $(stat -c %A "$1") == drwx--[-S]---* ]] &&
    [[ $(stat -c %u%A "$1/..") == @(0|$(id -u))d@(????-??-?|????????[tT])* ]]
}
private "$copied" || {
  echo "$(hostname): $copied: others can write or replace this folder; no program is run from it"
  echo "set 'local' in a site file to another folder of the node"
  exit 1
} >&2
"""


def node_script(plan: JobPlan) -> str:
    """Return the script that the launcher starts on each node."""
    host = f' --host "{plan.site.host}"' if plan.site.host else ""
    scheduler = SCHEDULERS[plan.site.scheduler]
    return join_lines(
        "#!/bin/bash",
        f"# On each node of a job of the run {plan.name!r}: serve the model until SIGUSR2.",
        "trap '' USR1   # the scheduler's warning is for the coordinator, not for servers",
        "serve= asked=",
        'trap \'asked=1; [ -z "$serve" ] || kill -TERM "$serve" 2>/dev/null\' USR2 TERM',
        shell_assignment("run", str(plan.run)),
        *_fanfold_lines(plan),
        f'"${{fanfold[@]}}" serve "$run" --servers "$run/cluster/servers"{host} &',
        'serve=$!; [ -z "$asked" ] || kill -TERM "$serve"',
        *(_watch_lines(plan, scheduler) if scheduler.keeps_broken_jobs else ()),
        'while kill -0 "$serve" 2>/dev/null; do wait "$serve"; done',
        *(('kill "$watch" 2>/dev/null',) if scheduler.keeps_broken_jobs else ()),
        *_node_end_lines(plan),
    )


def _fanfold_lines(plan: JobPlan) -> Iterator[str]:
    if plan.archive is None:
        yield f"fanfold=({shlex.join(plan.command)})"
        return
    yield from _unpack_lines()
    yield f'fanfold=("$copied/{ENVIRONMENT_FOLDER}/bin/fanfold")'


def _unpack_lines() -> Iterator[str]:
    """Unpack the node's copy unless a server or a worker on the node has done so."""
    yield "copied=${FANFOLD_COPY%/*}"
    yield _CHECK.rstrip()
    yield "("
    yield "  flock 9"
    yield f'  [ -e "$copied/whole" ] || {{ mkdir -p "$copied/{ENVIRONMENT_FOLDER}" &&'
    yield f'    tar -xzf "$FANFOLD_COPY" --no-same-owner -C "$copied/{ENVIRONMENT_FOLDER}" &&'
    yield '    touch "$copied/whole"; }'
    yield ') 9> "$copied/lock" || exit 1'


def _node_end_lines(plan: JobPlan) -> Iterator[str]:
    if plan.archive is not None and not plan.starts_workers:  # workers go on from the copy
        yield 'rm -rf "$copied"'
    yield "exit 0   # some launchers end all nodes when one fails"


def heartbeat_s(plan: JobPlan) -> int:
    """Return the seconds between two heartbeats of the first node, and between two checks."""
    return max(1, plan.site.silence_s // 10)


def _watch_lines(plan: JobPlan, scheduler: Scheduler) -> Iterator[str]:
    yield "# The job would go on without its first node until its walltime: this node ends it."
    yield "("
    yield "  silent=0"
    yield '  while [ "$silent" -lt 2 ]; do'
    yield f"    sleep {heartbeat_s(plan)}"
    yield '    seen=$(stat -c %Y "$run/cluster/alive") || continue   # no answer now'
    yield "    age=$(($(date +%s) - seen))"
    yield f'    [ "$age" -gt {plan.site.silence_s} ] && silent=$((silent + 1)) || silent=0'
    yield "  done"
    yield f"  sleep $((RANDOM % {heartbeat_s(plan)}))   # not all nodes at once"
    job = scheduler.job_variable
    yield f'  echo "the first node of job ${job} is silent: the job is ended"'
    yield f'  {scheduler.cancel_command} "${job}"'
    yield ") &"
    yield "watch=$!"


def launch_script(plan: JobPlan) -> str:
    """Return the script with which the coordinator starts a program on each node."""
    return join_lines(
        "#!/bin/bash",
        f"# Starts a program on each node of a job of the run {plan.name!r}: FANFOLD_LAUNCHER.",
        f'exec {node_launcher(plan)} bash {plan.folder}/worker.sh "$@"',
    )


def node_launcher(plan: JobPlan) -> str:
    """Return the command that starts one process on each node."""
    return fill(plan.site.launcher, template_values(plan, "$FANFOLD_COPY"))


def template_values(plan: JobPlan, copy: str) -> dict[str, object]:
    """Return the values for names in a site's commands; ``copy`` is the node's archive."""
    archive = shlex.quote(str(plan.archive)) if plan.archive is not None else ""
    return {"nodes": plan.nodes, "archive": archive, "copy": copy, "local": plan.site.local}


def worker_script(plan: JobPlan) -> str:
    """Return the script that becomes a worker on each node."""
    # the node's name in 'fanfold serve'; with another name its servers would be started twice
    host = (f'export FANFOLD_HOST="{plan.site.host}"',) if plan.site.host else ()
    return join_lines(
        "#!/bin/bash",
        f"# On each node of a job of the run {plan.name!r}: becomes one of its workers.",
        "trap '' USR1 USR2   # these are for the coordinator and the servers",
        *host,
        *(_unpack_lines() if plan.archive is not None else ()),
        'exec "$@"',
    )


def shell_assignment(name: str, value: str) -> str:
    """Return a shell assignment."""
    return f"{name}={shlex.quote(value)}"


def join_lines(*lines: str) -> str:
    """Return lines as a file's text."""
    return "\n".join(lines) + "\n"


_STOP_S: Final = 30
"""Seconds that servers have to stop; fanfold serve gives each of them 20 s."""
_END_S: Final = 10
"""Seconds that their launcher has after that."""


def job_script(plan: JobPlan) -> str:
    """Return the script that the scheduler runs on the first node."""
    return join_lines(
        "#!/bin/bash",
        *SCHEDULERS[plan.site.scheduler].directives(plan),
        "",
        f"# One job of the run {plan.name!r}, for the site {plan.site.name} ({plan.site.tested}).",
        "# 'fanfold submit' wrote this file and overwrites it; change the site file instead.",
        *_variables(plan),
        'exec > "$cluster/job-$job.log" 2>&1',
        *_environment(plan),
        *(_worker_lines(plan) if plan.starts_workers else ()),
        "",
        "# Signals from the scheduler near the end, or from 'fanfold cancel', are for the run.",
        "work= asked=",
        'asked() { [ -n "$asked" ] || { asked=1; [ -z "$work" ] || kill -USR1 "$work"; }; }',
        "trap asked TERM USR1",
        "",
        "# If items are left, the successor is submitted now and waits for this job to end:",
        "# it starts even if this node is lost.",
        '"${fanfold[@]}" chain begin "$run" --job "$job"; begun=$?',
        f'[ "$begun" -ne {EXIT_NOTHING_TO_DO} ] || exit 0   # no items are left',
        '[ "$begun" -eq 0 ] || exit "$begun"   # see above; fanfold submit "$run" continues',
        *(_copy_lines(plan) if plan.archive is not None and plan.runs_on_nodes else ()),
        *(_servers(plan) if plan.starts_servers else ()),
        *_coordinator(plan),
        *(_stop_lines(plan) if plan.starts_servers else ()),
        *(_remove_copy_lines(plan) if plan.archive is not None and plan.starts_workers else ()),
        "",
        "# Record how the job ended; cancel the successor if no items are left.",
        '"${fanfold[@]}" chain end "$run" --job "$job" --code "$code"'
        + (" $unserved" if plan.starts_servers else ""),
    )


def _variables(plan: JobPlan) -> Iterator[str]:
    yield shell_assignment("run", str(plan.run))
    yield "cluster=$run/cluster"
    yield 'if [ ! -d "$cluster" ]; then   # moved or removed while the job waited'
    yield '  echo "$run: no such run folder; if it was moved, submit it from its new path:" >&2'
    yield '  echo "fanfold submit DIR …" >&2; exit 2'
    yield "fi"
    yield f"fanfold=({shlex.join(plan.command)})"
    scheduler, end = SCHEDULERS[plan.site.scheduler], f"$(($(date +%s) + {plan.walltime_s}))"
    yield f"job=${scheduler.job_variable}"
    known = scheduler.end_variable
    yield f"end={end}" if known is None else f"end=${{{known}:-{end}}}"
    yield f"export FANFOLD_END_TIME=$((end - {plan.reserve_s}))   # the coordinator drains before"


def _environment(plan: JobPlan) -> Iterator[str]:
    site = plan.site
    if site.modules:
        yield f"module load {shlex.join(site.modules)}"
    yield from site.setup
    for name, value in (site.environment | site.proxies).items():
        yield f"export {shell_assignment(name, value)}"


def _worker_lines(plan: JobPlan) -> Iterator[str]:
    yield ""
    yield "# Workers: the command that starts them on each node, and the coordinator's address."
    yield 'export FANFOLD_LAUNCHER="bash $cluster/launch.sh"'
    yield f"export FANFOLD_COORDINATOR_HOST={_host_expression(plan)}"


def _host_expression(plan: JobPlan) -> str:
    """Return a shell expression for the name or address of the node on which it runs."""
    if plan.site.host is not None:
        return f'"{plan.site.host}"'
    if plan.site.interface is not None:
        found = f"ip -4 -o addr show {shlex.quote(plan.site.interface)}"
        return f"$({found} | awk '{{split($4, a, \"/\"); print a[1]; exit}}')"
    return "$(hostname)"


def _copy_lines(plan: JobPlan) -> Iterator[str]:
    yield ""
    yield "# The environment, copied once to each node's storage, to a new folder that only"
    yield "# this user can enter, with an unpredictable name. mkdir fails if it exists."
    yield "random=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \\n')"
    yield f"export FANFOLD_COPY={plan.site.local}/fanfold-$job-$random/{ARCHIVE_NAME}"
    yield f'{{ {node_launcher(plan)} mkdir -m 700 "${{FANFOLD_COPY%/*}}" &&'
    yield f"  {fill(plan.site.broadcast or '', template_values(plan, '$FANFOLD_COPY'))}; }} ||"
    yield '  { "${fanfold[@]}" chain end "$run" --job "$job" --code 1; exit 1; }'
    if plan.starts_workers:
        python = f"${{FANFOLD_COPY%/*}}/{ENVIRONMENT_FOLDER}/bin/python"
        yield f"export FANFOLD_PYTHON={python}   # Python of the workers"


def _servers(plan: JobPlan) -> Iterator[str]:
    yield ""
    if plan.site.scheduler == "slurm":
        yield "# A heartbeat for the other nodes: Slurm keeps a job whose first node is lost."
        yield f'(while :; do touch "$cluster/alive"; sleep {heartbeat_s(plan)}; done) & alive=$!'
        yield ""
    yield "# The model servers: one process on each node starts and monitors that node's servers."
    yield f"(trap '' USR1; exec {node_launcher(plan)} \\"
    yield '  bash "$cluster/node.sh") > "$cluster/serve-$job.log" 2>&1 &'
    yield "servers=$!"
    yield f"export FANFOLD_NODES={plan.nodes}   # the run ends if the servers of all are given up"


def _coordinator(plan: JobPlan) -> Iterator[str]:
    how = (
        "workers on the nodes call the servers"
        if plan.starts_workers
        else "all nodes are called from here"
    )
    yield ""
    yield f"# The run: {how} until no items are left, or the time is nearly up."
    yield '"${fanfold[@]}" resume "$run" &'
    yield 'work=$!; [ -z "$asked" ] || kill -USR1 "$work"'
    if plan.starts_servers:
        yield "# When no node serves any more, no server can become ready: the run ends as well."
        yield "(trap '' USR1"
        yield ' while kill -0 "$servers" 2>/dev/null; do sleep 1; done'
        yield ' kill -USR1 "$work" 2>/dev/null) & gone=$!'
    yield 'while kill -0 "$work" 2>/dev/null; do wait "$work"; done'
    yield 'wait "$work"; code=$?'
    yield "trap '' TERM USR1"


def _stop_lines(plan: JobPlan) -> Iterator[str]:
    yield 'kill "$gone" 2>/dev/null; unserved='
    yield '[ -n "$asked" ] || kill -0 "$servers" 2>/dev/null || unserved=--unserved'
    yield ""
    yield "# Launchers forward SIGUSR2 to the nodes, but may turn SIGTERM into SIGKILL."
    yield 'kill -USR2 "$servers" 2>/dev/null'
    yield f'for _ in $(seq {_STOP_S}); do kill -0 "$servers" 2>/dev/null || break; sleep 1; done'
    yield 'kill -TERM "$servers" 2>/dev/null'
    yield f'for _ in $(seq {_END_S}); do kill -0 "$servers" 2>/dev/null || break; sleep 1; done'
    yield 'kill -KILL "$servers" 2>/dev/null   # a launcher may hang after a lost node'
    if plan.site.scheduler == "slurm":
        yield 'kill "$alive"'


def _remove_copy_lines(plan: JobPlan) -> Iterator[str]:
    yield ""
    yield "# Remove the nodes' copies."
    yield f"timeout --kill-after={_END_S} {_STOP_S} {node_launcher(plan)} \\"
    yield '  rm -rf "${FANFOLD_COPY%/*}"'
