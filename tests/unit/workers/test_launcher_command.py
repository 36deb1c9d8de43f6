"""The command that starts workers, and the name by which they reach the coordinator."""

from __future__ import annotations

import resource
import sys

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.workers.launched.backend import (
    coordinator_host,
    launcher_command,
    python_command,
)
from fanfold.backends.workers.registry import make_backends
from fanfold.configs.backend import BackendConfig
from fanfold.configs.loader import load_config
from fanfold.graphs.worker import work_shard

JOB = {"FANFOLD_LAUNCHER": "bash /run/launch.sh", "FANFOLD_COORDINATOR_HOST": "n1"}


def test_the_setting_comes_before_the_job() -> None:
    own = launcher_command("mpiexec -n {workers} --ppn 1", 4, JOB)
    assert own == ("mpiexec", "-n", "4", "--ppn", "1")
    assert launcher_command(None, 4, JOB) == ("bash", "/run/launch.sh")
    assert launcher_command(None, 4, {}) is None
    assert (coordinator_host("n2", JOB), coordinator_host(None, JOB)) == ("n2", "n1")


def test_loopback_and_this_python_where_nobody_says() -> None:
    """A job's site may give a host's name by a variable that is empty."""
    for environment in ({}, {"FANFOLD_COORDINATOR_HOST": "", "FANFOLD_PYTHON": ""}):
        assert coordinator_host(None, environment) == "127.0.0.1"
        assert python_command(environment) == (sys.executable, "-P")
    assert python_command({"FANFOLD_PYTHON": "/tmp/env/bin/python"})[0] == "/tmp/env/bin/python"


def test_a_variable_that_is_no_command() -> None:
    with pytest.raises(ConfigurationError, match=r"FANFOLD_LAUNCHER: unknown name \{nodes\}"):
        launcher_command(None, 2, {"FANFOLD_LAUNCHER": "srun -N {nodes}"})


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"kind": "launched", "command": "srun -N {nodes}"}, "unknown name {nodes}"),
        ({"kind": "launched", "command": "srun 'x"}, "invalid command line"),
        ({"kind": "launched", "command": " "}, "is empty"),
        ({"kind": "launched", "host": "a b"}, "host"),
        ({"kind": "local", "command": "srun"}, "'command' is for kind parsl and launched"),
        ({"kind": "launched", "config": "htex_job"}, "'config' is for kind parsl"),
    ],
)
def test_settings_that_are_none(settings: dict[str, str], says: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_config(
            {"task": {"prompt": "x"}, "endpoints": {"urls": ["http://a:1"]}, "backend": settings}
        )
    assert says in caught.value.message


def test_who_works_on_the_nodes_of_a_job() -> None:
    kinds = (
        ({"kind": "launched"}, True),
        ({"kind": "parsl", "config": "htex_job"}, True),
        ({"kind": "parsl"}, False),
        ({"kind": "local"}, False),
    )
    for settings, works in kinds:
        assert BackendConfig.model_validate(settings).starts_workers_on_nodes is works


def test_htex_job_needs_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    config = BackendConfig(kind="parsl", config="htex_job")
    monkeypatch.delenv("FANFOLD_LAUNCHER", raising=False)
    with pytest.raises(ConfigurationError, match=r"use fanfold submit, or set backend\.command"):
        make_backends(config, work_shard)
    monkeypatch.setenv("FANFOLD_LAUNCHER", "bash /run/launch.sh")
    assert make_backends(config, work_shard)[0].name == "parsl (htex_job)"


def test_the_desk_has_room_for_all_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each keeps a connection, hence an open file."""
    limits = [(64, 2048)]
    monkeypatch.setattr(resource, "getrlimit", lambda _: limits[-1])
    monkeypatch.setattr(resource, "setrlimit", lambda _, new: limits.append(new))
    config = BackendConfig(kind="launched", workers=1000)
    make_backends(config, work_shard)
    assert limits[-1] == (1256, 2048)
    many = config.model_copy(update={"workers": 2000})
    with pytest.raises(ConfigurationError, match=r"2000 workers need .* backend\.workers to 1792"):
        make_backends(many, work_shard)
