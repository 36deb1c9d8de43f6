"""``fanfold submit`` on a pipeline that has begun."""

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


def test_changed_settings_of_a_begun_stage_are_refused(shell: Shell) -> None:
    (shell.folder / "in.jsonl").write_text('{"id": "a", "t": "x"}\n')
    stages = [
        {"name": "s", "map": {"prompt": "About {t}?", "schema": SCHEMA}},
        {"name": "none", "where": "output.score > 2", "map": {"prompt": "{s.score}"}},
    ]
    given = {"path": "in.jsonl", "id": "id"}
    shell.write(input=given, endpoints=GOOD, task=None, reduce=None, stages=stages)
    assert shell("run", "c.yaml", "--out", "r").code == 2  # the second stage has no items
    submitted = list[Any]()
    shell.patch.setattr(submit, "check_scheduler", lambda _name: None)
    shell.patch.setattr(submit, "_submit_first", lambda plan, _options: submitted.append(plan))
    shell.patch.setattr(submit, "_about", lambda *_: ())
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
