"""Runs whose shards go to endpoints of the stand-in, on a fleet with its own counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import orjson
import pytest

from fanfold.backends.simulated.fleet import SimulatedFleet
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.backends.workers import registry
from fanfold.backends.workers.globus.backend import TaskSubmitter
from fanfold.backends.workers.globus.poller import PollPolicy
from fanfold.tests.integration.runs.conftest import Lab

from .client import URL_VARIABLE
from .logins import LOGIN
from .service import GlobusService

SHARDS = 6
ITEMS = 120
QUICK = PollPolicy(
    burst=20,
    rate_per_s=20.0,
    min_pause_s=0.1,
    max_pause_s=0.5,
    health_check_s=0.5,
    missing_timeout_s=0.5,
)

LabOf = Callable[..., AbstractAsyncContextManager[Lab]]


class HasId(Protocol):
    """An endpoint or a manager."""

    @property
    def endpoint_id(self) -> str:
        """Its UUID."""
        ...


@pytest.fixture
def lab_over(service: GlobusService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LabOf:
    """Make labs whose shards run on endpoints; runs in this process ask often."""
    monkeypatch.setenv(URL_VARIABLE, service.url)
    monkeypatch.setattr(registry, "TaskSubmitter", partial(TaskSubmitter, policy=QUICK))

    @asynccontextmanager
    async def make(*endpoints: HasId, ttft_s: float = 0.2, **backend: Any) -> Any:
        spec = SimulationSpec.fast(nodes=2, ttft_s=ttft_s, tpot_s=0.001, jitter=0.3)
        async with SimulatedFleet(spec) as fleet:
            lab = Lab(tmp_path, fleet, ITEMS)
            lab.whole = await lab.undisturbed()  # type: ignore[attr-defined]
            lab.config["limits"] = {"streams": 8, "drain_s": 1.0, "hedge": False}
            lab.config["backend"] = {
                "kind": "globus_compute",
                "endpoints": [endpoint.endpoint_id for endpoint in endpoints],
                "client": LOGIN,
                "workers": 2 * len(endpoints),
            } | backend
            yield lab

    return make


def recorded(out: Path) -> Counter[str]:
    """Return how often each item has ended, over all journal files of a run."""
    found: Counter[str] = Counter()
    for file in (out / "journal").glob("*.jsonl"):
        records = map(orjson.loads, file.read_bytes().split(b"\n")[:-1])
        found.update(record["id"] for record in records if "status" in record)
    return found


def asked_again(lab: Lab) -> int:
    """Return how many requests the fleet has got beyond one per item, by its own counts."""
    prompts = lab.fleet.stats(prompts=True)["prompts"].values()
    assert len(prompts) == lab.items
    return sum(int(prompt["asked"]) - 1 for prompt in prompts)


def assert_each_once(lab: Lab, again: int) -> None:
    """Assert that the journal has one record of each item, and how many were paid for again."""
    lab.assert_whole(lab.whole, again=lab.items)  # type: ignore[attr-defined]
    assert recorded(lab.out) == {f"i{n}": 1 for n in range(lab.items)}
    assert asked_again(lab) <= again


def posted(service: GlobusService, since: int) -> dict[str, int]:
    """Return, by endpoint, how many tasks were posted since so many submissions."""
    counts = dict[str, int]()
    for post in service.submissions[since:]:
        counts[post.endpoint_id] = counts.get(post.endpoint_id, 0) + len(post.task_ids)
    return counts
