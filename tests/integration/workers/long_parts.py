"""Runs whose parts of documents are too long for the model, on any backend."""

from __future__ import annotations

from typing import Any

from fanfold.tests.integration.runs.conftest import Lab
from fanfold.tests.integration.runs.test_long_parts import records, shorten_context, use_papers

PAPERS = 3
_KEPT = ("id", "question", "output", "pieces", "prompt_tokens", "completion_tokens", "requests")


async def assert_same_pieces_on(lab: Lab, backend: dict[str, Any]) -> None:
    """Assert that a backend asks for the same pieces as this process, and joins them equally."""
    use_papers(lab, PAPERS)
    lab.config["shard"] = {"items": 2}
    lab.config.pop("backend", None)
    folders = [await lab.begin(lab.home / "here")]
    lab.config["backend"] = backend
    folders.append(await lab.begin(lab.home / "there"))
    shorten_context(lab, 700)
    seen = list[Any]()
    for folder in folders:
        result = await lab.live(folder)
        assert (result.exit_code, result.progress["failed"]) == (0, 0)
        found = sorted(records(folder.path), key=lambda record: str(record["id"]))
        seen.append([{key: record.get(key) for key in _KEPT} for record in found])
        assert not folder.responses.exists()
    assert seen[0] == seen[1]
    assert sum(len(record["pieces"] or ()) > 1 for record in seen[0]) >= PAPERS
