"""Equal requests are paid once: in a run, over runs, over processes and after kill -9."""

from __future__ import annotations

import csv
import json
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from langchain_core.runnables import RunnableLambda

from fanfold.backends.simulated.faults import FaultRule
from fanfold.graphs import worker
from fanfold.tests.integration.runs.conftest import Lab, LabMaker

pytestmark = pytest.mark.integration

STREAMS = 16
THREADS: dict[str, Any] = {"kind": "executor", "factory": f"{__name__}:threads", "workers": 2}
FAST: dict[str, Any] = {"ttft_s": 0.0, "tpot_s": 0.0}


def threads() -> Executor:
    return ThreadPoolExecutor(2)


@pytest.fixture(autouse=True)
def _own_worker(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Each test has a worker of its own, closed at its end."""
    own = worker.Worker()
    monkeypatch.setattr(worker, "get_worker", lambda: own)
    yield
    own.close()


def repeat(lab: Lab, items: int, different: int) -> None:
    """Give the lab an input of so many items, of which so many are different."""
    lab.items = items
    with lab.input.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "x"])
        writer.writerows([f"i{n}", f"thing {n % different}"] for n in range(items))
    lab.config["limits"] |= {"hedge": False}


def requests(lab: Lab) -> int:
    return int(lab.fleet.stats()["totals"]["requests"])


def most_asked(lab: Lab) -> int:
    book = lab.fleet.stats(prompts=True)["prompts"]
    return max(int(question["asked"]) for question in book.values())


def table(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(folder / "results.parquet").to_pylist()
    return rows


@pytest.mark.parametrize("size", [20, 1], ids=["walked", "by the engine"])
async def test_a_run_asks_each_question_once(lab_of: LabMaker, size: int) -> None:
    async with lab_of() as lab:
        repeat(lab, 400 if size > 1 else 60, 100 if size > 1 else 20)
        lab.config |= {"shard": {"items": size}}
        aggregate = await lab.undisturbed()
        lab.config["cache"] = "run"
        result = await lab.live(await lab.begin())
        different = lab.items // 4 if size > 1 else 20
        assert requests(lab) == result.progress["requests"] == different
        assert result.progress["reused"] == lab.items - different
        assert result.aggregate == aggregate
        rows = table(lab.out)
        assert [row["id"] for row in rows] == [f"i{n}" for n in range(lab.items)]
        free = [row for row in rows if row["reused"]]
        assert len(free) == lab.items - different
        assert {(r["attempts"], r["prompt_tokens"], r["completion_tokens"]) for r in free} == {
            (0, 0, 0)
        }
        assert {row["model"] for row in rows} == {"simulated-8b"}
        assert {row["attempts"] for row in rows if not row["reused"]} == {1}


async def test_a_second_run_asks_nothing(lab_of: LabMaker) -> None:
    async with lab_of(**FAST) as lab:
        repeat(lab, 120, 120)
        lab.config["cache"] = str(lab.home / "answers")
        first = await lab.live(await lab.begin())
        assert requests(lab) == 120
        lab.config["task"] = lab.config["task"] | {"repairs": 0}  # another run, the same questions
        second = await lab.live(await lab.begin(lab.home / "second"))
        assert requests(lab) == 120
        assert (second.progress["requests"], second.progress["reused"]) == (0, 120)
        assert set(second.progress["tokens"].values()) == {0}
        assert second.progress["usd"] is None  # nothing has a price
        assert second.aggregate == first.aggregate
        lab.config["model"] = {"seed": 7}
        third = await lab.live(await lab.begin(lab.home / "third"))
        assert (third.progress["reused"], requests(lab)) == (0, 240)


async def test_a_budget_is_spent_on_new_questions_only(lab_of: LabMaker) -> None:
    """The last question is asked as long as there is room for a repair of it."""
    async with lab_of(**FAST) as lab:
        repeat(lab, 120, 30)
        lab.config |= {"cache": "run", "budget": {"requests": 31, "on_limit": "stop"}}
        result = await lab.live(await lab.begin())
        assert (result.exit_code, result.progress["done"], requests(lab)) == (0, 120, 30)


async def test_failures_are_never_given_to_others(lab_of: LabMaker) -> None:
    """Bad answers are asked for again: by each item of this run, and by the next run."""
    async with lab_of(**FAST) as lab:
        repeat(lab, 60, 20)
        lab.config["cache"] = str(lab.home / "answers")
        lab.config["task"] = lab.config["task"] | {"repairs": 0}
        lab.fleet.add_fault(FaultRule("bad_schema", p=1.0))
        result = await lab.live(await lab.begin())
        assert (result.progress["failed"], result.progress["reused"]) == (60, 0)
        assert requests(lab) == 60
        lab.fleet.reset()
        result = await lab.live(await lab.begin(lab.home / "second"))
        assert (result.progress["done"], requests(lab)) == (60, 20)


async def test_killed_runs_leave_their_answers_to_others(lab_of: LabMaker) -> None:
    """In the middle, by kill -9: only what was in flight is asked again."""
    async with lab_of() as lab:
        repeat(lab, 200, 200)
        aggregate = await lab.undisturbed()
        lab.config["cache"] = str(lab.home / "answers")
        await lab.killed_at(80)
        result = await lab.live(await lab.begin(lab.home / "second"))
        assert result.aggregate == aggregate
        assert 80 <= result.progress["reused"] <= 120
        assert requests(lab) <= 200 + STREAMS
        assert most_asked(lab) <= 2


async def test_a_resumed_run_knows_what_it_asked(lab_of: LabMaker) -> None:
    """Answers of a run's first session serve equal items of its second."""
    async with lab_of() as lab:
        repeat(lab, 300, 60)
        aggregate = await lab.undisturbed()
        lab.config["cache"] = "run"
        lab.config["shard"] = {"items": 60}
        await lab.killed_at(40)
        result = await lab.live()
        assert result.aggregate == aggregate
        assert requests(lab) <= 60 + STREAMS
        assert sum(row["attempts"] for row in table(lab.out)) <= 60 + STREAMS


async def test_worker_processes_ask_each_question_once(lab_of: LabMaker) -> None:
    """Also when two of them want the same answer at the same time."""
    async with lab_of() as lab:
        repeat(lab, 240, 40)
        lab.config |= {"cache": "run", "backend": {"kind": "local", "processes": 2}}
        async with lab.process() as process:
            said, _ = await process.communicate()
            assert process.returncode == 0
        told = json.loads(said)
        assert (told["done"], told["requests"], told["reused"]) == (240, 40, 200)
        assert requests(lab) == 40
        assert (lab.out / "answers" / "simulated-v1").is_dir()


async def test_two_runs_at_a_time_share_a_folder(lab_of: LabMaker) -> None:
    async with lab_of() as lab:
        repeat(lab, 100, 100)
        lab.config["cache"] = str(lab.home / "answers")
        async with lab.process() as process:
            await lab.until(lambda: requests(lab))
            here = await lab.live(await lab.begin(lab.home / "second"))
            said, _ = await process.communicate()
        there = json.loads(said)
        assert here.progress["done"] == there["done"] == 100
        assert here.progress["requests"] + there["requests"] == requests(lab) == 100
        assert here.aggregate == there["aggregate"]


async def test_workers_without_the_folder_keep_their_own(lab_of: LabMaker) -> None:
    async with lab_of(**FAST) as lab:
        repeat(lab, 200, 50)
        lab.config |= {"cache": "run", "backend": THREADS | {"shared_folder": False}}
        result = await lab.live(await lab.begin())
        assert requests(lab) == result.progress["requests"] == 50
        assert result.progress["reused"] == 150
        assert not (lab.out / "answers").exists()


def twice(model: Any) -> Any:
    """Ask about the item, then about the answer; as an agent of a user's own would."""

    async def ask(state: dict[str, Any]) -> dict[str, Any]:
        first = await model.ainvoke(state["messages"])
        second = await model.ainvoke([*state["messages"], first, ("user", "Again.")])
        return {"output": json.loads(second.text)}

    return RunnableLambda(ask)


async def test_a_graph_of_one_s_own_shares_its_calls(lab_of: LabMaker) -> None:
    async with lab_of(**FAST) as lab:
        repeat(lab, 80, 20)
        lab.config["task"] = lab.config["task"] | {"graph": f"{__name__}:twice"}
        lab.config["cache"] = str(lab.home / "answers")
        result = await lab.live(await lab.begin())
        assert requests(lab) == result.progress["requests"] == 40
        assert result.progress["reused"] == 2 * 80 - 40
        assert {row["reused"] + row["attempts"] for row in table(lab.out)} == {2}


async def test_a_damaged_answer_is_paid_again(lab_of: LabMaker) -> None:
    async with lab_of(**FAST) as lab:
        repeat(lab, 40, 40)
        lab.config["cache"] = str(lab.home / "answers")
        aggregate = (await lab.live(await lab.begin())).aggregate
        (file,) = (lab.home / "answers" / "simulated-v1").glob("*.jsonl")
        lines = file.read_bytes().splitlines(keepends=True)
        lines[7] = lines[7].replace(b'"score', b'"SCORE', 1).replace(b'\\"score', b'\\"SCORE', 1)
        lines[9] = bytes(len(lines[9]) - 1) + b"\n"
        file.write_bytes(b"".join(lines) + b'{"key":"half')
        again = await lab.live(await lab.begin(lab.home / "second"))
        assert (again.progress["reused"], again.progress["requests"]) == (38, 2)
        assert again.aggregate == aggregate
