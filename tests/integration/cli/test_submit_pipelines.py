"""``fanfold submit`` on a run or a pipeline that has begun."""

from __future__ import annotations

from typing import Any

import pytest

from fanfold.graphs.jobs import submit

from .conftest import SCHEMA, Shell

pytestmark = pytest.mark.integration

GOOD = {"simulated": {"nodes": 1, "time_scale": 50}}
JOB = (
    "--site",
    "polaris",
    "--nodes",
    "1",
    "--walltime",
    "1h",
    "--queue",
    "debug",
    "--account",
    "CHEM",
)


def _catch_jobs(shell: Shell) -> list[Any]:
    """Return the plans of the jobs that are submitted from now on; none reaches a scheduler."""
    submitted = list[Any]()
    shell.patch.setattr(submit, "check_scheduler", lambda _name: None)
    shell.patch.setattr(submit, "_submit_first", lambda plan, _options: submitted.append(plan))
    shell.patch.setattr(submit, "_about", lambda *_: ())
    return submitted


def test_changed_settings_of_a_begun_stage_are_refused(shell: Shell) -> None:
    (shell.folder / "in.jsonl").write_text('{"id": "a", "t": "x"}\n')
    stages = [
        {"name": "s", "map": {"prompt": "About {t}?", "schema": SCHEMA}},
        {"name": "none", "where": "output.score > 2", "map": {"prompt": "{s.score}"}},
    ]
    given = {"path": "in.jsonl", "id": "id"}
    shell.write(input=given, endpoints=GOOD, task=None, reduce=None, stages=stages)
    assert shell("run", "c.yaml", "--out", "r").code == 2  # the second stage has no items
    submitted = _catch_jobs(shell)
    settings = shell.folder / "r" / "run.yaml"
    kept = settings.read_bytes()
    for change in ("stages.0.map.prompt=Else about {t}?", "stages.0.name=other"):
        said = shell("submit", "r", *JOB, "--set", change)
        assert (said.code, submitted) == (2, []), said.err
        assert settings.read_bytes() == kept
    said = shell("submit", "r", *JOB, "--set", "stages.0.map.prompt=Else about {t}?")
    assert "task.prompt" in said.err
    said = shell("submit", "r", *JOB, "--set", "stages.1.where=output.score > 0")
    assert (said.code, len(submitted)) == (0, 1), said.err
    assert "output.score > 0" in settings.read_text()


def test_a_file_and_the_folder_of_a_run_must_fit(shell: Shell) -> None:
    """The file decides, as with `fanfold run`: it is not replaced by the settings of the folder."""
    (shell.folder / "in.jsonl").write_text('{"id": "a", "t": "x"}\n')
    task = {"prompt": "About {t}?", "schema": SCHEMA}
    given: dict[str, Any] = {"input": {"path": "in.jsonl", "id": "id"}, "endpoints": GOOD}
    shell.write(**given, task=task, reduce=None)
    assert shell("run", "c.yaml", "--out", "r").code == 0
    submitted = _catch_jobs(shell)
    settings = shell.folder / "r" / "run.yaml"
    kept = settings.read_bytes()
    shell.write(**given, task={**task, "prompt": "Else about {t}?"}, reduce=None)
    said = shell("submit", "c.yaml", "--out", "r", *JOB)
    assert (said.code, submitted) == (2, []), said.err
    assert "task.prompt" in said.err
    assert settings.read_bytes() == kept
    shell.write(**given, task=task, reduce=None, limits={"streams": 3})
    said = shell("submit", "c.yaml", "--out", "r", *JOB)
    assert (said.code, len(submitted)) == (0, 1), said.err
    assert "streams: 3" in settings.read_text()
