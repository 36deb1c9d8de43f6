"""Batch files over the FIRST gateway: the requests that it has routes for (1.1, 8.3)."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.loader import load_config
from fanfold.graphs.run.prepare import prepare_run
from fanfold.graphs.session import RunOptions, execute_run
from fanfold.tests.support.first_gateway import CHAT, DeploymentSpec, FirstGateway, make_spec

pytestmark = [pytest.mark.integration, pytest.mark.usefixtures("home")]

COMPLETIONS, EMBEDDINGS = "/v1/completions", "/v1/embeddings"
BODIES: dict[str, dict[str, Any]] = {
    CHAT: {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5},
    COMPLETIONS: {"prompt": "Once upon", "max_tokens": 5},
    EMBEDDINGS: {"input": ["one", "two"]},
}
EMBEDDER = DeploymentSpec(embeds=True, routes=(CHAT, COMPLETIONS, EMBEDDINGS))


async def run(gateway: str, urls: list[str], **sections: Any) -> tuple[int, list[dict[str, Any]]]:
    """Run a batch with a request to each URL; return the exit code and the lines in order."""
    rows = [
        {"custom_id": f"{n}", "method": "POST", "url": url, "body": {"model": "m"} | BODIES[url]}
        for n, url in enumerate(urls)
    ]
    Path("in.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    first = {"base_url": gateway, "requests_per_s": 500, "poll_s": 0.2}
    settings = {
        "input": {"path": "in.jsonl", "format": "openai_batch"},
        "batch": {"output": "out.jsonl"},
        "endpoints": {"first": first},
        "model": {"name": "m"},
        "limits": {"hedge": False},
    }
    prepared = await prepare_run(load_config(settings | sections), Path("run"))
    ended = await execute_run(prepared, RunOptions(quiet=True), Console(quiet=True))
    lines = [json.loads(line) for line in Path("out.jsonl").read_text().splitlines()]
    return ended.exit_code, sorted(lines, key=lambda line: int(line["custom_id"]))


async def test_chats_and_completions_go_to_their_routes() -> None:
    async with FirstGateway(make_spec()) as gateway:
        code, lines = await run(gateway.url, [CHAT, COMPLETIONS, COMPLETIONS])
        assert code == 0
        bodies = [line["response"]["body"] for line in lines]
        assert [body["object"] for body in bodies] == ["chat.completion", *["text_completion"] * 2]
        assert gateway.count("sophia/vllm/v1/completions", 200) == 2
        used = sum(body["usage"]["total_tokens"] for body in bodies)
        (windows,) = gateway.windows.values()
        assert sum(window.tokens for window in windows) == used


@pytest.mark.parametrize("backend", [{}, {"kind": "local", "processes": 2}])
async def test_a_cold_model_for_embeddings_is_started_by_a_request_that_it_answers(
    backend: dict[str, Any],
) -> None:
    cold = DeploymentSpec(embeds=True, routes=(EMBEDDINGS,), state="cold")
    async with FirstGateway(make_spec(cold, cold_start_s=0.5, jobs_cache_s=0.1)) as gateway:
        code, lines = await run(gateway.url, [EMBEDDINGS] * 3, backend=backend)
        assert code == 0
        assert [len(line["response"]["body"]["data"]) for line in lines] == [2, 2, 2]
        assert gateway.deployments["sophia/vllm/org/m"].triggers == 1
        assert gateway.count("chat/completions") == 0
        assert not gateway.refusals


async def test_a_dead_deployment_for_embeddings_is_probed_at_its_route() -> None:
    async with FirstGateway(make_spec(EMBEDDER)) as gateway:
        gateway.fail_next("refused_connection", times=3)
        code, _ = await run(gateway.url, [EMBEDDINGS] * 3)
        assert code == 0
        assert gateway.count("chat/completions") == 0
        assert gateway.refusals["internal_endpoint_error"] == 3


async def test_a_route_that_no_deployment_offers_fails_its_lines_only() -> None:
    async with FirstGateway(make_spec()) as gateway:
        code, lines = await run(gateway.url, [EMBEDDINGS, CHAT, EMBEDDINGS, COMPLETIONS])
        assert code == 3
        assert [line["error"] is None for line in lines] == [False, True, False, True]
        assert lines[0]["error"]["code"] == "request_refused"
        assert "does this endpoint serve /v1/embeddings?" in lines[0]["error"]["message"]
    routes = ("/v1/responses",)
    async with FirstGateway(make_spec(DeploymentSpec(routes=routes))) as gateway:
        Path("run").rename("before")
        with pytest.raises(ConfigurationError, match="no deployment offers /v1/chat"):
            await run(gateway.url, [CHAT])


async def test_batch_mode_sends_chats_only() -> None:
    async with FirstGateway(make_spec()) as gateway:
        backend = {"kind": "batch", "service": "first", "dir": str(Path("files").absolute())}
        Path("files").mkdir()
        with pytest.raises(ConfigurationError, match=r"request '1': backend.kind: batch sends"):
            await run(gateway.url, [CHAT, EMBEDDINGS], backend=backend)
        assert not gateway.batches


async def test_parts_that_are_too_long_are_asked_in_pieces() -> None:
    """The model behind the gateway has a shorter context than it said."""
    text = " ".join(f"Finding {n} is new." for n in range(400))
    Path("in.jsonl").write_text("".join(f"{json.dumps({'id': i, 'text': text})}\n" for i in "ab"))
    settings = {
        "input": {"path": "in.jsonl", "id": "id", "split": {"tokens": 1500, "overlap": 50}},
        "task": {"prompt": "List the findings. {text}"},
        "model": {"name": "m", "max_tokens": 200},
        "limits": {"hedge": False},
    }
    async with FirstGateway(make_spec()) as gateway:
        records = await ask_long_parts(gateway, settings)
    assert sum(bool(record.get("pieces")) for record in records) >= 2


async def ask_long_parts(gateway: FirstGateway, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Run a task over parts that turn out to be too long; return the records."""
    first = {"base_url": gateway.url, "requests_per_s": 500, "poll_s": 0.2}
    loaded = load_config(settings | {"endpoints": {"first": first}})
    prepared = await prepare_run(loaded, Path("run"))
    for one in gateway.deployments.values():
        one.spec = replace(one.spec, context_window=900)
    ended = await execute_run(prepared, RunOptions(quiet=True), Console(quiet=True))
    assert (ended.exit_code, ended.progress["failed"]) == (0, 0)
    lines = Path("run/journal/0001.jsonl").read_text().splitlines()[1:]
    return [json.loads(line) for line in lines]


