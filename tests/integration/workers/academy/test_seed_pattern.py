from __future__ import annotations

import runpy
from importlib.resources import files

import pytest

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Unclosed connection:ResourceWarning"),
]


async def test_the_example_runs_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    example = runpy.run_path(str(files("fanfold") / "examples" / "seed_pattern.py"))
    await example["main"](40)
    seed, ours = capsys.readouterr().out.splitlines()
    assert seed.startswith("seed     40 simulated answers")
    assert seed.endswith("requests per node: [10, 10, 10, 10]")
    assert ours.startswith("fanfold  40 simulated answers")
