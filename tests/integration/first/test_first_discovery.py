"""Runs over the FIRST gateway with nothing configured but the model's name."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fanfold import build_graph
from fanfold.backends.budget.spend_log import SpendLogs
from fanfold.backends.core.errors import ConfigurationError, RunStoppedError
from fanfold.backends.core.types import Usage
from fanfold.backends.discovery.connect import (
    choice_logger,
    open_fleet,
    open_ready_endpoints,
)
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import ModelParams
from fanfold.backends.storage.run_folder import RunFolder, get_run_ids
from fanfold.configs.loader import load_config
from fanfold.tests.support.command_server import DEADLINE_S, Command, get_command_server
from fanfold.tests.support.first_gateway import (
    DeploymentSpec,
    FirstGateway,
    GatewaySpec,
    make_spec,
    run_gateway_process,
)

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("home")]

SOPHIA = DeploymentSpec("sophia", "vllm", "openai/gpt-oss-120b", context_window=8_000)
METIS = DeploymentSpec("metis", "api", "gpt-oss-120b", kind="direct")
OTHER = DeploymentSpec("sophia", "vllm", "meta/Llama-3")
MINERVA = DeploymentSpec("minerva", "api", "m", kind="direct", replicas=8, affine=True)


def settings(gateway: str, model: str = "gpt-oss-120b", **first: Any) -> dict[str, Any]:
    quick: dict[str, Any] = {"base_url": gateway, "requests_per_s": 500, "poll_s": 0.2}
    return {
        "task": {"prompt": "Say {text}"},
        "endpoints": {"first": quick | first},
        "model": {"name": model, "max_tokens": 100},
    }


async def run(given: dict[str, Any], count: int = 40) -> dict[str, Any]:
    items = [{"text": f"word {n}"} for n in range(count)]
    end: dict[str, Any] = await build_graph(given).ainvoke({"items": items})
    assert (end["progress"]["done"], end["progress"]["failed"]) == (count, 0)
    return end


def chats(gateway: FirstGateway, path: str) -> int:
    return gateway.count(f"{path}/v1/chat/completions", 200)


async def test_the_models_name_is_enough(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=choice_logger.name)
    async with FirstGateway(make_spec(OTHER, SOPHIA, METIS)) as gateway:
        monkeypatch.setenv("inference_base_url", gateway.url)
        given = settings(gateway.url)
        given["endpoints"] = {"first": {"requests_per_s": 500}}
        end = await run(given)
        assert chats(gateway, "sophia/vllm")
        assert chats(gateway, "metis/api")
        assert {c.model for c in gateway.calls if c.tokens} == {SOPHIA.model, METIS.model}
        assert "sophia/vllm (running) as openai/gpt-oss-120b, metis/api (running)" in caplog.text
        kept = Path(end["results"]["folder"], "run.yaml").read_text()
        assert "good" not in kept


@pytest.mark.parametrize("name", ["openai/gpt-oss-120b", "GPT-OSS-120B", "other/gpt-oss-120b"])
async def test_names_are_matched_leniently(name: str) -> None:
    async with FirstGateway(make_spec(SOPHIA, METIS)) as gateway:
        await run(settings(gateway.url, name))
        assert chats(gateway, "sophia/vllm")
        assert chats(gateway, "metis/api")


async def test_a_name_that_fits_two_models_of_one_cluster_is_not_guessed() -> None:
    twins = [DeploymentSpec(model="a/m"), DeploymentSpec(model="b/m")]
    async with FirstGateway(make_spec(*twins)) as gateway:
        with pytest.raises(ConfigurationError, match="served: a/m, b/m"):
            await run(settings(gateway.url, "m"))
        await run(settings(gateway.url, "b/m"))
        assert {c.model for c in gateway.calls if c.tokens} == {"b/m"}


async def test_a_model_that_nobody_serves() -> None:
    async with FirstGateway(make_spec(SOPHIA)) as gateway:
        with pytest.raises(ConfigurationError, match=r"served: openai/gpt-oss-120b"):
            await run(settings(gateway.url, "none"))


async def test_a_model_that_runs_is_used_and_one_that_does_not_is_not_started() -> None:
    cold = DeploymentSpec("metis", "api", "gpt-oss-120b", state="cold")
    async with FirstGateway(make_spec(cold, SOPHIA)) as gateway:
        await run(settings(gateway.url))
        assert chats(gateway, "sophia/vllm")
        assert gateway.count("metis/api/v1/chat/completions") == 0


async def test_a_cluster_under_maintenance_is_passed_over() -> None:
    async with FirstGateway(make_spec(SOPHIA, METIS, maintenance=("sophia",))) as gateway:
        await run(settings(gateway.url))
        assert chats(gateway, "metis/api") == 40
        with pytest.raises(
            ConfigurationError, match=r"under maintenance: sophia|sophia is under maintenance"
        ):
            await run(settings(gateway.url, paths=["sophia/vllm"]))


async def test_another_cluster_answers_when_one_goes_down() -> None:
    async with FirstGateway(make_spec(SOPHIA, METIS, answer_s=0.02)) as gateway:
        running = asyncio.create_task(run(settings(gateway.url), 300))
        while not chats(gateway, "sophia/vllm"):  # noqa: ASYNC110 - a run has no event for it
            await asyncio.sleep(0.01)
        gateway.set_state("sophia/vllm/openai/gpt-oss-120b", "offline")
        await running
        assert chats(gateway, "metis/api")


async def test_the_gateways_own_throttle_does_not_end_the_search() -> None:
    spec = GatewaySpec(deployments=(SOPHIA, METIS), requests_per_s=2)
    async with FirstGateway(spec) as gateway:
        loaded = load_config(settings(gateway.url))
        async with open_ready_endpoints(loaded.config, {}) as ready:
            assert [spec.label for spec in ready.specs] == ["sophia/vllm", "metis/api"]
        assert gateway.refusals["throttle"]


async def test_the_successor_is_recognised() -> None:
    async with FirstGateway(make_spec(successor=True)) as gateway:
        with pytest.raises(ConfigurationError, match="successor of the FIRST gateway"):
            await run(settings(gateway.url))


async def test_something_else_at_the_address() -> None:
    async with FirstGateway(make_spec(SOPHIA)) as gateway:
        with pytest.raises(ConfigurationError, match=r"HTTP 404.*check base_url"):
            await run(settings(f"{gateway.url}/wrong"))
    with pytest.raises(ConfigurationError, match="cannot connect"):
        await run(settings("http://127.0.0.1:9"))


async def test_the_command_shows_states_limits_and_contexts() -> None:
    cold = DeploymentSpec("metis", "api", "gpt-oss-120b", state="cold", details=False)
    async with run_gateway_process(make_spec(SOPHIA, cold, OTHER)) as process:
        given = settings(process.url)
        Path("c.yaml").write_text(json.dumps(given))
        done = await get_command_server().run(Command(("endpoints", "c.yaml")))
    assert done.returncode == 0, done.stderr
    shown = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines() if line}
    assert shown["sophia/vllm"] == [SOPHIA.model, "running", "8,000", "60,000", "100,000"]
    assert shown["metis/api"] == ["gpt-oss-120b", "not", "running", "-", "-", "-"]
    assert "Llama" not in done.stdout
    assert "good" not in done.stdout + done.stderr


COLD = DeploymentSpec("sophia", "vllm", "gpt-oss-120b", state="cold")


async def test_one_request_wakes_a_cold_model_and_the_others_wait(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The start takes longer than the fleet waits for servers, and longer than a task lasts."""
    spec = make_spec(COLD, cold_start_s=3.0, queue_s=1.0, compute_timeout_s=1.0, jobs_cache_s=0.2)
    async with FirstGateway(spec) as gateway:
        given = settings(gateway.url)
        given["limits"] = {"fleet_wait_s": 0.5}
        await run(given)
        early = [c for c in gateway.calls if "chat" in c.path and c.at < 2.5]
        assert [c.status for c in early] == [408]
        assert gateway.refusals == {"request_timeout": 1}
        assert gateway.deployments["sophia/vllm/gpt-oss-120b"].triggers == 1
        polls = [c.at for c in gateway.calls if c.path.endswith("/jobs")]
        assert min(b - a for a, b in itertools.pairwise(polls)) > 0.15
        texts = [record.getMessage() for record in caplog.records]
        waits = [text for text in texts if "gpt-oss-120b on sophia/vllm to start" in text]
        assert any("(queued)" in text for text in waits)
        assert any("(starting)" in text for text in waits)
        assert len({text.split(" for ")[0] for text in waits}) == 1  # since one time
        assert not any("no endpoint is alive" in text for text in texts)


