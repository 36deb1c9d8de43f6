"""Runs with remote workers over the FIRST gateway, which runs as a process."""

from __future__ import annotations

import asyncio
import logging
from bisect import bisect_left
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from fanfold import build_graph
from fanfold.backends.core.errors import RunStoppedError
from fanfold.tests.support.first_gateway import DeploymentSpec, make_spec, run_gateway_process

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("home")]

COLD = DeploymentSpec("sophia", "vllm", "openai/gpt-oss-120b", state="cold")
HOT = DeploymentSpec("sophia", "vllm", "openai/gpt-oss-120b")
OTHER = DeploymentSpec("metis", "api", "gpt-oss-120b", kind="direct", state="cold")
BACKENDS: dict[str, dict[str, Any]] = {
    "local": {"kind": "local", "processes": 2},
    "parsl": {"kind": "parsl", "workers": 2},
}


def settings(gateway: str, backend: str = "local", **first: Any) -> dict[str, Any]:
    quick: dict[str, Any] = {"base_url": gateway, "requests_per_s": 100, "poll_s": 0.5}
    return {
        "task": {"prompt": "Say {text}"},
        "endpoints": {"first": quick | first},
        "model": {"name": "gpt-oss-120b", "max_tokens": 40},
        "backend": BACKENDS[backend],
        "shard": {"items": 20},
        "cache": "off",
        "limits": {"hedge": False},
    }


async def run(given: dict[str, Any], count: int) -> Path:
    items = [{"text": f"word {n}"} for n in range(count)]
    end = await build_graph(given).ainvoke({"items": items})
    assert (end["progress"]["done"], end["progress"]["failed"]) == (count, 0)
    return Path(end["results"]["folder"])


def chats(stats: dict[str, Any], status: int | None = None) -> list[dict[str, Any]]:
    return [
        call
        for call in stats["calls"]
        if call["path"].endswith("/chat/completions") and status in {None, call["status"]}
    ]