async def test_the_pieces_of_parts_are_in_the_same_batch() -> None:
    text = " ".join(f"Finding {n} is new." for n in range(800))
    Path("in.jsonl").write_text("".join(f"{json.dumps({'id': i, 'text': text})}\n" for i in "ab"))
    Path("files").mkdir()
    settings = {
        "input": {"path": "in.jsonl", "id": "id", "split": {"tokens": 2900, "overlap": 50}},
        "task": {"prompt": "List the findings. {text}"},
        "model": {"name": "m", "max_tokens": 100},
        "backend": {
            "kind": "batch", "service": "first", "dir": str(Path("files").absolute()),
            "poll_s": 0.1, "poll_most_s": 0.2, "gather_s": 0.3,
        },
    }  # fmt: skip
    async with FirstGateway(make_spec()) as gateway:
        records = await ask_long_parts(gateway, settings)
        batches = [Path(batch.input_file).read_text().splitlines() for batch in gateway.batches]
    indices = [Counter(index_of(line) for line in lines) for lines in batches]
    rounds = [set(counted.values()) for counted in indices]
    assert rounds == [{1}, {2}, {4}], "the halves of a part, and those of its halves"
    assert all(record["requests"] > len(record["pieces"]) for record in records)


def index_of(line: str) -> str:
    return str(json.loads(line)["custom_id"].split(":")[2])
