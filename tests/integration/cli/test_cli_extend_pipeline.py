"""``fanfold run NEW --from DIR`` for pipelines: stages and levels take over equal questions."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import Served, Shell
from .test_cli_extend import YES, records

pytestmark = pytest.mark.integration

ROWS = 12
SCREEN = {
    "prompt": "Screen {text}",
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["score"],
        "properties": {"score": {"type": "number", "minimum": 0, "maximum": 1}},
    },
}
CLAIM = {
    "prompt": "Claim of {text}, {screen.score}",
    "schema": {
        "type": "object",
        "additionalProperties": False,
        "required": ["claim"],
        "properties": {"claim": {"type": "string", "maxLength": 30}},
    },
}
SUMMARIZE = {"op": "summarize", "prompt": "Sum up.", "text": "{claims.claim}", "group_tokens": 100}


def use(shell: Shell, fleet: Served | None, rows: int = ROWS, **sections: Any) -> None:
    """Write an input and a pipeline of two maps and an operator."""
    lines = [f"{number},text number {number}" for number in range(rows)]
    (shell.folder / "in.csv").write_text("\n".join(["id,text", *lines, ""]))
    stages = [
        {"name": "screen", "map": SCREEN},
        {"name": "claims", "map": CLAIM},
        {"name": "summary", "reduce": SUMMARIZE},
    ]
    endpoints: dict[str, Any] = {"simulated": {"nodes": 2, "time_scale": 50}}
    if fleet is not None:
        endpoints = {"urls": list(fleet.urls)}
    base = {"task": None, "reduce": None, "endpoints": endpoints}
    shell.write(**base | {"model": {"max_tokens": 400}, "stages": stages} | sections)


def change_stage(shell: Shell, number: int, change: dict[str, Any]) -> None:
    path = shell.folder / "c.yaml"
    settings = yaml.safe_load(path.read_text())
    settings["stages"][number] |= change
    path.write_text(yaml.safe_dump(settings))


def run(shell: Shell, *arguments: str, code: int = 0) -> list[dict[str, Any]]:
    said = shell("run", "c.yaml", *arguments, "--json")
    assert said.code == code, said.err
    stages: list[dict[str, Any]] = json.loads(said.out)["stages"]
    return stages


def asked(stages: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    return {one["stage"]: (one["kept"], one["requests"]) for one in stages}


def test_nothing_is_asked_again(shell: Shell, fleet: Served) -> None:
    """Nor twice: of a pipeline that has extended another one, whose origin is named."""
    use(shell, fleet)
    first = run(shell, "--out", "first")
    before = fleet.requests
    refused = shell("run", "c.yaml", "--from", "first", "--out", "new")
    assert refused.code == 2
    assert "kept, at no cost: 12 done" in refused.err
    assert "stage claims: 12 answers there" in refused.err
    assert "if none is: at most " in refused.err
    assert "add --yes" in refused.err
    assert not (shell.folder / "new").exists()
    second = run(shell, "--from", "first", "--out", "second", "--yes")
    third = run(shell, "--from", "second", "--out", "third", "--yes")
    assert fleet.requests == before
    levels = [len(one["levels"]) for one in (first[2], second[2], third[2])]
    assert levels[0] > 1
    assert levels == [levels[0]] * 3
    questions = sum(one["items"] for one in first[2]["levels"])
    assert asked(third) == {"screen": (12, 0), "claims": (12, 0), "summary": (questions, 0)}
    old = json.loads((shell.folder / "first" / "provenance.json").read_text())["run"]
    for part in ("stages/screen", "stages/claims", "stages/summary/levels/1"):
        found, known = (records(shell.folder / name / part) for name in ("third", "first"))
        assert {one["origin"] for one in found.values()} == {old}
        for name, record in found.items():
            assert record["output"] == known[name]["output"]
            assert record["question"] == known[name]["question"]
    again = shell("run", "c.yaml", "--from", "second", "--out", "third")
    assert "stage claims: 12 items, 12 done, 0 failed; 12 kept, 0 requests" in again.err
    results = [shell("results", name, "--stage", "summary").out for name in ("first", "third")]
    outputs = [[json.loads(line)["output"] for line in one.splitlines()] for one in results]
    assert outputs[0] == outputs[1]


def test_a_changed_stage_and_a_further_row_are_asked(shell: Shell, fleet: Served) -> None:
    use(shell, fleet)
    run(shell, "--out", "first")
    before = fleet.requests
    use(shell, fleet, rows=ROWS + 1)
    change_stage(shell, 1, {"map": CLAIM | {"prompt": "Say of {text}"}})
    stages = run(shell, "--from", "first", "--out", "new", "--yes")
    found = asked(stages)
    assert found["screen"] == (12, 1)
    assert found["claims"] == (0, 13)
    assert found["summary"][0] == 0  # it is about other claims
    assert fleet.requests == before + sum(one["requests"] for one in stages)


def test_levels_of_an_operator_are_taken_over_one_by_one(shell: Shell, fleet: Served) -> None:
    """With ``verify``, the questions about the claims are the same, and the judge's are new."""
    use(shell, fleet)
    run(shell, "--out", "first")
    change_stage(shell, 2, {"reduce": SUMMARIZE | {"verify": 5}})
    stages = run(shell, "--from", "first", "--out", "new", "--yes")
    levels = stages[2]["levels"]
    assert [one["requests"] for one in levels[:-1]] == [0] * (len(levels) - 1)
    assert (levels[-1]["kept"], levels[-1]["requests"]) == (0, 5)


