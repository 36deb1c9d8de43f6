"""The examples without a test file of their own run unchanged."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib import import_module
from importlib.resources import files
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration
EXAMPLES = Path(str(files("fanfold"))) / "examples"


async def test_embed_in_graph(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    example = import_module("fanfold.examples.embed_in_graph")
    assert len(await example.main(20)) == 5
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "screen > load"
    assert "why > reduce" in said


def test_the_notebook_runs_from_top_to_bottom(tmp_path: Path) -> None:
    """In a kernel of Jupyter's, whose loop is running while the cells run."""
    program = Path(sys.executable).with_name("jupyter-execute")
    places = ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR")
    environment = os.environ | dict.fromkeys(places, str(tmp_path / "jupyter"))
    notebook = tmp_path / "notebook.ipynb"
    notebook.write_bytes((EXAMPLES / "notebook.ipynb").read_bytes())
    done = subprocess.run(
        [program, notebook.name, "--inplace"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    cells = json.loads(notebook.read_text())["cells"]
    outputs = [out for cell in cells for out in cell.get("outputs", ())]
    assert "'done': 60" in "".join(outputs[0]["data"]["text/plain"])
    (table,) = [out["data"] for out in outputs if "text/html" in out.get("data", {})]
    assert "60 done, 0 failed of 60" in "".join(table["text/html"])
    assert outputs[-1]["data"]["text/plain"] == ["5"]
