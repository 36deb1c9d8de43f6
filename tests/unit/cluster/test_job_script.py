from __future__ import annotations

import os
import re
import stat
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fanfold.backends.cluster.job_plan import JobPlan, format_hms
from fanfold.backends.cluster.scripts import (
    job_script,
    launch_script,
    node_script,
    worker_script,
)
from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.site import load_site, site_names
from fanfold.graphs.jobs.submit import parse_walltime


def plan(site: str = "perlmutter") -> JobPlan:
    return JobPlan(
        run=Path("/scratch/me/run"),
        name="solubility",
        command=("/env with blank/bin/python", "-m", "fanfold"),
        site=load_site(site),
        nodes=4,
        walltime_s=7200,
        drain_s=30,
        starts_servers=True,
        queue="regular",
        account="m1234",
        archive=Path("/scratch/me/env.tar.gz"),
    )


@pytest.mark.parametrize("site", site_names())
@pytest.mark.parametrize("works", [False, True], ids=["alone", "workers"])
def test_the_scripts_of_all_sites_are_shell(site: str, works: bool) -> None:
    asked = replace(plan(site), starts_workers=works)
    for write in (job_script, node_script, launch_script, worker_script):
        text = write(asked)
        checked = subprocess.run(
            ["bash", "-n"], input=text, text=True, capture_output=True, check=False
        )
        assert checked.returncode == 0, checked.stderr
        assert checked.stderr == ""
    prefix = "#SBATCH" if load_site(site).scheduler == "slurm" else "#PBS"
    lines = [line for line in job_script(plan(site)).splitlines() if line.startswith(prefix)]
    assert len(lines) >= 8
    assert "'/env with blank/bin/python' -m fanfold" in job_script(plan(site))


def test_slurm_lines() -> None:
    text = job_script(plan())
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --time=02:00:00",
        "#SBATCH --qos=regular",
        "#SBATCH --account=m1234",
        "#SBATCH --signal=B:USR1@90",
        "#SBATCH --no-requeue",
        "#SBATCH --constraint=gpu",
    ):
        assert line in text.splitlines()


def test_pbs_lines() -> None:
    lines = job_script(plan("polaris")).splitlines()
    for line in (
        "#PBS -l select=4:system=polaris",
        "#PBS -l walltime=02:00:00",
        "#PBS -l filesystems=home:eagle",
        "#PBS -q regular",
        "#PBS -A m1234",
        "#PBS -r n",
    ):
        assert line in lines


def test_without_servers_the_run_alone() -> None:
    text = job_script(replace(plan(), starts_servers=False, archive=None))
    assert "srun" not in text
    assert "node.sh" not in text
    assert 'resume "$run"' in text


def test_workers_are_told_where_to_come_to() -> None:
    asked = replace(plan("polaris"), starts_workers=True, archive=None)
    assert 'FANFOLD_LAUNCHER="bash $cluster/launch.sh"' in job_script(asked)
    assert 'FANFOLD_COORDINATOR_HOST="$(hostname -s).hsn.cm.polaris.alcf.anl.gov"' in job_script(
        asked
    )
    launch = "exec mpiexec -n 4 --ppn 1 --cpu-bind none bash /scratch/me/run/cluster/worker.sh"
    assert launch in launch_script(asked)
    assert 'FANFOLD_HOST="$(hostname -s).hsn.cm.polaris.alcf.anl.gov"' in worker_script(asked)
    alone = job_script(replace(asked, starts_workers=False))
    assert set(re.findall(r"FANFOLD_\w+", alone)) == {"FANFOLD_END_TIME", "FANFOLD_NODES"}


