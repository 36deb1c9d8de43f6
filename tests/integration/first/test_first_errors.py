"""What the fleet does about each error of the FIRST gateway, against the stand-in."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import pytest

from fanfold.backends.core.errors import (
    AuthenticationError,
    EndpointBusyError,
    EndpointError,
    EndpointLostError,
    FanfoldError,
    ModelNotServedError,
    PromptTooLongError,
    RequestRefusedError,
    RunStoppedError,
)
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import BreakerPolicy, FleetPolicy, ModelParams, RetryPolicy
from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.simulated.values import error_body
from fanfold.tests.support.command_server import DEADLINE_S
from fanfold.tests.support.first_gateway import (
    ROWS,
    DeploymentSpec,
    FirstGateway,
    make_spec,
    wrap_upstream,
)

pytestmark = pytest.mark.integration

QUICK = FleetPolicy(
    retry=RetryPolicy(backoff_s=0.01, backoff_max_s=0.1, refusal_pause_s=0.01, long_pause_s=0.1),
    breaker=BreakerPolicy(open_s=0.05, open_max_s=0.2, outage_s=0.05),
    whole_answers=True,
)
SOPHIA = DeploymentSpec()
METIS = DeploymentSpec("metis", "api", "org/m", kind="direct")

PASSING = {
    # 1.4
    "throttle": (EndpointBusyError, "Too many requests"),
    "tokens_per_minute": (EndpointBusyError, "Tokens/minute limit exceeded"),
    "upstream_slow": (EndpointLostError, "did not answer in time"),
    "request_timeout": (EndpointLostError, "the task took too long"),
    "not_ready": (EndpointBusyError, "online but not ready"),
    "offline": (EndpointBusyError, "is offline"),
    "maintenance": (EndpointBusyError, "under maintenance"),
    "quota_exceeded": (EndpointBusyError, "too many active batches"),
    "batch_ongoing": (EndpointBusyError, "already used by an ongoing batch"),
    "batch_not_ready": (EndpointBusyError, "not completed yet"),
    "cancelled": (EndpointError, "Internal Server Error"),
    # 1.3
    "uncaught": (EndpointError, "HTTP 500"),
    # 8.12
    "refused_connection": (EndpointLostError, "All connection attempts failed"),
    "not_live": (EndpointBusyError, "not currently live on Metis"),
}
"""Errors that pass: the request is repeated, and no item is lost."""

QUOTAS = {"throttle", "tokens_per_minute"}
"""Those of them for which an item waits, however long they last."""

REFUSED = {
    # 1.4
    "invalid_request": (RequestRefusedError, "field required"),
    "batch_schema": (RequestRefusedError, "not permitted"),
    "batch_unavailable": (RequestRefusedError, "not available for this model"),
    "batch_failed": (RequestRefusedError, "the batch failed"),
    # 8.1
    "bad_session": (RequestRefusedError, "X-ALCF-Session-ID"),
}
"""Errors of the request itself: it fails, and others go on."""

DEPLOYMENT = {
    # 1.4
    "access_denied": (AuthenticationError, "Permission denied"),
    "unknown_model": (ModelNotServedError, "model x does not exist"),
    "unknown_cluster": (ModelNotServedError, "cluster x does not exist"),
    "wrong_framework": (RequestRefusedError, "endpoints.first.paths"),
    "wrong_route": (RequestRefusedError, "endpoints.first.paths"),
    # 8.12
    "unknown_route": (ModelNotServedError, "the answer is a web page"),
}
"""Errors of one deployment: another one answers; without another one, the run stops."""

USER = {
    # 1.4
    "missing_authorization": "Missing ('Authorization'",
    "unauthorized": "Token is invalid or expired",
    # 8.12
    "internal_policies": "log in again (alcf-tokens clear-tokens, then alcf-tokens login)",
}
"""Errors of the user: the run stops, with the gateway's message."""


@asynccontextmanager
async def serve(
    *deployments: DeploymentSpec, policy: FleetPolicy = QUICK, token: str = "good", **spec: Any
) -> AsyncIterator[tuple[FirstGateway, Fleet]]:
    async with FirstGateway(make_spec(*deployments, **spec)) as gateway:
        specs = [
            EndpointSpec(
                f"{gateway.url}/{one.path}/v1", token, label=one.path, probe_model=one.model
            )
            for one in gateway.spec.deployments
        ]
        async with Fleet(specs, policy) as fleet:
            yield gateway, fleet


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while not condition():  # noqa: ASYNC110 - a run has no event for it
            await asyncio.sleep(0.01)


