"""The Dockerfile of ``langgraph build``, as far as it can be checked without a container."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from langgraph_sdk import get_sync_client

from fanfold.tests.integration.dev_server import Server, running

pytestmark = pytest.mark.integration
ROOT = Path(str(files("fanfold"))).resolve()


def write_dockerfile(target: Path) -> str:
    command = [str(Path(sys.executable).with_name("langgraph")), "dockerfile", str(target)]
    subprocess.run(
        [*command, "-c", str(ROOT / "langgraph.json")],
        env=os.environ | {"LANGGRAPH_CLI_NO_ANALYTICS": "1"},
        capture_output=True,
        check=True,
    )
    return target.read_text()


def test_the_dockerfile_says_what_langgraph_json_says(tmp_path: Path) -> None:
    """A quote in a description would end the variable that it stands in."""
    lines = write_dockerfile(tmp_path / "Dockerfile").splitlines()
    assigned = [shlex.split(line.removeprefix("ENV ")) for line in lines if line.startswith("ENV ")]
    variables = dict(part.split("=", 1) for (part,) in assigned)
    config = json.loads((ROOT / "langgraph.json").read_text())
    assert json.loads(variables["LANGSERVE_GRAPHS"]) == config["graphs"]
    assert json.loads(variables["LANGGRAPH_HTTP"]) == config["http"]
    assert json.loads(variables["LANGGRAPH_CHECKPOINTER"]) == config["checkpointer"]
    assert f"ADD . /deps/{ROOT.name}" in lines
    assert any("pip install" in line and line.rstrip().endswith("rdkit") for line in lines)


def test_the_image_gets_the_link_and_no_secrets() -> None:
    """Installing in place needs ``.dev/fanfold``; ``ADD .`` takes what is not left out."""
    left_out = (ROOT / ".dockerignore").read_text().split()
    assert {".env", ".venv", ".langgraph_api", "fanfold-runs"} <= set(left_out)
    assert ".dev" not in left_out
    assert (ROOT / ".dev" / "fanfold").is_symlink()


@pytest.mark.long
def test_its_install_lines_serve_the_graphs(tmp_path: Path) -> None:
    """The lines run with pip in an empty environment, on a copy of what the image gets.

    The image has LangGraph's server; here it comes from the extra ``studio``.
    """
    text = write_dockerfile(tmp_path / "Dockerfile")
    named, local = re.findall(r"uv pip install .*-c \S+ ([^)\n]+)", text)
    assert (named, local) == ("rdkit", "-e .")
    copy, python = tmp_path / "deps" / "fanfold", str(tmp_path / "venv" / "bin" / "python")
    copy.mkdir(parents=True)
    archive = subprocess.run(["git", "archive", "HEAD"], cwd=ROOT, capture_output=True, check=True)
    subprocess.run(["tar", "-x"], input=archive.stdout, cwd=copy, check=True)
    subprocess.run([sys.executable, "-m", "venv", str(tmp_path / "venv")], check=True)

    def run(*arguments: str) -> str:
        command = [python, *arguments]
        done = subprocess.run(command, cwd=copy, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
        return done.stdout

    for line in (named, local):
        run("-m", "pip", "install", *shlex.split(line))
    graphs = json.loads((ROOT / "langgraph.json").read_text())["graphs"]
    for about in graphs.values():
        module, _, name = about["path"].partition(":")
        found = run("-c", f"import {module} as m; print(m.{name}.name, m.__file__)")
        assert str(copy) in found
    run("-m", "pip", "install", "-e", ".[studio]")
    (tmp_path / "served").mkdir()
    served = Server(tmp_path / "served", copy, python)
    with running(served), get_sync_client(url=served.url) as client:
        shown = {one["graph_id"] for one in client.assistants.search()}
        given: Any = {"items": [{"id": "ethanol", "smiles": "CCO"}]}
        end: Any = client.runs.wait(None, "map_reduce", input=given)
        one: Any = {"id": "ethanol", "row": {"smiles": "CCO"}}
        answer: Any = client.runs.wait(None, "item", input=one)
    assert shown == graphs.keys()
    assert end["progress"]["done"] == 1
    assert answer["output"]
