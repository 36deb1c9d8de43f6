"""A stand-in for PBS: qsub, qstat, qsig and qdel over scripts that run in the background.

It knows what fanfold uses: ``-W depend=afterany``, ``-l walltime``, the states Q, H, R and F, and
the JSON of ``qstat -x -f -F json``. It has no queues or nodes: a job starts when the one that it
waits for has ended. With a file ``single`` it takes no second job beside another.
With a file ``mute`` qstat has no answer; with a file ``kept`` in a job's folder qdel refuses it.
Jobs lie in ``$STANDIN_PBS``, one folder each; one whose folder is removed is forgotten.

Usage: ``python standin_pbs.py qsub|qstat|qsig|qdel …``
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(os.environ.get("STANDIN_PBS", "."))
LOOK_S = 0.05
KILL_S = 3.0
END = ".standin"


def put(job: Path, name: str, value: object) -> None:
    partial = job / f".{name}.{os.getpid()}"
    partial.write_text(str(value))
    partial.replace(job / name)


def get(job: Path, name: str) -> str:
    file = job / name
    return file.read_text() if file.exists() else ""


def folder(name: str) -> Path:
    found = HOME / name.partition(".")[0]
    if not found.is_dir():
        sys.exit(f"qstat: Unknown Job Id {name}")
    return found


def wanted(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    assert found is not None, f"no {pattern} in the script"
    return found[1]


def qsub(arguments: list[str]) -> None:
    *options, script = arguments
    there = [p for p in HOME.iterdir() if p.name.isdigit()]
    if (HOME / "single").exists() and any(get(job, "state") != "F" for job in there):
        sys.exit("qsub: would exceed queue's per-user limit of jobs in 'Q' state")
    text = Path(script).read_text()
    number = 1 + max((int(p.name) for p in there), default=0)
    job = HOME / str(number)
    job.mkdir()
    after = re.search(r"depend=afterany:(\S+)", " ".join(options))
    put(job, "after", after[1] if after else "")
    put(job, "script", text)
    put(job, "state", "H" if after else "Q")
    command = [sys.executable, __file__, "run", str(number)]
    subprocess.Popen(
        command,
        start_new_session=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    print(f"{number}{END}")


def run(number: str) -> None:
    """Wait for the job before, run the script, end it at its walltime."""
    for ignored in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(ignored, signal.SIG_DFL)  # a scheduler's daemon does not inherit a job's
    job = HOME / number
    after = get(job, "after")
    while after and get(folder(after), "state") != "F":
        if get(job, "state") == "F":
            return
        time.sleep(LOOK_S)
    text = get(job, "script")
    hours, minutes, rest = map(int, wanted(r"walltime=(\d+:\d+:\d+)", text).split(":"))
    nodes = wanted(r"select=(\d+)", text)
    nodefile = job / "nodefile"
    nodefile.write_text("".join(f"n{n}\n" for n in range(int(nodes))))
    names = {"PBS_JOBID": f"{number}{END}", "PBS_NODEFILE": str(nodefile)}
    with (job / "output").open("wb") as output:
        work = subprocess.Popen(
            ["bash", str(job / "script")],
            env=os.environ | names,
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        put(job, "session", work.pid)
        begin = time.monotonic()
        put(job, "state", "R")
        try:
            work.wait(3600 * hours + 60 * minutes + rest)
        except subprocess.TimeoutExpired:
            end(work.pid)
            work.wait()
    put(job, "nodes", nodes)
    put(job, "wall", int(time.monotonic() - begin) + 1)
    put(job, "code", work.returncode)
    put(job, "state", "F")


def end(session: int) -> None:
    """End all processes of a job: politely, then not."""
    for number, wait_s in ((signal.SIGTERM, KILL_S), (signal.SIGKILL, 0)):
        if not tell(session, number):
            return
        until = time.monotonic() + wait_s
        while time.monotonic() < until and members(session):
            time.sleep(LOOK_S)


def members(session: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def tell(session: int, number: signal.Signals) -> bool:
    told = False
    for pid in members(session):
        try:
            os.kill(pid, number)
        except ProcessLookupError:
            continue
        told = True
    return told


def qsig(arguments: list[str]) -> None:
    name = arguments[arguments.index("-s") + 1]
    job = folder(arguments[-1])
    if get(job, "state") != "R":
        sys.exit(f"qsig: Request invalid for state of job {arguments[-1]}")
    tell(int(get(job, "session")), signal.Signals[name])


def qdel(arguments: list[str]) -> None:
    wrong = 0
    for name in arguments:
        if not there(name):
            wrong = complain(f"qdel: Unknown Job Id {name}")
            continue
        job = folder(name)
        state = get(job, "state")
        if (job / "kept").exists():
            wrong = complain(f"qdel: Server could not connect to MOM {name}")
        elif state in ("Q", "H"):
            put(job, "state", "F")
        elif state == "R":
            end(int(get(job, "session")))
        else:
            wrong = complain(f"qdel: Job has finished {name}")
    sys.exit(wrong)


def qstat(arguments: list[str]) -> None:
    if (HOME / "mute").exists():
        sys.exit("qstat: cannot connect to server")
    jobs, wrong = {}, 0
    for name in (a for a in arguments if a[0].isdigit()):
        if not there(name):
            wrong = complain(f"qstat: Unknown Job Id {name}")
            continue
        job = folder(name)
        about: dict[str, object] = {"job_state": get(job, "state")}
        if get(job, "wall"):
            wall = int(get(job, "wall"))
            clock = f"{wall // 3600:02}:{wall % 3600 // 60:02}:{wall % 60:02}"
            about["resources_used"] = {"walltime": clock}
            about["Resource_List"] = {"nodect": int(get(job, "nodes"))}
            about["Exit_status"] = int(get(job, "code"))
        jobs[f"{job.name}{END}"] = about
    if jobs:
        print(json.dumps({"Jobs": jobs}))
    sys.exit(wrong)


def there(name: str) -> bool:
    return (HOME / name.partition(".")[0]).is_dir()


def complain(text: str) -> int:
    """Say that a job is not there, and go on with the others; returns the exit code."""
    print(text, file=sys.stderr)
    return 153


if __name__ == "__main__":
    verb, *rest = sys.argv[1:]
    if verb == "run":
        run(rest[0])
    else:
        {"qsub": qsub, "qstat": qstat, "qsig": qsig, "qdel": qdel}[verb](rest)
