"""Settings of a job's nodes, for each deployment shape."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fanfold.configs.models import RunConfig
from fanfold.configs.overrides import Overrides
from fanfold.configs.site import load_site
from fanfold.graphs.jobs.submit import SubmitOptions, _make_job_plan, _resolve_settings, _scripts

ORDER = SubmitOptions("polaris", nodes=5, walltime="1h", queue="prod", account="CHEM")
SERVED = {"node": {"serve": "vllm serve {model} --port {port}"}, "model": {"name": "m"}}


def settled(folder: Path, settings: dict[str, Any]) -> tuple[RunConfig, set[str]]:
    """Return the job's settings, and the names of its scripts."""
    base = {"task": {"prompt": "x {text}"}, "endpoints": {"hosts": "n1"}}
    config = folder / "c.yaml"
    config.write_text(yaml.safe_dump(base | {"input": {"path": "in.csv"}} | settings))
    site = load_site("polaris")
    loaded, _ = _resolve_settings(str(config), folder / "run", Overrides([]), ORDER, site)
    return loaded.config, set(_scripts(_make_job_plan(loaded, folder / "run", ORDER, site)))


@pytest.mark.parametrize("backend", [{"kind": "launched"}, {"kind": "parsl", "config": "htex_job"}])
def test_workers_that_ask_their_own_nodes(tmp_path: Path, backend: dict[str, Any]) -> None:
    own = backend | {"node_endpoints": True}
    config, scripts = settled(tmp_path, SERVED | {"backend": own})
    assert scripts == {"job.sh", "node.sh", "launch.sh", "worker.sh"}
    assert config.backend.workers == 5
    assert config.endpoints.file == str(tmp_path / "run" / "cluster" / "servers")
    assert (config.endpoints.least, config.endpoints.wait_s) == (1, 0.0), "nobody is waited for"


def test_workers_that_ask_all_nodes(tmp_path: Path) -> None:
    """Then the coordinator waits for half of the endpoints, as ever."""
    config, _ = settled(tmp_path, SERVED | {"backend": {"kind": "launched"}})
    assert (config.endpoints.least, config.endpoints.wait_s) == (2, config.node.timeout_s)


@pytest.mark.parametrize(("least", "becomes"), [(1, 2), (4, 4), (40, 5)])
def test_endpoints_that_are_waited_for(tmp_path: Path, least: int, becomes: int) -> None:
    """Half of the servers, or what the settings say, and never more than there can be."""
    config, _ = settled(tmp_path, SERVED | {"endpoints": {"hosts": "n1", "least": least}})
    assert config.endpoints.least == becomes


def test_a_command_of_ones_own_is_kept(tmp_path: Path) -> None:
    own = {"kind": "launched", "command": "mpiexec -n {workers} --ppn 4", "workers": 20}
    config, scripts = settled(tmp_path, {"backend": own})
    assert (config.backend.workers, scripts) == (20, {"job.sh"})


def test_one_coordinator(tmp_path: Path) -> None:
    config, scripts = settled(tmp_path, SERVED)
    assert (config.backend.kind, scripts) == ("local", {"job.sh", "node.sh"})


@pytest.mark.parametrize(("own", "becomes"), [({}, 1200), ({"fleet_wait_s": 5}, 5)])
def test_a_server_that_is_restarted_is_waited_for(
    tmp_path: Path, own: dict[str, Any], becomes: float
) -> None:
    """The job ends at once where none comes back."""
    config, _ = settled(tmp_path, SERVED | {"limits": own})
    assert config.limits.fleet_wait_s == becomes
