"""The wait for endpoints: messages, and what ends it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import pytest

from fanfold.backends.core.errors import ConfigurationError, NoEndpointError, RunStoppedError
from fanfold.backends.discovery.connect import wait_for_endpoints
from fanfold.configs.endpoints import EndpointsConfig


@dataclass
class Found:
    ready: int


def asker(*answers: int | Exception) -> Callable[[], Awaitable[Found]]:
    left = list(answers)

    async def ask() -> Found:
        answer = left.pop(0) if len(left) > 1 else left[0]
        if isinstance(answer, Exception):
            raise answer
        return Found(answer)

    return ask


def wanted(least: int, wait_s: float) -> EndpointsConfig:
    return EndpointsConfig(urls=["http://a"], least=least, wait_s=wait_s, refresh_s=0.001)


async def test_it_is_waited_and_said_once_what_for() -> None:
    said = list[str]()
    ask = asker(NoEndpointError("no file"), NoEndpointError("no file"), 1, 1, 2, 5)
    assert (await wait_for_endpoints(ask, wanted(4, 60), said.append)).ready == 5
    assert [line.partition(";")[0] for line in said] == [
        "endpoints: 0 of 4 ready (no file)",
        "endpoints: 1 of 4 ready",
        "endpoints: 2 of 4 ready",
    ]


@pytest.mark.parametrize("answer", [3, NoEndpointError("none answers")])
async def test_they_do_not_come(answer: int | Exception) -> None:
    with pytest.raises(
        RunStoppedError, match=r"endpoints: . of 4 ready.* run the same command again"
    ):
        await wait_for_endpoints(asker(answer), wanted(4, 0.01), lambda _: None)


async def test_enough_at_once_needs_no_wait() -> None:
    assert (await wait_for_endpoints(asker(4), wanted(4, 0), print)).ready == 4
    with pytest.raises(RunStoppedError, match="3 of 4 ready after 0 s"):
        await wait_for_endpoints(asker(3), wanted(4, 0), print)


async def test_what_waiting_does_not_mend_is_raised() -> None:
    with pytest.raises(ConfigurationError, match="another model"):
        await wait_for_endpoints(
            asker(1, ConfigurationError("another model")), wanted(4, 60), lambda _: None
        )
