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
from fanfold.tests.support.model_server import serve_answers

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


def answer_short_prompts(prompt: str) -> str | None:
    return None if len(prompt) > 4000 else "A finding."


async def test_an_estimate_warns_and_what_the_server_refuses_is_asked_in_pieces(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server says how long its context is, counts no tokens, and refuses with HTTP 413."""
    path = write_papers(tmp_path)
    with serve_answers(answer_short_prompts, status=413, context=1500) as url:
        loaded = settings(path, (url,), tokens=8000)
        assert (await estimate_run(loaded)).problem is None
        run = await prepare_run(loaded, tmp_path / "run")
        warnings = [one.message for one in caplog.records]
        assert sum("parts that the server refuses are asked in pieces" in w for w in warnings) == 2
        assert all("set input.split.tokens to at most" in one for one in warnings)
        end = await execute_run(run, RunOptions(quiet=True), Console(quiet=True))
        assert (end.exit_code, end.progress["failed"]) == (0, 0)
        never = settings(path, (url,), tokens=8000).raw | {"model": {"max_tokens": 1500}}
        with pytest.raises(ConfigurationError, match=r"no part fits"):
            await prepare_run(load_config(never), tmp_path / "never")
    files = sorted(run.folder.journal.glob("*.jsonl"))
    lines = [json.loads(line) for file in files for line in file.read_text().splitlines()[1:]]
    assert max(len(line.get("pieces", ())) for line in lines) >= 4


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