def test_all_are_asked_again_on_request(shell: Shell, fleet: Served) -> None:
    use(shell, fleet)
    first = run(shell, "--out", "first")
    stages = run(shell, "--from", "first", "--out", "new", "--yes", "--ask-again", "all")
    requests = {one["stage"]: one["requests"] for one in first}
    assert asked(stages) == {name: (0, count) for name, count in requests.items()}


def test_another_choice_of_what_to_ask_again_needs_another_pipeline(
    shell: Shell, fleet: Served
) -> None:
    use(shell, fleet)
    run(shell, "--out", "first")
    run(shell, "--from", "first", "--out", "new", "--yes")
    before = fleet.requests
    command = ("run", "c.yaml", "--from", "first", "--out", "new")
    refused = shell(*command, "--ask-again", "all")
    assert (refused.code, "was begun without --ask-again" in refused.err) == (2, True)
    assert shell(*command).code == 0
    assert fleet.requests == before


def test_only_a_pipeline_without_prices_is_said_to_have_none(shell: Shell, fleet: Served) -> None:
    use(shell, fleet, model={"max_tokens": 400, "price": {"prompt": 1.0, "completion": 2.0}})
    run(shell, "--out", "first")
    run(shell, "--from", "first", "--out", "second", "--yes")
    for folder in ("first", "second"):
        assert "without a price" not in shell("cost", folder).err
    use(shell, fleet)
    run(shell, "--from", "first", "--out", "third", "--yes")
    assert "without a price" in shell("cost", "third").err


@pytest.mark.parametrize("gone", [False, True])
def test_a_later_session_needs_the_other_folder(
    shell: Shell, fleet: Served, gone: bool, caplog: pytest.LogCaptureFixture
) -> None:
    use(shell, fleet)
    run(shell, "--out", "first")
    before = fleet.requests
    use(shell, fleet, rows=ROWS + 2, budget={"requests": 1, "reserve_for_reduce": {}})
    run(shell, "--from", "first", "--out", "new", "--yes", code=4)
    shutil.move(shell.folder / "first", shell.folder / "moved")
    named = () if gone else ("--from", "moved")
    use(shell, fleet, rows=ROWS + 2, budget={"requests": 100})
    said = shell("run", "c.yaml", "--out", "new", *named, "--json")
    assert said.code == 0, said.err
    found = asked(json.loads(said.out)["stages"])
    assert [one.message.count("is no longer there") for one in caplog.records] == [1] * gone
    assert found["screen"] == (12, 2)
    assert found["claims"] == ((0, 14) if gone else (12, 2))
    assert fleet.requests == before + sum(requests for _, requests in found.values())


def test_what_is_refused(shell: Shell, fleet: Served) -> None:
    use(shell, fleet)
    run(shell, "--out", "first")
    only = shell("run", "c.yaml", "--from", "first", "--out", "new", "--only", "failed", *YES)
    assert (only.code, "--only is for a single task" in only.err) == (2, True)
    exists = shell("run", "c.yaml", "--from", "first", "--out", "first", *YES)
    assert (exists.code, "does not extend first" in exists.err) == (2, True)
    use(shell, None)
    mixed = shell("run", "c.yaml", "--from", "first", "--out", "new", *YES)
    assert mixed.code == 0  # the fleet of the first one is simulated too, and says so
    for part in ("", "stages/screen", "stages/claims", "stages/summary/levels/1"):
        set_real(shell.folder / "first" / part)
    mixed = shell("run", "c.yaml", "--from", "first", "--out", "other", *YES)
    assert (mixed.code, "a run cannot mix them" in mixed.err) == (2, True)
    shell.write(endpoints={"urls": list(fleet.urls)})
    single = shell("run", "c.yaml", "--from", "first", "--out", "new2", *YES)
    assert (single.code, "this is a pipeline of stages" in single.err) == (2, True)
    assert shell("run", "c.yaml", "--from", "new/stages/screen", "--out", "one", *YES).code == 0
    use(shell, fleet)
    pipeline = shell("run", "c.yaml", "--from", "one", "--out", "new3", *YES)
    assert (pipeline.code, "a run of a single task" in pipeline.err) == (2, True)
    assert not list(shell.folder.glob("new[23]"))


def set_real(folder: Path) -> None:
    path = folder / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"simulated": False}))


def test_a_lost_place_is_written_again(shell: Shell, fleet: Served) -> None:
    """It is not flushed to disk, so a power failure may leave an empty file."""
    use(shell, fleet)
    run(shell, "--out", "first")
    for file in (shell.folder / "first").glob("stages/*/stage.json"):
        file.write_bytes(b"")
    assert "a resumed pipeline writes it again" in shell("cost", "first").err
    assert shell("resume", "first").code == 0
    assert shell("cost", "first").code == 0