async def ask(fleet: Fleet, text: str) -> str:
    client = FleetClient(fleet, ModelParams("gpt-oss-120b", max_tokens=8))
    return (await client.ask([{"role": "user", "content": text}])).content


async def test_progress_says_what_is_waited_for() -> None:
    spec = make_spec(COLD, cold_start_s=2.0, jobs_cache_s=0.0)
    async with FirstGateway(spec) as gateway:
        loaded = load_config(settings(gateway.url))
        async with (
            open_ready_endpoints(loaded.config, {}) as ready,
            open_fleet(loaded.config, ready) as fleet,
        ):
            waiting = asyncio.create_task(ask(fleet, "Hello"))
            async with asyncio.timeout(DEADLINE_S):
                while fleet.health().paused is None:  # noqa: ASYNC110 - it has no event
                    await asyncio.sleep(0.01)
            paused = fleet.health().paused or ""
            assert "waiting since" in paused
            assert "for gpt-oss-120b on sophia/vllm to start" in paused
            assert [report.state for report in fleet.report()] == ["standby"]
            assert await waiting
            assert fleet.health().paused is None


async def test_a_model_that_stops_during_a_run_is_started_again() -> None:
    hot = DeploymentSpec("sophia", "vllm", "gpt-oss-120b")
    spec = make_spec(hot, cold_start_s=1.0, jobs_cache_s=0.0, answer_s=0.02)
    async with FirstGateway(spec) as gateway:
        running = asyncio.create_task(run(settings(gateway.url), 400))
        while not chats(gateway, "sophia/vllm"):  # noqa: ASYNC110 - a run has no event for it
            await asyncio.sleep(0.01)
        deployment = gateway.deployments["sophia/vllm/gpt-oss-120b"]
        gateway.set_state("sophia/vllm/gpt-oss-120b", "cold")
        await running
        assert deployment.triggers == 1


