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
from fanfold.graphs.run.extend_pipeline import PipelineExtension, _select_kind

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
    ("level", "is_simulated", "kept", "warned"),
    [
        ("small", False, ["small"], None),
        ("large", True, ["large"], None),
        ("large", False, ["small"], "simulated answers of {large}"),
        ("small", True, ["large"], "real answers of {small}"),
        ("of a later version", True, ["large"], None),
    ],
)
def test_a_warning_names_only_answers_that_are_left_out(  # noqa: PLR0913, PLR0917
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    level: str,
    is_simulated: bool,
    kept: list[str],
    warned: str | None,
) -> None:
    runs = {name: RunFolder(tmp_path / name) for name in ("small", "large")}
    for name, run in runs.items():
        run.path.mkdir()
        run.write_provenance({"level": name, "simulated": name == "large"})
    found = _select_kind(list(runs.values()), is_simulated, level)
    assert [run.path.name for run in found] == kept
    said = [record.getMessage() for record in caplog.records]
    paths = {name: run.path for name, run in runs.items()}
    expected = [] if warned is None else [f"--from: {warned.format(**paths)} are not taken over"]
    assert said == expected


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
