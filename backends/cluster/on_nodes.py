"""Scripts for the nodes of a job: what serves the model there, and what becomes a worker."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from typing import Final

from ...configs.site import fill
from .plan import JobPlan

ARCHIVE: Final = "archive.tar.gz"
"""Name of the archive in the folder that a job makes on each node."""
ENVIRONMENT: Final = "environment"
"""Name of the folder beside it into which it is unpacked."""

_CHECK: Final = """\
# Nothing is run from a folder that others can write, or in whose place they can put their own.
private() {
  [ ! -L "$1" ] && [ -O "$1" ] && [[ $(stat -c %A "$1") == drwx--[-S]---* ]] &&
    [[ $(stat -c %u%A "$1/..") == @(0|$(id -u))d@(????-??-?|????????[tT])* ]]
}
private "$copied" || {
  echo "$(hostname): $copied: others can write or replace this folder; nothing is run from it"
  echo "name another folder of the node by 'local' in a site file"
  exit 1
} >&2
"""


def node_script(plan: JobPlan) -> str:
    """Return the script that the launcher starts on each node."""
    host = f' --host "{plan.site.host}"' if plan.site.host else ""
    return text(
        "#!/bin/bash",
        f"# On each node of a job of the run {plan.name!r}: serve the model until SIGUSR2.",
        "trap '' USR1   # the scheduler's warning is for the coordinator, not for servers",
        "serve= asked=",
        'trap \'asked=1; [ -z "$serve" ] || kill -TERM "$serve" 2>/dev/null\' USR2 TERM',
        assigned("run", str(plan.run)),
        *_unpacking(plan),
        f'"${{fanfold[@]}}" serve "$run" --servers "$run/cluster/servers"{host} &',
        'serve=$!; [ -z "$asked" ] || kill -TERM "$serve"',
        *(_watching(plan) if plan.site.scheduler == "slurm" else ()),
        'while kill -0 "$serve" 2>/dev/null; do wait "$serve"; done',
        *(('kill "$watch" 2>/dev/null',) if plan.site.scheduler == "slurm" else ()),
        *_ending(plan),
    )


def _unpacking(plan: JobPlan) -> Iterator[str]:
    if plan.archive is None:
        yield f"fanfold=({shlex.join(plan.command)})"
        return
    yield from _unpacked()
    yield f'fanfold=("$copied/{ENVIRONMENT}/bin/fanfold")'


def _unpacked() -> Iterator[str]:
    """Unpack the node's copy unless a server or a worker beside this one has done so."""
    yield "copied=${FANFOLD_COPY%/*}"
    yield _CHECK.rstrip()
    yield "("
    yield "  flock 9"
    yield f'  [ -e "$copied/whole" ] || {{ mkdir -p "$copied/{ENVIRONMENT}" &&'
    yield f'    tar -xzf "$FANFOLD_COPY" --no-same-owner -C "$copied/{ENVIRONMENT}" &&'
    yield '    touch "$copied/whole"; }'
    yield ') 9> "$copied/lock" || exit 1'


def _ending(plan: JobPlan) -> Iterator[str]:
    if plan.archive is not None and not plan.works:  # workers go on from the copy
        yield 'rm -rf "$copied"'
    yield "exit 0   # some launchers end all nodes when one fails; the others go on serving"


def every_s(plan: JobPlan) -> int:
    """Return the seconds between two signs of life, and between two looks for them."""
    return max(1, plan.site.silence_s // 10)


def _watching(plan: JobPlan) -> Iterator[str]:
    yield "# Slurm keeps a job whose first node is lost until its walltime: this node ends it."
    yield "("
    yield "  silent=0"
    yield '  while [ "$silent" -lt 2 ]; do'
    yield f"    sleep {every_s(plan)}"
    yield '    seen=$(stat -c %Y "$run/cluster/alive") || continue   # it does not answer now'
    yield "    age=$(($(date +%s) - seen))"
    yield f'    [ "$age" -gt {plan.site.silence_s} ] && silent=$((silent + 1)) || silent=0'
    yield "  done"
    yield f"  sleep $((RANDOM % {every_s(plan)}))   # not all nodes at once"
    yield '  echo "the first node of job $SLURM_JOB_ID is silent: the job is ended"'
    yield '  scancel "$SLURM_JOB_ID"'
    yield ") &"
    yield "watch=$!"


def launch_script(plan: JobPlan) -> str:
    """Return the script by which the coordinator starts a program on each node."""
    return text(
        "#!/bin/bash",
        f"# Starts a program on each node of a job of the run {plan.name!r}: FANFOLD_LAUNCHER.",
        f'exec {launcher(plan)} bash {plan.folder}/worker.sh "$@"',
    )


def launcher(plan: JobPlan) -> str:
    """Return what starts one process on each node."""
    return fill(plan.site.launcher, filled(plan, "$FANFOLD_COPY"))


def filled(plan: JobPlan, copy: str) -> dict[str, object]:
    """Return what a site's lines may name, with the path of the environment's copy."""
    archive = shlex.quote(str(plan.archive)) if plan.archive is not None else ""
    return {"nodes": plan.nodes, "archive": archive, "copy": copy, "local": plan.site.local}


def worker_script(plan: JobPlan) -> str:
    """Return the script that becomes the program on each node."""
    # the name by which 'fanfold serve' knows the node, or its servers would be started twice
    host = (f'export FANFOLD_HOST="{plan.site.host}"',) if plan.site.host else ()
    return text(
        "#!/bin/bash",
        f"# On each node of a job of the run {plan.name!r}: becomes one of its workers.",
        "trap '' USR1 USR2   # these are for the coordinator and the servers",
        *host,
        *(_unpacked() if plan.archive is not None else ()),
        'exec "$@"',
    )


def assigned(name: str, value: str) -> str:
    """Return a shell assignment."""
    return f"{name}={shlex.quote(value)}"


def text(*lines: str) -> str:
    """Return lines as a file's text."""
    return "\n".join(lines) + "\n"
