"""Reports of endpoints: listed live, in the run folder, and as metrics."""

from __future__ import annotations

import json
import shutil
import socket
import threading
import urllib.request
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from fanfold.configs import resolve

from .conftest import Served, Shell

pytestmark = pytest.mark.integration

DEAD = "http://127.0.0.1:9/v1"


def test_endpoints_are_listed_live(shell: Shell, fleet: Served) -> None:
    shell.write(endpoints={"urls": [*fleet.urls, DEAD]})
    said = shell("endpoints", "c.yaml", "--json")
    assert said.code == 0, said.err
    listed = json.loads(said.out)
    assert listed["model"] == "simulated-8b"
    first, _, dead = listed["endpoints"]
    assert first["reachable"]
    assert first["simulated"]
    assert first["context"] == {"simulated-8b": 32_768}
    assert (first["running"], first["waiting"]) == (0, 0)
    assert first["latency_s"] > 0
    assert not dead["reachable"]
    assert "cannot connect" in dead["error"]
    assert (dead["running"], dead["latency_s"]) == (None, None)
    said = shell("endpoints", "c.yaml")
    assert said.code == 0
    assert "32,768" in said.out.replace("\n", "")
    assert fleet.requests == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--endpoints", DEAD], "no endpoint answers"),
        (["--set", "model.name=other"], "no endpoint serves model.name 'other'"),
    ],
)
def test_nobody_serves_the_model(
    shell: Shell, fleet: Served, options: list[str], words: str
) -> None:
    shell.write(endpoints={"urls": list(fleet.urls)})
    said = shell("endpoints", "c.yaml", *options)
    assert said.code == 2
    assert words in said.err
    assert "127.0.0.1" in said.out


def test_an_endpoint_that_is_listed_twice_is_used_once(
    shell: Shell, fleet: Served, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = fleet.urls[0], fleet.urls[0].replace("127.0.0.1", "LocalHost") + "/"
    shell.write(endpoints={"urls": [first, second]})
    both = f"{first} is also listed as {second}"
    listed = shell("endpoints", "c.yaml")
    assert both in listed.err
    assert both in shell("check", "c.yaml").out
    (shell.folder / "list").write_text(f"{first}\n{second}\n")
    for given in ([], ["--endpoints", "list"], ["--endpoints", f"{first},{second}"]):
        said = shell("run", "c.yaml", *given, "--out", f"r{len(given)}", "--limit", "3", "--quiet")
        assert said.code == 0, said.err
        assert both in caplog.text
        caplog.clear()
        rows = pq.ParquetFile(f"r{len(given)}/endpoints.parquet").read().to_pylist()
        assert [row["calls"] for row in rows] == [3]
        shutil.rmtree(f"r{len(given)}")


def test_a_run_leaves_what_its_endpoints_did(shell: Shell, fleet: Served) -> None:
    shell.write(endpoints={"urls": list(fleet.urls)})
    assert shell("run", "c.yaml", "--out", "r", "--limit", "3", "--quiet").code == 0
    rows = pq.ParquetFile("r/endpoints.parquet").read().to_pylist()
    assert sum(row["calls"] for row in rows) == 3
    assert {row["session"] for row in rows} == {1}
    assert all(row["latency_p50_s"] > 0 for row in rows)
    said = shell("status", "--endpoints", "r", "--json")
    assert said.code == 0
    (total,) = {sum(row["completion_tokens"] for row in json.loads(said.out)["endpoints"])}
    assert total == json.loads(shell("status", "r", "--json").out)["tokens"]["completion"]
    assert "in use" in shell("status", "--endpoints", "r").out


def test_failures_are_told_by_class_over_all_lives(shell: Shell) -> None:
    faults = [{"kind": "empty_choices", "nodes": [0], "max_count": 2}]
    shell.write(
        endpoints={"simulated": {"nodes": 1, "time_scale": 50, "faults": faults}},
        limits={"attempts": 1, "hedge": False},
    )
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 3
    assert shell("resume", "r", "--retry-failed", "--quiet").code in {0, 3}
    (row,) = json.loads(shell("status", "--endpoints", "r", "--json").out)["endpoints"][-1:]
    assert row["failures"]["EndpointReplyError"] >= 2
    assert " Reply" in shell("status", "--endpoints", "r").out


def test_before_a_life_has_ended_nothing_is_known(shell: Shell) -> None:
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    Path("r/endpoints.parquet").unlink()
    said = shell("status", "--endpoints", "r")
    assert said.code == 0
    assert "no endpoint statistics yet" in said.err


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def test_metrics_are_served_while_the_run_goes_on(shell: Shell) -> None:
    port, found, over = free_port(), list[str](), threading.Event()

    def scrape() -> None:
        while not found and not over.is_set():  # none while the run ends: it would be cut off
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=5) as got:
                    found.append(got.read().decode())
            except OSError:
                over.wait(0.01)

    thread = threading.Thread(target=scrape)
    thread.start()
    price = {"prompt": 1, "completion": 1}
    shell.write(endpoints={"simulated": {"nodes": 2}}, model={"price": price})
    said = shell("run", "c.yaml", "--out", "r", "--quiet", "--metrics-port", str(port))
    over.set()
    thread.join()
    assert said.code == 0, said.err
    assert 'fanfold_items{status="open"} 3.0' in found[0]
    assert "fanfold_endpoints_healthy 2.0" in found[0]
    assert "fanfold_endpoint_calls_total{endpoint=" in found[0]
    assert 'fanfold_tokens_total{kind="wasted"} 0.0' in found[0]
    assert "fanfold_usd_total 0.0" in found[0]
    assert 'fanfold_node_hours_total{kind="idle"}' in found[0]


def test_metrics_need_a_free_port_and_the_extra(
    shell: Shell, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: Any = taken.getsockname()[1]
        said = shell("run", "c.yaml", "--out", "r", "--metrics-port", port)
    assert said.code == 2
    assert f"{port}: cannot listen there" in said.err
    monkeypatch.setattr(resolve, "find_spec", lambda _: None)
    said = shell("run", "c.yaml", "--out", "other", "--metrics-port", port)
    assert said.code == 2
    assert "fanfold[metrics]" in said.err
    assert not Path("other").exists()


def test_auto_says_what_it_found_nowhere(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fanfold.backends.discovery.auto.PORTS", (9,))
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.delenv("FIRST_API_KEY", raising=False)
    before = shell.files()
    said = shell("run", "c.yaml", "--endpoints", "auto")
    assert said.code == 2
    assert "auto found no endpoints" in said.err
    assert "endpoints.urls" in said.err
    assert shell.files() == before
