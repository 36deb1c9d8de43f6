from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from fanfold.backends.cluster.script import JobPlan, clock, job_script, node_script
from fanfold.backends.contract.errors import ConfigurationError
from fanfold.configs.site import load_site, site_names
from fanfold.graphs.submitting import seconds


def plan(site: str = "perlmutter") -> JobPlan:
    return JobPlan(
        run=Path("/scratch/me/run"),
        name="solubility",
        command=("/env with blank/bin/python", "-m", "fanfold"),
        site=load_site(site),
        nodes=4,
        walltime_s=7200,
        drain_s=30,
        serves=True,
        queue="regular",
        account="m1234",
        archive=Path("/scratch/me/env.tar.gz"),
    )


@pytest.mark.parametrize("site", site_names())
def test_the_scripts_of_all_sites_are_shell(site: str) -> None:
    for text in (job_script(plan(site)), node_script(plan(site))):
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
    text = job_script(replace(plan(), serves=False, archive=None))
    assert "srun" not in text
    assert "node.sh" not in text
    assert 'resume "$run"' in text


def test_a_packed_environment_is_unpacked_on_the_node() -> None:
    assert "tar -xzf" in node_script(plan())
    assert "tar" not in node_script(replace(plan(), archive=None))


def test_a_short_job_keeps_time_for_its_run() -> None:
    short = replace(plan(), walltime_s=60)
    assert (short.reserve_s, short.warning_s) == (12, 30)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"account": None}, "needs --account"),
        ({"queue": None}, "needs --queue"),
        ({"queue": "a b"}, "--queue 'a b'"),
        ({"account": "x\n#SBATCH --uid=0"}, "--account"),
        ({"run": Path("/scratch/my run")}, "--out '/scratch/my run'"),
        ({"walltime_s": 30}, "takes a minute"),
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
    assert seconds(text) == value
    assert seconds(clock(value)) == value


@pytest.mark.parametrize("text", ["", "2", "2x", "h", "1:2"])
def test_what_is_no_walltime(text: str) -> None:
    with pytest.raises(ConfigurationError, match="--walltime"):
        seconds(text)