async def ask(fleet: Fleet, text: str = "Hello", **params: Any) -> str:
    client = FleetClient(fleet, ModelParams("org/m", **({"max_tokens": 8} | params)))
    return (await client.ask([{"role": "user", "content": text}])).content


def test_every_row_has_a_test() -> None:
    assert {*PASSING, *REFUSED, *DEPLOYMENT, *USER} == ROWS.keys()


@pytest.mark.parametrize("row", PASSING)
async def test_an_error_that_passes_is_waited_for(row: str) -> None:
    async with serve() as (gateway, fleet):
        gateway.fail_next(row)
        assert await ask(fleet)
        assert gateway.count("chat/completions", ROWS[row]().status) == 1
        (report,) = fleet.report()
        assert report.failures == {PASSING[row][0].__name__: 1}


@pytest.mark.parametrize("row", [row for row in PASSING if row not in QUOTAS])
async def test_an_error_that_stays_ends_the_item_in_the_words_of_the_gateway(row: str) -> None:
    kind, words = PASSING[row]
    retry = replace(QUICK.retry, attempts=2, patience_s=0.5)
    timeout = replace(QUICK.timeout, fleet_s=0.5)
    async with serve(policy=replace(QUICK, retry=retry, timeout=timeout)) as (gateway, fleet):
        gateway.fail_next(row, times=10_000)
        with pytest.raises((kind, RunStoppedError)) as error:
            await ask(fleet)
        assert words in error.value.message


@pytest.mark.parametrize("row", REFUSED)
async def test_a_request_that_is_refused_fails_alone(row: str) -> None:
    kind, words = REFUSED[row]
    async with serve() as (gateway, fleet):
        assert await ask(fleet)
        gateway.fail_next(row)
        with pytest.raises(kind, match=words):
            await ask(fleet)
        assert await ask(fleet)


@pytest.mark.parametrize("row", DEPLOYMENT)
async def test_another_deployment_answers_for_one_that_refuses(row: str) -> None:
    kind, words = DEPLOYMENT[row]
    async with serve(SOPHIA, METIS) as (gateway, fleet):
        gateway.fail_next(row, "sophia/vllm", times=10_000)
        assert all(await asyncio.gather(*(ask(fleet, f"Hello {n}") for n in range(20))))
        failures = {report.endpoint: report.failures for report in fleet.report()}
        assert failures["sophia/vllm"].get(kind.__name__)
        assert not failures["metis/api"]
        gateway.fail_next(row, times=10_000)
        tried = (ask(fleet, f"again {n}") for n in range(20))
        failed = await asyncio.gather(*tried, return_exceptions=True)
        assert all(isinstance(error, FanfoldError) and words in error.message for error in failed)


@pytest.mark.parametrize("row", USER)
async def test_an_error_of_the_user_stops_the_run(row: str) -> None:
    async with serve(SOPHIA, METIS) as (gateway, fleet):
        gateway.fail_next(row, times=10_000)
        tried = (ask(fleet, str(n)) for n in range(4))
        for error in await asyncio.gather(*tried, return_exceptions=True):
            assert isinstance(error, RunStoppedError)
            assert USER[row] in error.message
        assert ROWS[row]().status == 401
        assert gateway.count("chat/completions") <= 12


async def test_a_new_login_is_asked_for_at_once_and_no_new_token() -> None:
    class Key:
        renewed = 0

        async def __call__(self) -> str:
            return "good"

        async def renew(self, _: str) -> None:
            Key.renewed += 1

    async with serve(token=Key()) as (gateway, fleet):  # type: ignore[arg-type]
        gateway.fail_next("internal_policies", times=10_000)
        with pytest.raises(RunStoppedError, match="Permission denied from internal policies"):
            await ask(fleet)
        assert Key.renewed == 0
        gateway.fail_next("unauthorized")


@pytest.mark.parametrize("field", ["max_tokens", "max_completion_tokens"])
async def test_an_answer_that_is_too_long_is_lowered_as_without_the_gateway(field: Any) -> None:
    params: dict[str, Any] = {"max_tokens": 9_000, "max_tokens_field": field}
    simulated = SimulationSpec.fast(nodes=1, model="org/m", max_model_len=500)
    async with SimulatedFleet(simulated) as nodes:
        async with Fleet([EndpointSpec(nodes.urls[0])], QUICK) as fleet:
            direct = await ask(fleet, **params)
        behind = DeploymentSpec(upstreams=nodes.urls, context_window=500)
        async with serve(behind) as (_, fleet):
            assert await ask(fleet, **params) == direct
            (report,) = fleet.report()
            assert report.failures == {"RequestRefusedError": 1}


