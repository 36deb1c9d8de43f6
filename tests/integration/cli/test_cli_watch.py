"""``fanfold watch``: finished, running, killed and resumed runs, and damaged timelines."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.timeline import BinCounts, TimelineDelta
from fanfold.backends.storage.endpoints_table import read_endpoints
from fanfold.backends.storage.timeline import Timeline, read_timeline
from fanfold.tests.support.command_server import BlockingProcess, Command, started

from .conftest import Shell
from .test_cli_terminal import assert_whole, read_terminal, see

pytestmark = pytest.mark.integration

RUN, TIMELINE = Path("run"), Path("run", "timeline.arrow")


def calls(path: Path) -> int:
    return count_calls(read_timeline(path).to_pylist()) if path.exists() else 0


def count_calls(rows: list[dict[str, Any]]) -> int:
    return sum(row["calls"] for row in rows)


def wait_for_calls(run: BlockingProcess, least: int = 1) -> int:
    run.wait_until(lambda: calls(TIMELINE) >= least)
    return calls(TIMELINE)


@pytest.fixture
def slow(shell: Shell) -> Shell:
    """A run of 20,000 items that takes many minutes; a tenth of the requests fail."""
    rows = "".join(f"m{n},text {n}\n" for n in range(20_000))
    (shell.folder / "in.csv").write_text("id,text\n" + rows)
    faults = [{"kind": "500", "p": 0.1}]
    shell.write(
        endpoints={"simulated": {"nodes": 3, "time_scale": 1, "faults": faults}},
        limits={"streams": 6},
        reduce=[],
    )
    return shell


def test_a_finished_run(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    for width in (60, 80, 140):
        screen, _, code = see(width, "watch", "run")
        assert code == 0, screen.text
        assert_whole(screen.text, width)
        for part in (
            r"SIMULATED  run  finished",
            r"requests per second  mean",
            r"[▁-█]",
            "in flight",
        ):
            assert re.search(part, screen.text), screen.text
        assert "now" not in screen.text.split()
        assert re.search(r"127\.0\.0\.1:\d+/node-\d+", screen.text)
    printed = shell("watch", "run")
    assert printed.code == 0
    assert "\x1b" not in printed.out
    assert "requests per second" in printed.out
    facts = json.loads(shell("watch", "run", "--json").out)
    rows = read_endpoints(RUN / "endpoints.parquet")
    wanted = {row["endpoint"]: row["calls"] for row in rows}
    assert {one["endpoint"]: one["calls"] for one in facts["endpoints"]} == wanted
    assert sum(one["calls"] for one in facts["bins"]) == sum(wanted.values())
    assert facts["state"] == "finished"
    assert (facts["done"], facts["failed"]) == (facts["items"], 0)
    assert facts["bins"][0]["start"].endswith("Z")


@pytest.mark.usefixtures("slow")
def test_a_running_run_is_followed_and_ctrl_c_leaves_it(shell: Shell) -> None:
    with started(Command(("run", "c.yaml", "--out", "run", "--quiet"))) as run:
        wait_for_calls(run)
        own, its = pty.openpty()
        command = Command(("watch", "run"), new_session=True)
        with started(command, stdin=its, stdout=its, stderr=its) as watch:
            os.close(its)
            shown = b""
            while shown.count(b"requests per second") < 3:  # it shows it again and again
                shown += os.read(own, 1 << 16)
            assert b"running" in shown
            assert b"now " in shown
            watch.send_signal(signal.SIGINT)
            while data := read_terminal(own):
                shown += data
            assert watch.wait(60) == 0
        os.close(own)
        assert b"Traceback" not in shown
        assert b"Aborted" not in shown
        assert run.poll() is None, "the run goes on"
        facts = json.loads(shell("watch", "run", "--json").out)
        assert facts["state"] == "running"
        assert facts["failures"]["EndpointError"] > 0
        assert facts["failures"] == {"EndpointError": sum(one["failed"] for one in facts["bins"])}
        run.send_signal(signal.SIGINT)
        assert run.wait(120) == 5
    screen, _, code = see(80, "watch", "run")
    assert code == 0
    assert "SIGINT" in screen.text or "interrupt" in screen.text.lower() or "stopped" in screen.text


@pytest.mark.usefixtures("slow")
def test_a_killed_run_loses_the_last_seconds_only(shell: Shell) -> None:
    with started(Command(("run", "c.yaml", "--out", "run", "--quiet"))) as run:
        wait_for_calls(run, 10)
        run.kill()
        run.wait(60)
    before = read_timeline(TIMELINE).to_pylist()
    with started(Command(("resume", "run", "--quiet"))) as run:
        wait_for_calls(run, 10 + sum(row["calls"] for row in before))
        run.send_signal(signal.SIGTERM)
        run.wait(120)
    after = read_timeline(TIMELINE).to_pylist()
    assert grouped(after, {row["endpoint"] for row in before}) == grouped(before)
    rows = read_endpoints(RUN / "endpoints.parquet")
    later = {row["endpoint"]: row["calls"] for row in rows}  # of the second session
    assert {name: count for name, count in grouped(after).items() if name in later} == later
    assert later.keys().isdisjoint(grouped(before))
    status = json.loads(shell("status", "run", "--json").out)
    lost = status["done"] - (sum(row["calls"] for row in after) - sum(failed(after)))
    assert lost < 6 * 60  # what 6 streams do in the seconds between two writes, on a slow machine


def grouped(rows: list[dict[str, Any]], names: set[str] | None = None) -> dict[str, int]:
    sums = dict[str, int]()
    for row in rows:
        if names is None or row["endpoint"] in names:
            sums[row["endpoint"]] = sums.get(row["endpoint"], 0) + row["calls"]
    return sums


def failed(rows: list[dict[str, Any]]) -> list[int]:
    return [count for row in rows for _, count in row["failures"]]


def test_what_cannot_be_shown_is_said(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    TIMELINE.unlink()
    told = shell("watch", "run")
    assert told.code == 0
    assert "no request" in told.out
    assert json.loads(shell("watch", "run", "--json").out)["bins"] == []
    TIMELINE.write_bytes(b"ARROW1 and no more")
    told = shell("watch", "run")
    assert told.code == 1
    assert "timeline.arrow: cannot be read" in told.err
    assert shell("watch", "nothing").code == 2


@pytest.mark.parametrize("width", [60, 140])
def test_texts_of_endpoints_do_not_reach_the_terminal(shell: Shell, width: int) -> None:
    assert shell("run", "c.yaml", "--out", "run", "--quiet").code == 0
    delta = TimelineDelta()
    bad = "e\x1b[31mvil\x07\u202e\r\n\ud800" + "x" * 100
    delta.add(1_790_000_000_000, bad.replace("\ud800", ""), BinCounts(3, {"Class": 1}))
    timeline = Timeline(TIMELINE)
    timeline.load()
    timeline.add([delta])
    timeline.write()
    screen, frames, code = see(width, "watch", "run")
    assert code == 0
    assert r"e\x1b[31mvil\x07\u202e" in "".join(screen.text.split("\n"))
    assert_whole(screen.text, width)
    assert "\x07" not in "".join(frames)
