"""Signals: stop taking items, wait for those in flight, exit 5; a second one stops at once."""

from __future__ import annotations

import json
import signal
import socket
import sys
from functools import partial
from pathlib import Path

import pytest

from fanfold.tests.support.command_server import BlockingProcess, Command, started
from fanfold.tests.support.pdf_files import make_large_pdf

from .conftest import Shell

pytestmark = pytest.mark.integration


def finished_items(folder: Path) -> int:
    files = folder.glob("journal/*.jsonl")
    return sum(file.read_text().count('"status"') for file in files)


@pytest.fixture
def slow(shell: Shell) -> Shell:
    rows = "".join(f"{n},t\n" for n in range(400))
    (shell.folder / "in.csv").write_text(f"id,text\n{rows}")
    speed = {"nodes": 1, "time_scale": 1, "tpot_s": 0.02, "ttft_s": 0.2}
    shell.write(endpoints={"simulated": speed}, limits={"streams": 4})
    return shell


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_goes_on_later(slow: Shell, number: signal.Signals) -> None:
    with started(Command(("run", "c.yaml", "--out", "r", "--json"))) as process:
        process.wait_until(partial(finished_items, slow.folder / "r"))
        process.send_signal(number)
        out, err = process.communicate(timeout=30)
    assert process.returncode == 5, err
    found = json.loads(out)
    assert found["exit_code"] == 5
    assert 0 < found["done"] < 400
    assert number.name in err
    assert json.loads(slow("status", "r", "--json").out)["open"] == 400 - found["done"]
    rows = slow("results", "r").out.splitlines()
    assert len(rows) == found["done"]
    fast = ["--set", "endpoints.simulated.time_scale=100", "--set", "limits.streams=256"]
    said = slow("resume", "r", "--json", *fast)
    assert said.code == 0, said.err
    assert json.loads(said.out)["requests"] == 400


def test_a_second_signal_stops_at_once(slow: Shell) -> None:
    hang = "endpoints.simulated.faults=[{kind: hang, p: 0.5}]"
    with started(Command(("run", "c.yaml", "--out", "r", "--set", hang))) as process:
        process.wait_until(partial(finished_items, slow.folder / "r"))
        process.send_signal(signal.SIGINT)
        lines = iter(process.read_error_line, "")
        assert any("repeat to stop at once" in line for line in lines)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=20)  # waiting for those in flight takes 30 s
    assert process.returncode == 5, err
    assert "fanfold resume r" in err


def test_stopped_before_it_began(shell: Shell) -> None:
    """The endpoint takes the connection and says nothing."""
    before = set(shell.files())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        shell.write(endpoints={"urls": [f"http://127.0.0.1:{silent.getsockname()[1]}"]})
        with started(Command(("run", "c.yaml", "--out", "x/r"))) as process:
            connection, _ = silent.accept()
            process.send_signal(signal.SIGTERM)
            _, err = process.communicate(timeout=20)
            connection.close()
    assert process.returncode == 1, err
    assert "interrupted before anything was written" in err
    assert set(shell.files()) == before


def test_the_simulated_fleet_ends_on_a_signal(shell: Shell) -> None:
    with started(Command(("simulate", "--nodes", "2"))) as process:
        process.wait_until((shell.folder / "endpoints.txt").exists)
        assert "SIMULATED fleet of 2 nodes" in process.read_error_line()
        assert len((shell.folder / "endpoints.txt").read_text().splitlines()) == 2
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0


def list_children(process: BlockingProcess) -> list[int]:
    files = Path(f"/proc/{process.pid}/task").glob("*/children")
    return [int(one) for file in files for one in file.read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_reading_of_pdf_files(shell: Shell, number: signal.Signals) -> None:
    """Neither their processes nor a run folder are left, and nothing waits for the files."""
    pytest.importorskip("pypdfium2", reason="PDF files need the extra 'pdf'")
    papers = shell.folder / "papers"
    papers.mkdir()
    for n in range(6):
        make_large_pdf(papers / f"{n}.pdf", b"(word) Tj 0 -1 Td ", 100_000_000)
    shell.write(input={"path": "papers"}, task={"prompt": "{text}"})
    with started(Command(("run", "c.yaml", "--out", "r"))) as process:
        children = process.wait_until(partial(list_children, process))
        process.send_signal(number)
        _, err = process.communicate(timeout=30)
    assert process.returncode == 1
    assert "interrupted before anything was written" in err
    assert not [one for one in children if Path(f"/proc/{one}").exists()]
    assert {path.name for path in shell.folder.iterdir() if path.is_dir()} == {"papers"}
