"""The stand-in of the FIRST gateway does what the description of the service says."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.tests.support.first_gateway import (
    ROWS,
    SESSION_HEADER,
    BatchSpec,
    DeploymentSpec,
    FirstGateway,
    GatewaySpec,
    TokenSpec,
    make_spec,
    run_gateway_process,
)

Json = Any
CHAT: Json = {"model": "org/m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 9}
SOPHIA = "sophia/vllm"


class Client:
    """Requests to a gateway, and their answers as status and JSON (or text)."""

    def __init__(self, url: str, session: aiohttp.ClientSession) -> None:
        self.url, self.session = url, session

    async def send(
        self, path: str, body: Json = None, token: str | None = "good", **headers: str
    ) -> tuple[int, Json]:
        if token is not None:
            headers["Authorization"] = f"Bearer {token}"
        method = "GET" if body is None else "POST"
        async with self.session.request(
            method, f"{self.url}/{path}", json=body, headers=headers
        ) as response:
            assert "Retry-After" not in response.headers  # 1.4
            if response.content_type == "application/json":
                return response.status, await response.json()
            return response.status, await response.text()

    async def chat(self, path: str = SOPHIA, **changes: Json) -> tuple[int, Json]:
        return await self.send(f"{path}/v1/chat/completions", CHAT | changes)


@asynccontextmanager
async def serve(spec: GatewaySpec) -> AsyncIterator[tuple[FirstGateway, Client]]:
    async with FirstGateway(spec) as gateway, aiohttp.ClientSession() as session:
        yield gateway, Client(gateway.url, session)


def code(answer: tuple[int, Json]) -> tuple[int, str]:
    return answer[0], answer[1]["error"]["code"]


async def test_what_the_lists_say() -> None:
    metis = DeploymentSpec("metis", "api", "m", kind="direct", details=False)
    async with serve(make_spec(DeploymentSpec(), metis)) as (_, client):
        status, listed = await client.send("list-endpoints")
        assert status == 200
        assert listed["clusters"]["metis"] == {
            "base_url": "/resource_server/metis",
            "frameworks": {
                "api": {"models": ["m"], "endpoints": ["/v1/chat/completions", "/v1/completions"]}
            },
        }
        _, jobs = await client.send("sophia/jobs")
        assert jobs["running"][0]["Models"] == "org/m"
        assert jobs["running"][0]["Model Status"] == "running"
        _, [model] = await client.send("sophia/models")
        assert model["rate_limit_token_per_minute_per_user"] == 60_000
        assert model["capabilities"]["context_window_tokens"] == 32_768
        _, [plain] = await client.send("metis/models?model_id=m")
        assert plain.keys() == {"id", "object", "cluster", "framework"}
        assert (await client.send("health", token=None))[1] == {"status": "ok"}
        assert (await client.send("status", token=None))[1] == {"sophia": True, "metis": True}
        assert (await client.send("whoami"))[1]["username"] == "user"


@pytest.mark.parametrize(
    ("path", "method"),
    [
        ("v1/chat/completions", "POST"),  # 8.3 nothing federated
        ("sophia/vllm/v1/models", "GET"),  # 8.12
        ("nothing", "GET"),
    ],
)
async def test_unknown_routes_are_web_pages(path: str, method: str) -> None:
    async with serve(make_spec()) as (_, client):
        status, page = await client.send(path, CHAT if method == "POST" else None)
        assert status == 404
        assert page.startswith("<!doctype html>")


async def test_tokens_and_the_memory_of_refusals() -> None:
    tokens = {"good": TokenSpec(), "late": TokenSpec(policies=True)}
    async with serve(make_spec(tokens=tokens, failure_cache_s=2.0)) as (gateway, client):
        status, body = await client.send("whoami", token=None)
        assert status == 401
        assert "Missing" in body["detail"]
        assert code(await client.send("whoami", token="bad")) == (401, "unauthorized")
        gateway.tokens["bad"] = TokenSpec()
        assert (await client.send("whoami", token="bad"))[0] == 401  # remembered
        while (await client.send("whoami", token="bad"))[0] == 401:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        _, body = await client.send("whoami", token="late")
        assert "internal policies" in body["error"]["message"]


async def test_a_user_has_ten_requests_a_second() -> None:
    spec = GatewaySpec(tokens={"good": TokenSpec(), "other": TokenSpec("second")})
    async with serve(spec) as (gateway, client):
        answers = await asyncio.gather(*(client.send("whoami") for _ in range(15)))
        refused = [body for status, body in answers if status == 429]
        assert refused
        assert all(body == {"detail": "Too many requests."} for body in refused)
        assert (await client.send("whoami", token="other"))[0] == 200
        assert gateway.refusals == {"throttle": len(refused)}
        times = [c.at for c in gateway.calls if c.status == 200 and c.user == "user"]
        assert all(later - first >= 1.0 for first, later in zip(times, times[10:], strict=False))


async def test_tokens_are_counted_after_the_answer_in_windows() -> None:
    spec = make_spec(tokens_per_min_user=1, window_s=1.0, answer_s=0.05)
    async with serve(spec) as (gateway, client):
        both = await asyncio.gather(client.chat(), client.chat())
        assert [status for status, _ in both] == [200, 200]  # nothing was reserved
        status, body = await client.chat()
        assert (status, body["error"]["code"]) == (429, "too_many_requests")
        assert body["error"]["info"]["user_model_usage"] > 1
        while (await client.chat())[0] == 429:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        first, second = gateway.windows["user sophia/vllm/org/m"]
        used = both[0][1]["usage"]["total_tokens"] + both[1][1]["usage"]["total_tokens"]
        assert first.tokens == used
        assert first.carried == used  # the requests were in flight when the window began
        assert first.refused >= 1
        assert second.start >= first.start + 1.0


async def test_the_first_caller_starts_a_cold_model_and_the_others_are_refused() -> None:
    spec = make_spec(DeploymentSpec(state="cold"), cold_start_s=2.0, jobs_cache_s=0.0)
    async with serve(spec) as (gateway, client):
        assert (await client.send("sophia/jobs"))[1]["stopped"][0]["Models"] == "org/m"
        first = asyncio.create_task(client.chat())
        while not gateway.deployments["sophia/vllm/org/m"].triggers:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        refused = await client.chat()
        assert code(refused) == (503, "internal_endpoint_error")
        assert "online but not ready" in refused[1]["error"]["message"]
        _, jobs = await client.send("sophia/jobs")
        assert jobs["running"][0]["Model Status"] == "starting"
        assert (await first)[0] == 200
        assert (await client.chat())[0] == 200
        assert gateway.deployments["sophia/vllm/org/m"].triggers == 1


async def test_a_start_longer_than_a_task_is_a_timeout() -> None:
    cold = DeploymentSpec(state="cold")
    spec = make_spec(cold, cold_start_s=0.6, queue_s=0.4, compute_timeout_s=0.2)
    async with serve(spec) as (_, client):
        status, body = await client.chat()
        assert (status, body["error"]["code"]) == (408, "request_timeout")
        assert body["error"]["info"]["task_id"]
        assert (await client.send("sophia/jobs"))[1]["queued"]  # and this stays for 60 s:
        while (await client.chat())[0] != 200:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
        assert (await client.send("sophia/jobs"))[1]["queued"]


async def test_maintenance_offline_and_models_that_are_not_live() -> None:
    metis = DeploymentSpec("metis", "api", "m", kind="direct", state="not_live")
    down = DeploymentSpec("minerva", "api", "m", kind="direct", state="offline")
    async with serve(make_spec(DeploymentSpec(), metis, down, maintenance=("sophia",))) as (
        _,
        client,
    ):
        assert code(await client.chat()) == (503, "cluster_under_maintenance")
        assert (await client.send("status", token=None))[1]["sophia"] is False
        assert (await client.send("sophia/jobs"))[1]["stopped"]
        assert (
            "currently live" in (await client.chat("metis/api", model="m"))[1]["error"]["message"]
        )
        assert "is offline" in (await client.chat("minerva/api", model="m"))[1]["error"]["message"]


async def test_sessions_choose_the_replica() -> None:
    minerva = DeploymentSpec("minerva", "api", "m", kind="direct", replicas=8, affine=True)
    async with serve(make_spec(minerva)) as (gateway, client):
        path = "minerva/api/v1/chat/completions"
        body = CHAT | {"model": "m"}
        for _ in range(5):
            await client.send(path, body)
        deployment = gateway.deployments["minerva/api/m"]
        assert len(deployment.sessions[None]) == 1
        for n in range(40):
            assert (await client.send(path, body, **{SESSION_HEADER: f"s{n}"}))[0] == 200
            assert len(deployment.sessions[f"s{n}"]) == 1
        assert len(deployment.replicas) > 4
        for bad in ("x" * 129, "two words", "é"):
            assert (await client.send(path, body, **{SESSION_HEADER: bad}))[0] == 400


async def test_errors_of_the_model_server_are_text() -> None:
    async with SimulatedFleet(SimulationSpec.fast(nodes=1, max_model_len=200)) as fleet:
        up = DeploymentSpec(
            upstreams=fleet.urls, served_as=fleet.spec.model, aliases=("m",), kind="direct"
        )
        dead = DeploymentSpec("metis", "api", "m", upstreams=("http://127.0.0.1:9/v1",))
        async with serve(make_spec(up, dead)) as (_, client):
            status, body = await client.chat(model="m")
            assert (status, body["model"]) == (200, "org/m")  # 8.8
            status, body = await client.chat(max_tokens=9_000)
            assert status == 400
            assert body["error"]["code"] == "internal_endpoint_error"
            text = body["error"]["message"]
            assert text.startswith("Upstream endpoint returned 400: b'")
            assert len(text) <= len("Upstream endpoint returned 400: b''") + 256
            assert code(await client.chat("metis/api", model="m")) == (
                500,
                "internal_endpoint_error",
            )


@pytest.mark.parametrize(
    ("path", "changes", "expected"),
    [
        ("mars/vllm", {}, (404, "cluster_not_found")),
        ("sophia/other", {}, (400, "unsupported_framework")),
        (SOPHIA, {"model": "none"}, (404, "endpoint_not_found")),
        (SOPHIA, {"messages": None}, (422, "invalid_request")),
        (SOPHIA, {"cache_salt": "a"}, (422, "invalid_request")),
        (SOPHIA, {"stream_task_id": "a"}, (422, "invalid_request")),
        (SOPHIA, {"streaming_server_host": "a"}, (422, "invalid_request")),
    ],
)
async def test_requests_that_are_refused(
    path: str, changes: Json, expected: tuple[int, str]
) -> None:
    async with serve(make_spec()) as (_, client):
        assert code(await client.chat(path, **changes)) == expected
        assert (await client.chat(priority=1))[0] == 200  # 8.2 other fields pass


async def test_every_row_can_be_asked_for() -> None:
    async with serve(make_spec()) as (gateway, client):
        shapes = set()
        for name, row in ROWS.items():
            gateway.fail_next(name, SOPHIA)
            status, body = await client.chat()
            assert status == row().status
            error = body.get("error") if isinstance(body, dict) else None
            shapes.add(
                "error_id" if error and "error_id" in error
                else "error" if error
                else type(body["detail"]).__name__ if isinstance(body, dict)
                else "html" if body.startswith("<")
                else "text"
            )  # fmt: skip
        assert shapes == {"error", "error_id", "str", "list", "html", "text"}  # 1.3
        assert (await client.chat())[0] == 200


def lines(count: int) -> str:
    return "".join(
        json.dumps(
            {"custom_id": f"i{n}", "method": "POST", "url": "/v1/chat/completions", "body": CHAT}
        )
        + "\n"
        for n in range(count)
    )


async def finish(client: Client, name: str) -> str:
    status = "pending"
    while status in {"pending", "running"}:
        await asyncio.sleep(0.02)
        _, status = await client.send(f"v1/batches/{name}")
    return status


async def test_a_batch_reads_its_file_and_writes_its_answers(tmp_path: Path) -> None:
    given = tmp_path / "in.jsonl"
    given.write_text(lines(200))
    rules = BatchSpec(missing=0.05, failed=0.05, lines_per_chunk=50, pending_s=1.0)
    async with serve(make_spec(batch=rules)) as (gateway, client):
        order = {"model": "org/m", "input_file": str(given), "output_folder_path": str(tmp_path)}
        url = f"{SOPHIA}/v1/batches"
        assert (await client.send(url, order | {"input_file_path": "x"}))[0] == 422
        status, made = await client.send(url, order)
        assert (status, made["status"]) == (200, "pending")
        assert code(await client.send(url, order)) == (400, "batch_ongoing")
        other = order | {"input_file": str(tmp_path / "other")}
        assert code(await client.send(url, other)) == (400, "quota_exceeded")
        result = f"v1/batches/{made['batch_id']}/result"
        assert code(await client.send(result)) == (400, "batch_ongoing")
        assert await finish(client, made["batch_id"]) == "completed"
        found = json.loads((await client.send(result))[1])
        written = [json.loads(t) for t in Path(found["results_file"]).read_text().splitlines()]
        bad = [line for line in written if line["response"]["status_code"] != 200]
        assert 150 < len(written) < 200
        assert 0 < len(bad) < 30
        assert len({line["custom_id"] for line in written}) == len(written)
        assert written[0]["response"]["body"]["choices"][0]["message"]["content"]
        assert gateway.windows == {}  # 8.6 not counted as tokens
        assert [b.input_file for b in gateway.batches] == [str(given)]
        _, listed = await client.send("v1/batches?status=completed")
        assert listed[0]["input_file"] == str(given)
        assert (await client.send("v1/batches?status=running"))[1] == []


async def test_a_batch_that_dies_and_one_without_a_folder(tmp_path: Path) -> None:
    given = tmp_path / "in.jsonl"
    given.write_text(lines(20))
    rules = BatchSpec(dies_after_lines=12, lines_per_chunk=5)
    tokens = {"good": TokenSpec(), "other": TokenSpec("second")}
    async with serve(make_spec(batch=rules, tokens=tokens)) as (gateway, client):
        order = {"model": "org/m", "input_file": str(given), "output_folder_path": str(tmp_path)}
        url = f"{SOPHIA}/v1/batches"
        _, made = await client.send(url, order)
        assert await finish(client, made["batch_id"]) == "failed"
        result = f"v1/batches/{made['batch_id']}/result"
        assert code(await client.send(result)) == (400, "batch_failed")
        assert code(await client.send(result, token="other")) == (403, "access_denied")
        (output,) = tmp_path.glob("*.results.jsonl")
        assert len(output.read_text().splitlines()) == 10  # of two whole chunks
        del order["output_folder_path"]
        assert (await client.send(url, order))[0] == 500
        assert len(gateway.batches) == 2  # 1.6 (a) it runs nevertheless
        assert await finish(client, gateway.batches[1].id) == "completed"


async def test_the_successor_has_other_routes() -> None:
    async with serve(make_spec(successor=True)) as (_, client):
        assert code(await client.send("list-endpoints")) == (404, "not_found")
        assert (await client.send("catalog/v1/clusters"))[0] == 200
        assert (await client.send("health", token=None))[0] == 200


async def test_a_process_of_its_own() -> None:
    deployment = DeploymentSpec(aliases=("m",), replicas=3)
    spec = make_spec(deployment, batch=BatchSpec(per_user=2), tokens={"t": TokenSpec("u")})
    assert GatewaySpec.from_json(spec.to_json()) == spec
    async with run_gateway_process(spec) as process, aiohttp.ClientSession() as session:
        client = Client(process.url, session)
        assert (await client.send(f"{SOPHIA}/v1/chat/completions", CHAT, token="t"))[0] == 200
        await process.change(states={"sophia/vllm/org/m": "offline"}, tokens={"n": {"user": "v"}})
        refused = await client.send(f"{SOPHIA}/v1/chat/completions", CHAT, token="n")
        assert "offline" in refused[1]["error"]["message"]
        stats = await process.stats()
        assert [call["status"] for call in stats["calls"]] == [200, 503]
        assert [call["user"] for call in stats["calls"]] == ["u", "v"]
