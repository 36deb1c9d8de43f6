"""Errors of ``fanfold submit`` before anything is written or submitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.overrides import Overrides
from fanfold.graphs.jobs.submit import SubmitOptions, submit_job

SETTINGS: dict[str, Any] = {
    "name": "trial",
    "input": {"path": "in.csv", "id": "id"},
    "task": {"prompt": "How is {text}?"},
    "model": {"name": "m"},
    "endpoints": {"file": "servers"},
    "node": {"serve": "serve --port {port}"},
}


def shown(folder: Path, changed: dict[str, Any] | None = None, **order: Any) -> None:
    (folder / "in.csv").write_text("id,text\na,b\n")
    config = folder / "c.yaml"
    config.write_text(yaml.safe_dump(SETTINGS | (changed or {})))
    given: dict[str, Any] = {"nodes": 4, "walltime": "1h", "queue": "q", "account": "a"} | order
    terms = SubmitOptions("polaris", **given)
    submit_job(str(config), folder / "run", Overrides([]), terms, dry=True)


def test_what_fits_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shown(tmp_path, node_hours=4.0)
    assert "#PBS -l select=4" in capsys.readouterr().out


def test_more_node_hours_than_the_chain_may_take(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--node-hours 3\.9: one job .* may take 4\.00"):
        shown(tmp_path, node_hours=3.9)


def test_a_walltime_that_its_end_takes(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"--walltime 1m: .* reserved for the end"):
        shown(tmp_path, walltime="1m")


@pytest.mark.parametrize("endpoints", [{"aegis_registry": "http://head:8100"}, {"auto": True}])
def test_others_serve_already(tmp_path: Path, endpoints: dict[str, Any]) -> None:
    kind = next(iter(endpoints))
    with pytest.raises(ConfigurationError, match=rf"endpoints.{kind} refers to servers that run"):
        shown(tmp_path, {"endpoints": endpoints})


def test_an_archive_that_others_can_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    archive = tmp_path / "packed" / "env.tar.gz"
    archive.parent.mkdir()
    archive.touch(0o644)
    shown(tmp_path, archive=archive)
    assert "archive.tar.gz" in capsys.readouterr().out
    for what, mode in ((archive, 0o666), (archive.parent, 0o777)):
        before = what.stat().st_mode
        what.chmod(mode)
        with pytest.raises(ConfigurationError, match=rf"--pack: .* everyone can write {what} "):
            shown(tmp_path, archive=archive)
        what.chmod(before)
