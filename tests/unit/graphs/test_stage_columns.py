"""What later stages of a pipeline can read, and how many results they are estimated to have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.core.types import Item
from fanfold.backends.inputs.base import InputSummary
from fanfold.configs.loader import LoadedConfig, load_config
from fanfold.configs.yaml_text import to_yaml
from fanfold.graphs.run.pipeline import check_columns, list_stages
from fanfold.graphs.run.stage_estimate import ServedModel, estimate_stages

RANK = {"op": "rank", "prompt": "The best.", "text": "{x}", "k": 5}
SUMMARY = {"op": "summarize", "prompt": "Summarize.", "text": "{x}"}
INPUT = InputSummary(
    items=300,
    columns=("x",),
    row_schema={"type": "object", "properties": {"x": {"type": "string"}}},
    digest="0" * 32,
    skipped=(),
    skipped_total=0,
    invalid=0,
    source="x.csv",
    first=Item(0, "1", {"x": "a"}),
)


def load(*reduce: dict[str, Any]) -> LoadedConfig:
    stages = [{"name": f"s{n}", "reduce": one} for n, one in enumerate(reduce)]
    return load_config({"input": {"dataset": "topics"}, "stages": stages, "endpoints": "auto"})


def test_ranked_items_keep_their_columns() -> None:
    check_columns(load(RANK, SUMMARY), INPUT)
    check_columns(load(RANK, {**SUMMARY, "text": "{s0.rank}: {x}"}), INPUT)


def test_summaries_have_no_columns_of_the_items() -> None:
    with pytest.raises(ConfigurationError, match="there is no column 'x'"):
        check_columns(load(SUMMARY, RANK), INPUT)


def test_no_more_results_are_passed_on_than_there_are_ranks() -> None:
    loaded = load(RANK, SUMMARY)
    served = dict.fromkeys(("s0", "s1"), ServedModel("m", simulated=True))
    stages = list_stages(loaded, Path("run"))
    assert [one.items for one in estimate_stages(stages, 300, 20.0, served)] == [300, 5]


def test_elements_of_an_answer_have_its_fields() -> None:
    cited = {"type": "array", "items": {"type": "object", "properties": {"doi": {}}}}
    schema = {"type": "object", "properties": {"cites": cited}}
    ask = {"name": "read", "map": {"prompt": "{x}", "schema": schema}}
    extract = {"name": "cites", "reduce": {"op": "extract", "path": "read.cites[]"}}

    def check(text: str) -> None:
        last = {"name": "last", "reduce": {**SUMMARY, "text": text}}
        data = {"input": {"dataset": "topics"}, "stages": [ask, extract, last]}
        check_columns(load_config({**data, "endpoints": "auto"}), INPUT)

    check("{cites.doi} {x}")
    with pytest.raises(ConfigurationError, match="no column 'cite'"):
        check("{cite}")


def test_conditions_are_checked_before_the_first_call() -> None:
    def check(where: str, first: dict[str, Any] = RANK) -> None:
        loaded = load(first, SUMMARY)
        stage = {"name": "s1", "where": where, "reduce": {**SUMMARY, "text": None}}
        check_columns(load_config(loaded.raw | {"stages": [loaded.raw["stages"][0], stage]}), INPUT)

    check("output.rank < 3 and input.x != 'b'")
    check("output.items > 3", SUMMARY)
    with pytest.raises(ConfigurationError, match=r"where: .*no field 'rnk'.*did you mean 'rank'"):
        check("output.rnk < 3")
    with pytest.raises(ConfigurationError, match=r"where: .*'y'"):
        check("input.y == 'a'")
    with pytest.raises(ConfigurationError, match=r"where: .*'x'"):
        check("input.x == 'a'", SUMMARY)


def estimate_answers(context: int | None = None, **settings: Any) -> list[int]:
    loaded = load_config(load(RANK, {**SUMMARY, **settings.pop("op", {})}).raw | settings)
    served = dict.fromkeys(("s0", "s1"), ServedModel("m", simulated=True, context=context))
    found = estimate_stages(list_stages(loaded, Path("run")), 300, 20.0, served)
    return [one.levels[0].answer_tokens // one.levels[0].calls for one in found]


def test_summaries_may_be_longer_than_other_answers() -> None:
    assert estimate_answers() == [256, 1024]
    assert estimate_answers(op={"statements": 30}) == [256, 2400]
    assert estimate_answers(context=2048) == [256, 512]
    assert estimate_answers(model={"max_tokens": 300}) == [300, 300]


@pytest.mark.parametrize("settings", [{}, {"model": {"temperature": 0.5}}])
def test_a_resumed_pipeline_asks_for_answers_of_the_same_length(settings: dict[str, Any]) -> None:
    loaded = load_config(load(RANK, SUMMARY).raw | settings)
    resumed = load_config(yaml.safe_load(to_yaml(loaded.plain)))
    for one in (loaded, resumed):
        assert [stage.choose_answer_tokens(None) for stage in list_stages(one, Path())] == [
            256,
            1024,
        ]


def test_samples_are_calls_of_their_own() -> None:
    stages = [
        {"name": "first", "map": {"prompt": "{x}", "samples": 3}},
        {"name": "second", "map": {"prompt": "{first}"}},
    ]
    loaded = load_config({"input": {"dataset": "topics"}, "stages": stages, "endpoints": "auto"})
    served = dict.fromkeys(("first", "second"), ServedModel("m", simulated=False))
    found = list(estimate_stages(list_stages(loaded, Path()), 10, 5.0, served))
    assert [(one.items, one.amount.requests) for one in found] == [(10, 30), (10, 10)]


def test_a_merge_of_items_that_are_no_parts_names_the_setting() -> None:
    with pytest.raises(ConfigurationError, match=r"no column 'part'.*input\.split adds 'part'"):
        check_columns(load({"op": "merge", "field": "x"}), INPUT)
