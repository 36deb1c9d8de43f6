"""An item may be in several runs that a level extends: which record is taken over."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import pytest

from fanfold.backends.storage.run_folder import RunFolder
from fanfold.configs.loader import load_config
from fanfold.configs.yaml_text import to_yaml
from fanfold.graphs.run.extend import ExtensionPlan, _Matcher, _Source
from fanfold.graphs.run.extend_pipeline import PipelineExtension

SETTINGS: dict[str, Any] = {
    "input": {"path": "in.csv", "id": "id"},
    "task": {"prompt": "Say {text}"},
    "endpoints": {"simulated": {"nodes": 1}},
}


class _Records:
    """The journal of a run of one item."""

    def __init__(self, record: dict[str, Any] | None) -> None:
        self._record = record

    def is_finished(self, index: int) -> bool:
        assert index == 0
        return self._record is not None

    def read_record(self, index: int) -> dict[str, Any]:
        assert index == 0
        assert self._record is not None
        return self._record


def make_record(status: str, question: str = "same") -> dict[str, Any]:
    return {"status": status, "question": question, "simulated": True}


DONE, FAILED, OTHER = make_record("done"), make_record("failed"), make_record("done", "other")


async def test_a_pipeline_that_disappears_during_a_session_is_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def note(_folder: RunFolder, _about: Mapping[str, Any]) -> dict[str, Any]:
        return {"level": "round 1"}

    extension = PipelineExtension(RunFolder(tmp_path / "gone"), "abc", None)
    extend = extension.make_extend("best", load_config(SETTINGS), note)
    assert await extend(RunFolder(tmp_path), {"simulated": True}) == {"level": "round 1"}
    assert "pipeline abc is no longer there" in caplog.text


@pytest.mark.parametrize(
    ("records", "again", "expected"),
    [
        ([FAILED, DONE], None, (DONE, True)),
        ([DONE, FAILED], None, (DONE, True)),
        ([OTHER, FAILED, None], None, (FAILED, True)),
        ([FAILED, DONE], "failed", (DONE, True)),
        ([FAILED, OTHER], "failed", (FAILED, False)),
        ([OTHER, None], None, (None, False)),
        ([FAILED, DONE], "all", (FAILED, False)),
    ],
)
def test_an_answer_comes_before_a_failure(
    tmp_path: Path,
    records: list[dict[str, Any] | None],
    again: str | None,
    expected: tuple[Any, bool],
) -> None:
    loaded = load_config(SETTINGS)
    folder = RunFolder(tmp_path)
    folder.settings.write_bytes(to_yaml(loaded.plain).encode())
    sources = [
        _Source("r", folder, cast("Any", _Records(record)), {"a": 0}, 1, loaded, again)
        for record in records
    ]
    plan = ExtensionPlan("r", Path(), simulated=True)
    matcher = _Matcher(
        items=cast("Any", None),
        sources=sources,
        digests=cast("Any", None),
        build_messages=cast("Any", None),
        images=None,
        plan=plan,
    )
    assert matcher._find_record([0] * len(records), "same") == expected
    assert plan.done + plan.failed + plan.asked == 1
