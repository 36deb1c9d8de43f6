"""A graph whose budget is exhausted pauses, and resumes with an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.types import Command

from fanfold import build_graph
from fanfold.backends.core.errors import BudgetExhaustedError
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.tests.integration.test_map_reduce import rows, settings

pytestmark = pytest.mark.integration


@pytest.fixture(autouse=True)
def _in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


THREAD: RunnableConfig = {"configurable": {"thread_id": "t"}}


def paid(fleet: SimulatedFleet) -> int:
    nodes = fleet.stats()["nodes"]
    return sum(node["prompt_tokens"] + node["completion_tokens"] for node in nodes)


def limited(fleet: SimulatedFleet, **budget: Any) -> dict[str, Any]:
    small = {"model": {"max_tokens": 64}, "limits": {"streams": 4}, "shard": {"items": 10}}
    return settings(fleet, budget=budget, **small)


async def test_a_pause_is_an_interrupt_that_is_answered_in_several_steps(
    simulated: SimulatedFleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wrong answer is asked again, a low one pauses again; the end is as without a pause."""
    monkeypatch.setattr("fanfold.graphs.run.shard_plan._WINDOW", 3)
    whole = await build_graph(limited(simulated)).ainvoke({"items": rows(80)})
    cost, requests = paid(simulated), simulated.stats()["totals"]["requests"]
    simulated.reset()
    cap = cost // 2
    bound = limited(simulated, tokens=cap)
    graph = build_graph(bound, checkpointer=InMemorySaver(), trust_context=True)
    state = await graph.ainvoke({"items": rows(80)}, THREAD)
    (pause,) = state["__interrupt__"]
    assert pause.value["question"].startswith("the budget is exhausted: ")
    assert pause.value["budget"]["tokens"]["cap"] == cap
    assert 0 < pause.value["items"]["open"] < 80
    assert paid(simulated) <= cap
    spent = paid(simulated)
    state = await graph.ainvoke(Command(resume="more!"), THREAD)
    assert "answer with new totals" in state["__interrupt__"][0].value["problem"]
    state = await graph.ainvoke(Command(resume={"tokens": cap - 1}), THREAD)
    assert state["__interrupt__"]
    assert paid(simulated) == spent
    more = (cost + cap) // 2
    state = await graph.ainvoke(Command(resume={"tokens": more}), THREAD)
    assert state["__interrupt__"]
    assert spent < paid(simulated) <= more
    end = await graph.ainvoke(Command(resume={"tokens": 10 * cost}), THREAD)
    assert end["aggregate"] == whole["aggregate"]
    assert simulated.stats()["totals"]["requests"] == requests
    assert paid(simulated) == cost


async def test_a_budget_may_stop_rather_than_ask(simulated: SimulatedFleet) -> None:
    config = limited(simulated, requests=10, on_limit="stop")
    config["task"]["repairs"] = 0
    with pytest.raises(BudgetExhaustedError, match="10 requests are spent of 10 requests"):
        await build_graph(config).ainvoke({"items": rows(80)})
    assert simulated.stats()["totals"]["requests"] == 10