def test_the_address_of_an_interface(tmp_path: Path) -> None:
    """Where a site names no host but an interface; the shell's part is run."""
    script = job_script(replace(plan(), starts_workers=True))
    (line,) = [
        one for one in script.splitlines() if one.startswith("export FANFOLD_COORDINATOR_HOST=")
    ]
    ip = tmp_path / "ip"
    ip.write_text('#!/bin/sh\necho "7: $5  inet 10.1.2.3/16 brd 10.1.255.255 scope global $5"\n')
    ip.chmod(0o755)
    done = subprocess.run(
        ["bash", "-c", f"PATH={tmp_path}:$PATH\n{line}\necho $FANFOLD_COORDINATOR_HOST"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == "10.1.2.3\n"


def test_workers_take_the_nodes_own_copy() -> None:
    """It is unpacked once, whether a server or a worker comes first, and removed at the end."""
    asked = replace(plan(), starts_workers=True)
    assert "FANFOLD_PYTHON=${FANFOLD_COPY%/*}/environment/bin/python" in job_script(asked)
    assert "rm -rf" in job_script(asked)
    assert "rm -rf" not in node_script(asked)
    assert "rm -rf" in node_script(plan())
    for script in (node_script(asked), worker_script(asked)):
        assert "flock" in script
    without_servers = replace(asked, starts_servers=False)
    assert job_script(without_servers).count("sbcast") == 1
    assert "rm -rf" in job_script(without_servers)
    assert "#SBATCH --no-kill" in job_script(asked)
    assert "#SBATCH --no-kill" not in job_script(without_servers)


def test_a_node_that_cannot_serve_does_not_fail_the_others() -> None:
    """Open MPI's launcher, for one, ends all processes when one of them fails."""
    script = node_script(replace(plan("polaris"), command=("false",), archive=None))
    assert subprocess.run(["bash", "-c", script], check=False).returncode == 0


def packed(folder: Path) -> Path:
    """Return an archive as a job copies it to a node: in a new folder of this user's alone."""
    made = folder / "copied"
    made.mkdir(mode=0o700)
    (folder / "file").write_text("x")
    archive = made / "archive.tar.gz"
    subprocess.run(["tar", "-czf", archive, "-C", folder, "file"], check=True)
    return archive


def on_node(archive: Path, shown: str) -> subprocess.CompletedProcess[str]:
    """Become a worker on a node, which shows something of the environment."""
    script = worker_script(replace(plan(), starts_workers=True)) + "\n"
    command = ["bash", "-c", script, "worker.sh", "bash", "-c", shown]
    names = {"PATH": "/usr/bin:/bin", "FANFOLD_COPY": str(archive)}
    return subprocess.run(command, env=names, capture_output=True, text=True, check=False)


def test_unpacking_happens_once(tmp_path: Path) -> None:
    archive = packed(tmp_path)
    shown = 'echo "$FANFOLD_COPY"; cat "${FANFOLD_COPY%/*}/environment/file"; rm "$FANFOLD_COPY"'
    for code in (0, 1):  # the archive is gone the second time, and not needed until rm
        done = on_node(archive, shown)
        assert done.stdout == f"{archive}\nx"
        assert done.returncode == code


@pytest.mark.parametrize("mode", [0o755, 0o770, 0o702, 0o1777])
def test_nothing_is_run_from_a_folder_that_others_can_enter(tmp_path: Path, mode: int) -> None:
    archive = packed(tmp_path)
    archive.parent.chmod(mode)
    done = on_node(archive, "echo it runs")
    assert (done.returncode, done.stdout) == (1, "")
    assert "others can write or replace this folder" in done.stderr
    assert not (archive.parent / "environment").exists()


def test_nothing_is_run_from_a_folder_that_others_can_replace(tmp_path: Path) -> None:
    archive = packed(tmp_path)
    for mode, code in ((0o777, 1), (0o775, 1), (0o1777, 0), (0o755, 0), (0o2700, 0)):
        tmp_path.chmod(mode)
        assert on_node(archive, "echo it runs").returncode == code, oct(mode)


def test_nothing_is_run_from_a_link(tmp_path: Path) -> None:
    archive = packed(tmp_path)
    (tmp_path / "link").symlink_to(archive.parent)
    assert on_node(tmp_path / "link" / archive.name, "echo it runs").returncode == 1


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder to another user")
def test_nothing_is_run_from_a_folder_of_somebody_else(tmp_path: Path) -> None:
    archive = packed(tmp_path)
    os.chown(archive.parent, 12345, -1)
    assert on_node(archive, "echo it runs").returncode == 1
    os.chown(archive.parent, 0, -1)
    os.chown(tmp_path, 12345, -1)
    assert on_node(archive, "echo it runs").returncode == 1


@pytest.mark.parametrize("there", ["nothing", "a folder", "a link"])
def test_a_job_copies_into_a_new_folder_only(tmp_path: Path, there: str) -> None:
    """The launcher and the copying of a site, with the lines of a job between them."""
    source, local = tmp_path / "env.tar.gz", tmp_path / "local"
    source.write_text("archive")
    local.mkdir()
    if there != "nothing":  # od stands for /dev/urandom: nobody can foresee its name else
        od = tmp_path / "od"
        od.write_text("#!/bin/sh\necho 77\n")
        od.chmod(0o755)
        (tmp_path / "theirs").mkdir()
        made = local / "fanfold-9-77"
        made.mkdir() if there == "a folder" else made.symlink_to(tmp_path / "theirs")
    changes = {"launcher": "env", "broadcast": "cp {archive} {copy}", "local": str(local)}
    site = plan().site.model_copy(update=changes)
    lines = job_script(replace(plan(), starts_workers=True, site=site, archive=source)).splitlines()
    begin = next(n for n, line in enumerate(lines) if line.startswith("random="))
    end = next(n for n, line in enumerate(lines) if "chain end" in line)
    text = "\n".join(
        [f"PATH={tmp_path}:$PATH", "job=9 run=r fanfold=(echo)", *lines[begin : end + 1]]
    )
    done = subprocess.run(["bash", "-c", text], capture_output=True, text=True, check=False)
    if there != "nothing":
        assert done.returncode == 1
        assert "chain end r --job 9 --code 1" in done.stdout
        assert not list((tmp_path / "theirs").iterdir())
        return
    (made,) = local.iterdir()
    assert re.fullmatch(r"fanfold-9-[0-9a-f]{32}", made.name)
    assert stat.S_IMODE(made.stat().st_mode) == 0o700
    assert (made / "archive.tar.gz").read_text() == "archive"


def test_a_packed_environment_is_unpacked_on_the_node() -> None:
    assert "tar -xzf" in node_script(plan())
    assert "tar" not in node_script(replace(plan(), archive=None))


def test_a_short_job_keeps_time_for_its_run() -> None:
    short = replace(plan(), walltime_s=60)
    assert (short.reserve_s, short.warning_s) == (12, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"account": None}, "requires --account"),
        ({"queue": None}, "requires --queue"),
        ({"queue": "a b"}, "--queue 'a b'"),
        ({"account": "x\n#SBATCH --uid=0"}, "--account"),
        ({"run": Path("/scratch/my run")}, "--out '/scratch/my run'"),
        ({"walltime_s": 30}, "at least a minute"),
    ],
)
def test_what_a_scheduler_cannot_read(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        replace(plan(), **changes).check()  # type: ignore[arg-type]
    assert message in caught.value.message


def test_a_site_that_cannot_copy() -> None:
    bare = plan().site.model_copy(update={"broadcast": None})
    with pytest.raises(ConfigurationError, match="no 'broadcast' line"):
        replace(plan(), site=bare).check()


@pytest.mark.parametrize(
    ("text", "value"),
    [("2h", 7200), ("90m", 5400), ("1h30m", 5400), ("02:00:00", 7200), ("1d", 86400)],
)
def test_walltimes(text: str, value: int) -> None:
    assert parse_walltime(text) == value
    assert parse_walltime(format_hms(value)) == value


@pytest.mark.parametrize("text", ["", "2", "2x", "h", "1:2"])
def test_what_is_no_walltime(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--walltime"):
        parse_walltime(text)


@pytest.mark.parametrize(("code", "ends"), [(0, None), (10, 0), (1, 1)])
def test_a_job_that_cannot_begin_fails_loudly(code: int, ends: int | None) -> None:
    """Only "nothing to do" is a good end; else a chain would stop in silence."""
    lines = job_script(plan()).splitlines()
    at = next(n for n, line in enumerate(lines) if "chain begin" in line)
    text = "\n".join([f"fanfold=(bash -c 'exit {code}')", *lines[at : at + 3], "exit 99"])
    done = subprocess.run(["bash", "-c", text], check=False)
    assert done.returncode == (99 if ends is None else ends)
