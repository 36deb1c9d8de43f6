"""What is read from the lists of a gateway, whatever they contain."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.discovery.gateway import Gateway, GatewayClient, discover_first, find_state
from fanfold.backends.discovery.probe import ProbeResult
from fanfold.backends.fleet.endpoint import DeploymentState

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "running",
                    "queued",
                    "Models",
                    "Framework",
                    "Model Status",
                    "clusters",
                    "frameworks",
                    "models",
                    "endpoints",
                    "id",
                    "capabilities",
                    "a",
                    "b c",
                    "../x",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


def job(**changes: Any) -> dict[str, Any]:
    return {"Models": "org/m,org/n", "Framework": "vllm", "Cluster": "c"} | changes


@pytest.mark.parametrize(
    ("jobs", "state"),
    [
        (None, None),
        ({}, DeploymentState.COLD),
        ({"running": [job()]}, DeploymentState.RUNNING),
        ({"running": [job(**{"Model Status": "running"})]}, DeploymentState.RUNNING),
        ({"running": [job(**{"Model Status": "starting"})]}, DeploymentState.STARTING),
        ({"running": [job(**{"Model Status": "disconnected"})]}, DeploymentState.COLD),
        ({"running": [job(Framework="api")]}, DeploymentState.COLD),
        ({"running": [job(Models="org/other")]}, DeploymentState.COLD),
        ({"running": [job(Models="N, M")]}, DeploymentState.RUNNING),
        ({"queued": [job()]}, DeploymentState.QUEUED),
        ({"queued": [job()], "running": [job()]}, DeploymentState.RUNNING),
        ({"stopped": [job()], "private_batch_running": [job()]}, DeploymentState.COLD),
    ],
)
def test_the_state_of_a_model(jobs: Any, state: DeploymentState | None) -> None:
    assert find_state(jobs, "vllm", "org/m") is state


@given(JSON)
def test_any_list_of_jobs_is_read(jobs: Any) -> None:
    find_state(jobs, "vllm", "org/m")


class Lists(GatewayClient):
    """A client whose lists are any JSON value."""

    def __init__(self, jobs: Any) -> None:
        self.latency_s = 0.0
        self.jobs = jobs

    async def read_jobs(self, _: str) -> Any:
        return self.jobs

    async def read_models(self, _: str) -> Any:
        return self.jobs


@given(JSON, JSON)
async def test_any_list_of_endpoints_is_read(document: Any, other: Any) -> None:
    gateway = Gateway.from_paths("http://gateway:1", None, "key")
    clusters = {"clusters": {"a": {"frameworks": {"v": {"models": ["m"]}}}, "b": document}}
    found: list[ProbeResult] = await discover_first(gateway, Lists(other), clusters, {})
    assert found[0].models == ("m",)
    assert all(one.spec.url.startswith("http://gateway:1/") for one in found)
    assert all(".." not in one.label for one in found)
    with suppress(ConfigurationError):  # it lists no deployment
        await discover_first(gateway, Lists(other), document, {})
