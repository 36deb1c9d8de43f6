"""The end of a batch job and the wait for endpoints, as the command line reports them."""

from __future__ import annotations

import json
import time

import pytest

from .conftest import Served, Shell

pytestmark = pytest.mark.integration


def test_a_job_that_is_nearly_over(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FANFOLD_END_TIME", str(time.time() + 30))
    said = shell("run", "c.yaml", "--out", "r")
    assert said.code == 5
    assert "FANFOLD_END_TIME), 60 s are kept to close it; no item was sent" in said.err
    assert not (shell.folder / "r").exists()
    monkeypatch.setenv("FANFOLD_END_TIME", "at noon")
    said = shell("run", "c.yaml", "--out", "r")
    assert (said.code, "FANFOLD_END_TIME is 'at noon'" in said.err) == (2, True)
    monkeypatch.setenv("FANFOLD_END_TIME", str(time.time() + 3600))
    assert shell("run", "c.yaml", "--out", "r").code == 0


def test_a_walltime_that_is_too_short(shell: Shell) -> None:
    said = shell("run", "c.yaml", "--set", "limits.walltime_s=60")
    assert said.code == 2
    assert "leaves no time: drain_s and margin_s take 60 s" in said.err


def test_hosts_that_are_waited_for(shell: Shell, fleet: Served) -> None:
    folder = shell.folder / "servers"
    shell.write(endpoints={"file": "servers", "least": 2, "wait_s": 0.05, "refresh_s": 0.02})
    said = shell("check", "c.yaml")
    assert (said.code, "set model.name" in said.err) == (2, True), said
    said = shell("check", "c.yaml", "--set", "model.name=simulated-8b")
    assert (said.code, "endpoint: none yet" in said.out) == (0, True), said
    said = shell("run", "c.yaml", "--out", "r")
    assert said.code == 5
    assert "endpoints: 0 of 2 ready" in said.err
    assert "run the same command" in said.err
    folder.mkdir()
    for n, url in enumerate(fleet.urls):
        (folder / f"node{n}").write_text(f"{url}\n")
    listed = json.loads(shell("endpoints", "c.yaml", "--json").out)
    assert [row["reachable"] for row in listed["endpoints"]] == [True, True]
    assert shell("run", "c.yaml", "--out", "r").code == 0
    assert shell("run", "c.yaml", "--out", "s", "--endpoints", "servers").code == 0