@pytest.mark.parametrize("size", [10, 100, 300])
async def test_a_quotation_may_be_cut_anywhere(size: int) -> None:
    """The words of vLLM for both errors, behind names that push the end beyond the cut."""
    name = "x" * size
    too_long = f"'max_tokens' or 'max_completion_tokens' is too large: 9000. {name} (limit 500)"
    limited = f"max_tokens=9000 cannot be greater than max_model_len=500. {name}"
    prompt = f"This model's maximum context length is 500 tokens. However, {name}"
    async with serve() as (gateway, fleet):
        gateway.fail_next(
            wrap_upstream(400, error_body(limited, "BadRequestError", 400, "max_tokens"))
        )
        assert await ask(fleet, max_tokens=9_000)
        gateway.fail_next(
            wrap_upstream(400, error_body(too_long, "BadRequestError", 400, "max_tokens"))
        )
        with pytest.raises(RequestRefusedError, match=r"lower model\.max_tokens"):
            await ask(fleet, max_tokens=100)
        gateway.fail_next(
            wrap_upstream(400, error_body(prompt, "BadRequestError", 400, "input_tokens"))
        )
        with pytest.raises(PromptTooLongError, match="maximum context length is 500 tokens"):
            await ask(fleet)


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        (404, error_body("The model x is gone", "NotFoundError", 404, "model"), None, "x is gone"),
        (400, b"<html><h1>Bad</h1></html>", RequestRefusedError, "a web page"),
        (400, "not JSON: é".encode(), RequestRefusedError, "not JSON: é"),
        (400, b"{", RequestRefusedError, "HTTP 400"),
        (400, b"", RequestRefusedError, "HTTP 400"),
    ],
)
async def test_whatever_is_quoted_is_read(
    status: int, body: bytes, kind: type[FanfoldError] | None, words: str
) -> None:
    async with serve() as (gateway, fleet):
        gateway.fail_next(wrap_upstream(status, body))
        with pytest.raises(kind or FanfoldError, match=words):
            await ask(fleet)


async def test_a_quotation_inside_a_quotation_is_read_once() -> None:
    inner = wrap_upstream(503, b"busy")
    twice = wrap_upstream(400, error_body(str(inner.body), "x", 400))
    async with serve() as (gateway, fleet):
        gateway.fail_next(twice)
        with pytest.raises(RequestRefusedError, match="Upstream endpoint returned 503"):
            await ask(fleet)


async def test_a_dead_deployment_is_asked_itself_whether_it_is_back(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The gateway answers everything else, which shows nothing of the deployment."""
    caplog.set_level(logging.INFO)
    simulated = SimulationSpec.fast(nodes=1, model="org/m", addressing="port")
    policy = replace(QUICK, timeout=replace(QUICK.timeout, fleet_s=60))
    async with SimulatedFleet(simulated) as nodes:
        behind = DeploymentSpec(upstreams=nodes.urls)
        async with serve(behind, policy=policy) as (gateway, fleet):
            assert await ask(fleet)
            await nodes.kill(0)
            waiting = asyncio.create_task(ask(fleet, "Are you there?"))
            await until(lambda: gateway.refusals["internal_endpoint_error"] >= 5)
            texts = [record.getMessage() for record in caplog.records]
            assert sum("marked unhealthy" in text for text in texts) == 1
            assert sum("no endpoint is alive" in text for text in texts) == 1
            assert "All connection attempts failed" in (fleet.health().paused or "")
            assert not any("recovered" in text for text in texts)
            assert gateway.count("list-endpoints") + gateway.count("models") == 0
            await nodes.revive(0)
            assert await waiting
            assert "an endpoint recovered; the run continues" in caplog.text


async def test_a_living_deployment_goes_on_while_another_is_dead(
    caplog: pytest.LogCaptureFixture,
) -> None:
    dead = DeploymentSpec("metis", "api", "org/m", upstreams=("http://127.0.0.1:9/v1",))
    async with serve(SOPHIA, dead) as (gateway, fleet):
        assert all(await asyncio.gather(*(ask(fleet, str(n)) for n in range(40))))
        await until(lambda: gateway.count("metis/api/v1/chat/completions") >= 4)
        assert sum("marked unhealthy" in r.getMessage() for r in caplog.records) == 1


async def test_the_last_words_of_a_run_are_the_gateways() -> None:
    policy = replace(QUICK, timeout=replace(QUICK.timeout, fleet_s=0.3))
    async with serve(maintenance=("sophia",), policy=policy) as (_, fleet):
        with pytest.raises(RunStoppedError) as error:
            await ask(fleet)
        assert "limits.fleet_wait_s" in error.value.message
        assert "cluster x is under maintenance" in error.value.message
