"""Results are written in memory that does not grow with the number of items."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import orjson
import pyarrow.parquet as pq
import pytest

from fanfold.backends.core.checksum import add_crc
from fanfold.backends.inputs.item_store import load_input
from fanfold.backends.storage.journal_file import make_header
from fanfold.configs.models import InputConfig

from .conftest import Shell

pytestmark = [pytest.mark.integration, pytest.mark.long]

ITEMS = 1_000_000
MOST_MB = 400
MEASURE = """
import resource, subprocess, sys
subprocess.run([sys.executable, "-m", "fanfold", *sys.argv[1:]], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024)
"""


def grow(folder: Path, items: int) -> None:
    """Give a finished run of few items as many as asked, all answered like its first one."""
    lines = ["id,smiles,name,weight,a,b,c\n"]
    lines += [f"m{n},CC(=O)O{'C' * (n % 20)},compound {n},{n % 97},1,2,3\n" for n in range(items)]
    Path("many.csv").write_text("".join(lines))
    load_input(InputConfig(path="many.csv", id="id"), folder / "items.arrow", [])
    about: dict[str, Any] = json.loads((folder / "provenance.json").read_bytes())
    about["input"]["items"] = items
    (folder / "provenance.json").write_text(json.dumps(about))
    (folder / "aggregate.json").unlink()
    path = folder / "journal" / "0001.jsonl"
    record = json.loads(path.read_text().splitlines()[1])
    del record["crc"]
    with path.open("wb") as file:
        header = make_header(path, "journal", {"run": about["run"], "session": "x"})
        line, crc = add_crc(header, 0)
        file.write(line)
        for n in range(items):
            line, crc = add_crc(orjson.dumps(record | {"index": n, "id": f"m{n}"}), crc)
            file.write(line)


@pytest.mark.parametrize("form", ["parquet", "csv", "jsonl"])
def test_a_million_rows(shell: Shell, form: str) -> None:
    assert shell("run", "c.yaml", "--out", "r", "--quiet").code == 0
    grow(Path("r"), ITEMS)
    command = [sys.executable, "-c", MEASURE, "results", "r", "-o", f"out.{form}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) <= MOST_MB
    if form == "parquet":
        assert pq.read_metadata("out.parquet").num_rows == ITEMS
    else:
        with Path(f"out.{form}").open("rb") as file:
            assert sum(1 for _ in file) == ITEMS + (form == "csv")
