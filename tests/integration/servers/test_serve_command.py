"""``fanfold serve`` as a job script uses it, with the simulated node as the server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from fanfold.backends.servers.events import read_events
from fanfold.backends.servers.watchdog import is_alive
from fanfold.graphs.cli import app

from .conftest import PLAIN, free_port

pytestmark = pytest.mark.integration

SIMULATED = (
    f"{sys.executable} -P -m fanfold.backends.simulated --nodes 1 --addressing port "
    "--port {port} --model {model}"
)


def write(folder: Path, **sections: Any) -> Path:
    (folder / "in.csv").write_text("id,text\n" + "".join(f"{n},t\n" for n in range(40)))
    settings = {
        "name": "t",
        "input": {"path": "in.csv", "id": "id"},
        "task": {"prompt": "Say {text}"},
        "model": {"name": "simulated-8b"},
        "endpoints": {"file": "servers", "least": 1, "wait_s": 60, "refresh_s": 0.1},
        "node": {"serve": SIMULATED, "ports": free_port(), "address": "127.0.0.1"},
    }
    path = folder / "c.yaml"
    path.write_text(yaml.safe_dump(settings | sections))
    return path


def fanfold(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "fanfold", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
    )


def wait_for(condition: Callable[[], Any], process: subprocess.Popen[str]) -> None:
    while not condition():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)


def events(record: Path, name: str) -> list[dict[str, Any]]:
    return [line for line in read_events(record) if line["event"] == name]


def run(folder: Path, monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int | str | None:
    """Run a command in this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["fanfold", *arguments])
    with pytest.raises(SystemExit) as end:
        app.main()
    return end.value.code


def test_a_run_on_a_node_that_is_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server is killed before the run; the run waits until it is up again."""
    write(tmp_path)
    serving = fanfold(tmp_path, "serve", "c.yaml", "--servers", "servers", "--host", "n1.example")
    try:
        file, record = tmp_path / "servers" / "n1", tmp_path / "servers" / "logs" / "n1.jsonl"
        wait_for(file.exists, serving)
        (start,) = events(record, "start")
        os.kill(start["pid"], signal.SIGKILL)
        wait_for(lambda: events(record, "down"), serving)
        assert run(tmp_path, monkeypatch, "run", "c.yaml", "--out", "r", "--json") == 0
        assert json.loads(capsys.readouterr().out)["done"] == 40
        serving.send_signal(signal.SIGUSR1)  # a scheduler's warning is for runs
        serving.send_signal(signal.SIGTERM)
        _, said = serving.communicate(timeout=60)
    finally:
        serving.kill()
        serving.communicate()
    assert serving.returncode == 0, said
    assert "was ended by SIGKILL; restart 1 of 3" in said
    assert "SIGTERM: stopping the servers of n1" in said
    assert not file.exists()
    assert len(events(record, "start")) == 2
    assert not any(is_alive(line["pid"]) for line in events(record, "start"))


def test_a_start_that_fails_exits_with_1_and_the_last_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"serve": f"{sys.executable} -I {PLAIN} {{port}} fail", "ports": free_port()}
    write(tmp_path, node=node)
    assert run(tmp_path, monkeypatch, "serve", "c.yaml", "--servers", "servers") == 1
    said = capsys.readouterr().err
    assert "| torch.OutOfMemoryError: no memory left" in said
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"node": {}}, "set node.serve"),
        ({"endpoints": {"aegis_registry": "http://h:8471"}}, "servers that fanfold does not start"),
    ],
)
def test_settings_that_serve_nothing(
    tmp_path: Path,
    sections: dict[str, Any],
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = write(tmp_path, **sections)
    assert run(tmp_path, monkeypatch, "serve", str(path), "--servers", str(tmp_path)) == 2
    assert words in capsys.readouterr().err
