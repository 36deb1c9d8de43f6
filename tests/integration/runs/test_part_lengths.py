"""Parts of documents that exceed the model's context: refused before the first call."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.configs.loader import LoadedConfig, load_config
from fanfold.graphs.run.estimate import estimate_run
from fanfold.graphs.run.prepare import prepare_run
from fanfold.graphs.run.stage_estimate import estimate_pipeline
from fanfold.graphs.session import RunOptions, execute_run

pytestmark = pytest.mark.integration

WORDS = "The lattice of compound 4711 shows (at 293.15 K) an unexpected transition. "


def write_papers(folder: Path, text: str = WORDS) -> Path:
    path = folder / "papers.jsonl"
    papers = [{"id": f"P{n}", "title": "A title", "text": text * 40 * n} for n in range(1, 7)]
    path.write_text("".join(json.dumps(one) + "\n" for one in papers))
    return path


def settings(path: Path, urls: tuple[str, ...], **split: Any) -> LoadedConfig:
    return load_config(
        {
            "name": "t",
            "input": {"path": str(path), "id": "id", "split": split},
            "task": {"prompt": "{title}: list the findings. {text}", "system": "Be brief. " * 20},
            "model": {"max_tokens": 300},
            "endpoints": {"urls": list(urls)},
        }
    )


@pytest.mark.parametrize("text", [WORDS, "CC(=O)Oc1ccccc1C(=O)O ", "格子の転移は予想外である。"])
async def test_parts_that_exceed_the_context_are_refused_with_what_fits(
    tmp_path: Path, text: str
) -> None:
    path = write_papers(tmp_path, text)
    spec = SimulationSpec(nodes=2, time_scale=50, max_model_len=1500)
    async with SimulatedFleet(spec) as fleet:
        wrong = settings(path, fleet.urls, tokens=8000)
        with pytest.raises(ConfigurationError, match="the model's context of 1,500") as error:
            await prepare_run(wrong, tmp_path / "run")
        assert not (tmp_path / "run").exists()
        assert (await estimate_run(wrong)).problem == error.value.message
        assert fleet.stats()["totals"]["requests"] == 0
        found = re.search(r"tokens to at most ([\d,]+)", error.value.message)
        assert found is not None
        tokens = int(found[1].replace(",", ""))
        good = settings(path, fleet.urls, tokens=tokens, overlap=20)
        assert (await estimate_run(good)).problem is None
        run = await prepare_run(good, tmp_path / "run")
        end = await execute_run(run, RunOptions(quiet=True), Console(quiet=True))
    assert (end.exit_code, end.progress["failed"]) == (0, 0)
    assert end.progress["done"] > 6
    assert tokens > 300  # not much less than what fits


async def test_a_pipeline_says_it_in_its_estimate(tmp_path: Path) -> None:
    path = write_papers(tmp_path)
    async with SimulatedFleet(SimulationSpec(nodes=1, max_model_len=1500)) as fleet:
        wrong = settings(path, fleet.urls, merge="concat")
        found = await estimate_pipeline(wrong)
        good = settings(path, fleet.urls, merge="concat", tokens=600)
        assert (await estimate_pipeline(good)).problem is None
    assert found.problem is not None
    assert "set input.split.tokens to at most" in found.problem


async def test_long_parts_that_no_document_has_are_no_problem(tmp_path: Path) -> None:
    path = tmp_path / "papers.jsonl"
    path.write_text(json.dumps({"id": "P1", "title": "A title", "text": WORDS}) + "\n")
    async with SimulatedFleet(SimulationSpec(nodes=1, max_model_len=1500)) as fleet:
        await prepare_run(settings(path, fleet.urls), tmp_path / "run")


async def test_without_room_for_a_part_it_names_the_other_ways(tmp_path: Path) -> None:
    path = write_papers(tmp_path)
    async with SimulatedFleet(SimulationSpec(nodes=1, max_model_len=320)) as fleet:
        with pytest.raises(ConfigurationError, match=r"no part fits; lower model\.max_tokens"):
            await prepare_run(settings(path, fleet.urls), tmp_path / "run")
