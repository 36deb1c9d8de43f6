"""Parts of job scripts, run by bash with stand-ins for slow commands."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fanfold.backends.cluster.scripts import job_script, node_script

from .test_job_script import plan

FEW_LOOKS = 'sleep() { looks=$((looks + 1)); [ "$looks" -lt 20 ] || exit 9; }; looks=0'
"""Makes a loop that would go on for ever end with 9."""


def part(script: str, first: str, last: str) -> list[str]:
    """Return the lines from the one that begins with ``first`` to the one with ``last``."""
    lines = script.splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith(first))
    end = next(n for n, line in enumerate(lines[begin:], begin) if last in line)
    return lines[begin : end + 1]


def run(*lines: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", "-c", "\n".join(lines)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)


def test_a_launcher_that_hangs_after_the_run_is_ended(tmp_path: Path) -> None:
    """It heeds neither SIGUSR2 nor SIGTERM; each wait for it is counted, so it ends."""
    script = job_script(replace(plan("polaris"), archive=None))
    stopping = part(script, 'kill -USR2 "$servers"', "kill -KILL")
    ready = tmp_path / "ready"
    done = run(
        f"(trap '' USR2 TERM; touch {ready}; exec sleep 3600) & servers=$!",
        f"while [ ! -e {ready} ]; do sleep 0.01; done",
        "sleep() { waits=$((waits + 1)); }; waits=0",
        *stopping,
        'wait "$servers"; echo "$? $waits"',
    )
    assert done.stdout == "137 40\n"


def test_a_launcher_that_hangs_while_it_tidies_is_killed() -> None:
    script = job_script(replace(plan("polaris"), starts_workers=True))
    assert "timeout --kill-after=10 30 mpiexec" in script


@pytest.mark.parametrize(
    ("sign", "ended"), [("", True), ("touch {}", False), ("rm {}", False)], ids=["old", "new", "no"]
)
def test_only_an_old_sign_of_life_ends_a_job(tmp_path: Path, sign: str, ended: bool) -> None:
    """A file system that does not answer says nothing of the first node."""
    alive = tmp_path / "cluster" / "alive"
    alive.parent.mkdir()
    done = run(
        f"run={tmp_path} SLURM_JOB_ID=7",
        f"touch -d '1 hour ago' {alive}",
        sign.format(alive),
        FEW_LOOKS,
        'scancel() { echo "scancel $1"; }',
        *part(node_script(replace(plan(), archive=None)), "(", "watch=$!"),
        'wait "$watch"; echo "$?"',
    )
    if ended:
        assert done.stdout.splitlines()[-2:] == ["scancel 7", "0"]
    else:
        assert done.stdout == "9\n"


def test_a_sign_of_life_that_cannot_be_written_is_tried_again(tmp_path: Path) -> None:
    (signs,) = part(job_script(plan()), "(while :; do touch", "alive=$!")
    done = run(f"cluster={tmp_path}/nowhere", FEW_LOOKS, signs, 'wait "$alive"; echo "$?"')
    assert done.stdout == "9\n"
    assert done.stderr.count("No such file") == 20
