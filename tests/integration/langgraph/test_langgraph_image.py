"""The Dockerfile of ``langgraph build``, as far as it can be checked without a container."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
ROOT = Path(str(files("fanfold"))).resolve()


def test_the_dockerfile_says_what_langgraph_json_says(tmp_path: Path) -> None:
    """A quote in a description would end the variable that it stands in."""
    target = tmp_path / "Dockerfile"
    command = [str(Path(sys.executable).with_name("langgraph")), "dockerfile", str(target)]
    subprocess.run(
        [*command, "-c", str(ROOT / "langgraph.json")],
        env=os.environ | {"LANGGRAPH_CLI_NO_ANALYTICS": "1"},
        capture_output=True,
        check=True,
    )
    lines = target.read_text().splitlines()
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