@pytest.mark.parametrize("backend", BACKENDS)
async def test_a_cold_model_is_started_once_for_all_workers(
    backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    # the list of jobs is too old for workers to learn from it that the model runs
    spec = make_spec(COLD, OTHER, cold_start_s=3.0, queue_s=1.0, jobs_cache_s=600.0)
    async with run_gateway_process(spec) as process:
        folder = await run(settings(process.url, backend), 60)
        stats = await process.stats()
    states = {key: one["triggers"] for key, one in stats["deployments"].items()}
    assert states == {"sophia/vllm/openai/gpt-oss-120b": 1, "metis/api/gpt-oss-120b": 0}
    answered = chats(stats, 200)
    assert len(answered) == 61  # each item once, after the request that started the model
    assert sorted(call["at"] for call in chats(stats))[1] >= 3.0
    assert "waiting since" in caplog.text
    sessions = {call["session"] for call in answered}
    assert len(sessions) == 1
    assert not any(p.read_bytes().count(b"good") for p in folder.rglob("*") if p.is_file())


async def test_workers_do_not_ask_the_gateway_what_the_coordinator_knows() -> None:
    async with run_gateway_process(make_spec(HOT, OTHER)) as process:
        await run(settings(process.url), 200)
        stats = await process.stats()
    asked = Counter(call["path"].removeprefix("/resource_server/") for call in stats["calls"])
    assert [asked[route] for route in ("status", "list-endpoints", "sophia/models")] == [1, 1, 1]
    assert {call["model"] for call in chats(stats)} == {HOT.model}
    assert len(chats(stats)) == 200


def check_rate(stats: dict[str, Any], requests_per_s: float, span_s: float = 5.0) -> None:
    """Check the rate over spans in which the pauses of a busy machine do not matter."""
    times = sorted(call["at"] for call in chats(stats))
    most = max(bisect_left(times, at + span_s) - n for n, at in enumerate(times))
    assert most <= 1.25 * span_s * requests_per_s


async def test_limits_hold_over_all_workers() -> None:
    spec = make_spec(HOT, tokens_per_min_user=3_000, window_s=2.0, output_tokens=(30, 40))
    async with run_gateway_process(spec) as process:
        given = settings(process.url, requests_per_s=16, tokens_per_min=3_000, window_s=2.0)
        await run(given, 150)
        stats = await process.stats()
    assert len(chats(stats, 200)) == 150
    assert stats["refusals"] == {}
    (windows,) = stats["windows"].values()
    assert all(window["tokens"] <= 3_000 for window in windows)
    check_rate(stats, 16)


async def test_a_start_that_takes_too_long_stops_the_run_before_workers_start() -> None:
    spec = make_spec(COLD, cold_start_s=600.0, compute_timeout_s=0.2, jobs_cache_s=0.0)
    async with run_gateway_process(spec) as process:
        with pytest.raises(RunStoppedError, match="start_wait_s"):
            await run(settings(process.url, start_wait_s=1.0), 40)
        stats = await process.stats()
    assert len(chats(stats)) == 1


async def test_a_model_that_stops_is_started_and_followed_once_for_all_workers() -> None:
    """Only the coordinator asks for the list of jobs; workers stop sending when they know."""
    start_s = 4.0
    spec = make_spec(
        HOT, cold_start_s=start_s, compute_timeout_s=0.2, jobs_cache_s=0.2, answer_s=0.05
    )
    async with run_gateway_process(spec) as process:
        running = asyncio.create_task(run(settings(process.url, window_s=2.0), 500))
        while len(chats(await process.stats(), 200)) < 50:  # noqa: ASYNC110 - another process
            await asyncio.sleep(0.1)
        await process.change(states={f"sophia/vllm/{HOT.model}": "not running"})
        stopped_at = (await process.stats())["now"]
        await running
        stats = await process.stats()
    assert stats["deployments"][f"sophia/vllm/{HOT.model}"]["triggers"] == 1
    late = [call for call in chats(stats) if call["at"] > stopped_at + 2.0]
    refused = sum(call["status"] != 200 for call in late)
    assert refused <= 40  # the first requests of a worker that begins meanwhile: two shards
    waited = min(call["at"] for call in late if call["status"] == 200) - stopped_at
    assert waited >= start_s - 0.5
    polls = [c for c in stats["calls"] if c["path"].endswith("/jobs") and c["at"] > stopped_at]
    assert len(polls) <= waited / 0.5 + 4  # each worker would double it
    assert len(chats(stats, 200)) == 500


async def test_workers_use_the_gateway_that_auto_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    """They search neither for endpoints nor for deployments."""
    monkeypatch.setenv("OLLAMA_HOST", "127.0.0.1:9")
    monkeypatch.setattr("fanfold.backends.discovery.auto.PORTS", (9,))
    async with run_gateway_process(make_spec(HOT, OTHER)) as process:
        monkeypatch.setenv("inference_base_url", process.url)
        given = settings(process.url) | {"endpoints": "auto"}
        folder = await run(given, 100)
        stats = await process.stats()
    asked = Counter(call["path"].removeprefix("/resource_server/") for call in stats["calls"])
    assert [asked[route] for route in ("status", "list-endpoints", "sophia/models")] == [1, 1, 1]
    assert len(chats(stats, 200)) == 100
    assert not any(p.read_bytes().count(b"good") for p in folder.rglob("*") if p.is_file())


@pytest.mark.long
async def test_limits_hold_over_many_workers_that_come_late() -> None:
    """Processes start one after the other on few cores: each new one takes over a share."""
    spec = make_spec(HOT, tokens_per_min_user=3_000, window_s=2.0, output_tokens=(30, 40))
    async with run_gateway_process(spec) as process:
        given = settings(process.url, requests_per_s=32, tokens_per_min=3_000, window_s=2.0)
        given |= {"backend": {"kind": "local", "processes": 16}, "shard": {"items": 10}}
        folder = await run(given, 1_600)
        stats = await process.stats()
    assert len(chats(stats, 200)) == 1_600
    assert stats["refusals"] == {}
    (windows,) = stats["windows"].values()
    assert all(window["tokens"] <= 3_000 for window in windows)
    check_rate(stats, 32)
    assert len(list(folder.glob("journal/*"))) > 16