async def test_a_model_that_starts_elsewhere_joins_the_run() -> None:
    other = DeploymentSpec("metis", "api", "gpt-oss-120b", state="cold")
    spec = make_spec(SOPHIA, other, jobs_cache_s=0.0, answer_s=0.05)
    async with FirstGateway(spec) as gateway:
        given = settings(gateway.url, requests_per_s=60)
        running = asyncio.create_task(run(given, 200))
        while not chats(gateway, "sophia/vllm"):  # noqa: ASYNC110 - a run has no event for it
            await asyncio.sleep(0.01)
        gateway.set_state("metis/api/gpt-oss-120b", "running")
        await running
        assert chats(gateway, "metis/api")
        assert gateway.deployments["metis/api/gpt-oss-120b"].triggers == 0


async def test_a_model_that_cannot_start_leaves_it_to_the_next() -> None:
    dark = DeploymentSpec("metis", "api", "gpt-oss-120b", kind="direct", state="not_live")
    spec = make_spec(dark, COLD, cold_start_s=0.5, jobs_cache_s=0.0)
    async with FirstGateway(spec) as gateway:
        await run(settings(gateway.url))
        assert chats(gateway, "sophia/vllm") >= 40
        assert gateway.deployments["sophia/vllm/gpt-oss-120b"].triggers == 1


async def test_a_start_that_takes_too_long_stops_the_run() -> None:
    spec = make_spec(COLD, cold_start_s=600.0, compute_timeout_s=0.2, jobs_cache_s=0.0)
    async with FirstGateway(spec) as gateway:
        with pytest.raises(RunStoppedError) as error:
            await run(settings(gateway.url, start_wait_s=1.0))
        assert "endpoints.first.start_wait_s" in error.value.message
        assert "the task took too long" in error.value.message


@pytest.mark.parametrize("count", [1, 4])
async def test_a_run_keeps_to_its_sessions(count: int) -> None:
    async with FirstGateway(make_spec(MINERVA)) as gateway:
        first = await run(settings(gateway.url, "m", sessions=count))
        assert first
        sessions = {c.session for c in gateway.calls if c.tokens}
        assert len(sessions) == count
        for session in sessions:
            assert session is not None
            assert session.startswith("ff-")
            assert len(bytes.fromhex(session[3:])) == 4
        await run(settings(gateway.url, "m", sessions=count))
        again = {c.session for c in gateway.calls if c.tokens}
        assert len(again) == 2 * count  # another run has others


async def test_the_request_that_starts_a_model_counts() -> None:
    """In the window of its tokens, as use without an item, and for the budget."""
    cold = replace(SOPHIA, state="cold")
    spec = make_spec(cold, cold_start_s=0.3, jobs_cache_s=0.0)
    async with FirstGateway(spec) as gateway:
        given = settings(gateway.url, tokens_per_min=1000.0)
        used = list[Usage]()
        async with (
            open_ready_endpoints(load_config(given).config, {}) as ready,
            open_fleet(load_config(given).config, ready) as fleet,
        ):
            with fleet.count_probes(used.append):
                await fleet.wait_alive()
            (endpoint,) = fleet.endpoints
            (tokens,) = [call.tokens for call in gateway.calls if call.tokens]
            assert [usage.tokens for usage in used] == [tokens]
            stats = endpoint.stats
            assert stats.lost_prompt_tokens + stats.lost_completion_tokens == tokens
            assert endpoint.quota is not None
            assert endpoint.quota.reserve(1001 - tokens) > 0.0
            assert endpoint.quota.reserve(1000 - tokens) == 0.0


async def test_the_start_of_a_model_is_paid_from_the_budget() -> None:
    cold = replace(SOPHIA, state="cold")
    async with FirstGateway(make_spec(cold, cold_start_s=0.3, jobs_cache_s=0.0)) as gateway:
        given = settings(gateway.url) | {"budget": {"tokens": 1_000_000}}
        end = await run(given, 5)
        folder = RunFolder(Path(end["results"]["folder"]))
        logs = SpendLogs(folder.budget, get_run_ids(folder.read_provenance()))
        assert len([call for call in gateway.calls if call.tokens]) == 6
        assert logs.total_spent({}).tokens == sum(call.tokens or 0 for call in gateway.calls)
