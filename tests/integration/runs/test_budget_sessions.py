"""A budget limits the run, not the process: kill -9, resume, no token above the cap."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from fanfold.backends.budget.spend_log import SpendLogs
from fanfold.backends.core.errors import EXIT_BUDGET
from fanfold.backends.storage.run_folder import open_folder
from fanfold.tests.integration.runs.conftest import Lab, LabMaker
from fanfold.tests.support.command_server import DEADLINE_S

pytestmark = pytest.mark.integration

HERE: dict[str, Any] = {"kind": "local"}
PARSL: dict[str, Any] = {"kind": "parsl", "workers": 2}
MOST = 48
"""``max_tokens`` of an answer; what an item takes is found out by an undisturbed run."""


def paid(lab: Lab) -> int:
    """Return the tokens of all answers that the fleet has sent, by its own counts."""
    nodes = lab.fleet.stats()["nodes"]
    return sum(node["prompt_tokens"] + node["completion_tokens"] for node in nodes)


def said(lab: Lab) -> int:
    """Return what counts as spent when the run is resumed now."""
    folder = open_folder(lab.out)
    return SpendLogs(folder.budget, folder.read_provenance()["run"]).total_spent({}).tokens


async def told_status(lab: Lab) -> dict[str, Any]:
    """Return what ``fanfold status`` reports."""
    async with lab.process("status", str(lab.out), "--json") as process:
        told, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
    found: dict[str, Any] = json.loads(told)
    return found


def plain(lab: Lab) -> None:
    """Let each item take one request."""
    lab.config["limits"] |= {"hedge": False, "streams": 4}
    lab.config["model"] = {"max_tokens": MOST}
    lab.config["task"] = lab.config["task"] | {"repairs": 0}


async def budgeted(lab: Lab, backend: dict[str, Any], share: float) -> tuple[Any, int]:
    """Return the undisturbed aggregate, and a cap of a share of what the whole run takes."""
    plain(lab)
    result = await lab.live(await lab.begin(lab.home / "undisturbed"))
    aggregate, whole = result.aggregate, paid(lab)
    lab.fleet.reset()
    cap = int(share * whole)
    lab.config |= {"backend": backend, "budget": {"tokens": cap}}
    return aggregate, cap


@pytest.mark.parametrize(
    "backend",
    [pytest.param(HERE, id="here"), pytest.param(PARSL, id="parsl", marks=pytest.mark.long)],
)
async def test_a_killed_run_stays_below_its_cap(lab_of: LabMaker, backend: dict[str, Any]) -> None:
    """Then it is exhausted; then it is allowed more, and ends."""
    async with lab_of(items=120, ttft_s=0.02) as lab:
        aggregate, cap = await budgeted(lab, backend, share=0.8)
        await lab.killed_at(40)
        assert paid(lab) <= said(lab) <= cap
        result = await lab.live()
        assert result.exit_code == EXIT_BUDGET
        assert paid(lab) <= cap  # what was in flight at the kill counts as spent
        assert result.cost is not None
        status = await told_status(lab)
        need = status["total_to_finish"]["tokens"]
        assert f"finishing requires about {need:,} tokens in total" in (result.reason or "")
        doubt = result.cost.unaccounted.tokens
        assert doubt > 0
        ended = status["done"] + status["failed"]
        assert need == pytest.approx(doubt + result.cost.usage.tokens * 120 / ended, abs=1)
        result = await lab.live(overrides=("budget.tokens=1000000",))
        assert result.exit_code == 0
        lab.assert_whole(aggregate, again=10**9)


async def test_without_a_crash_a_budget_is_used_up_to_the_last_item(lab_of: LabMaker) -> None:
    async with lab_of(items=300) as lab:
        _, cap = await budgeted(lab, HERE, share=0.6)
        result = await lab.live(await lab.begin())
        assert result.exit_code == EXIT_BUDGET
        assert result.reason is not None
        assert "the budget is exhausted" in result.reason
        assert 0.98 * cap - 1000 < paid(lab) <= cap
        assert said(lab) == (before := paid(lab))  # settled to the token
        async with lab.process("resume", str(lab.out), "--json") as process:
            told, _ = await asyncio.wait_for(process.communicate(), DEADLINE_S)
        assert (process.returncode, json.loads(told)["exit_code"]) == (EXIT_BUDGET, EXIT_BUDGET)
        assert paid(lab) == before


@pytest.mark.parametrize("limit", [{"requests": 57}, {"usd": 0.003}], ids=["requests", "usd"])
async def test_requests_and_dollars_are_limited_alike(
    lab_of: LabMaker, limit: dict[str, Any]
) -> None:
    async with lab_of(items=200) as lab:
        plain(lab)
        lab.config["model"]["price"] = {"prompt": 0.5, "completion": 1.0}
        lab.config["budget"] = limit | {"on_limit": "stop"}
        result = await lab.live(await lab.begin())
        assert result.exit_code == EXIT_BUDGET
        nodes = lab.fleet.stats()["nodes"]
        requests = sum(node["requests"] for node in nodes)
        dollars = sum(0.5 * n["prompt_tokens"] + n["completion_tokens"] for n in nodes) / 1e6
        assert requests <= limit.get("requests", 10**9)
        assert dollars <= limit.get("usd", 10**9)
        assert result.progress["usd"] == pytest.approx(dollars, rel=1e-6)
        if "requests" in limit:
            assert requests == 56 or requests == 57  # noqa: PLR1714 - an item may take two


async def test_node_hours_end_a_run(lab_of: LabMaker) -> None:
    """One host for a second or so, of which the drain's time is put aside."""
    async with lab_of(items=400, ttft_s=0.3) as lab:
        plain(lab)
        lab.config["limits"] |= {"drain_s": 1.0, "streams": 8}
        lab.config["model"]["price"] = {"node_hour": 3600.0}
        lab.config["budget"] = {"node_hours": 4 / 3600}
        result = await lab.live(await lab.begin())
        assert result.exit_code == EXIT_BUDGET
        assert 0 < result.progress["done"] < 400
        folder = open_folder(lab.out)
        spent = SpendLogs(folder.budget, folder.read_provenance()["run"]).total_spent({})
        assert 1000 < spent.node_ms <= 4000
        assert spent.nano_usd == pytest.approx(spent.node_ms * 10**6, rel=0.01)
