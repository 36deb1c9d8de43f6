"""The reservation of a request, and how each kind of end settles it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError, EndpointLostError
from fanfold.backends.core.protocols import CallLog, Reservation
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet import failures
from fanfold.backends.fleet.failures import Failure, HTTPAnswer
from fanfold.backends.fleet.request import RequestCharge, max_usage

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "é" * 50}], "max_tokens": 20}


RESERVED = Usage(30, 20)


class Held:
    """An account and its holds, which note how they end."""

    def __init__(self) -> None:
        self.ends = list[str]()
        self.room = True

    waiting = 0
    usage = RESERVED

    async def reserve(
        self,
        most: Usage,
        body: Mapping[str, Any],
        log: CallLog | None = None,
        *,
        shorten: bool = False,  # noqa: ARG002 - the protocol's form
    ) -> Reservation:
        assert log is not None
        assert most == max_usage(body)
        return self

    def try_reserve(self, most: Usage) -> Reservation | None:  # noqa: ARG002 - the protocol's form
        return self if self.room else None

    def settle(self, usage: Usage) -> None:
        self.ends.append(f"settled {usage.tokens}")

    def settle_all(self) -> Usage:
        self.ends.append("kept")
        return RESERVED

    def release(self, *, sent: bool) -> None:
        self.ends.append("sent" if sent else "free")

    def close(self) -> None: ...


def test_a_token_is_a_byte_at_least() -> None:
    most = max_usage(BODY)
    assert most.prompt is not None
    assert most.prompt >= 100
    assert most.completion == 20
    longer = max_usage({**BODY, "tools": [{"type": "function"}], "n": 3})
    assert longer.prompt is not None
    assert longer.prompt > most.prompt
    assert longer.completion == 60


def failed(status: int) -> Failure:
    return failures.classify_answer(HTTPAnswer(status, {}, b"{}"), "node")


@pytest.mark.parametrize(
    ("failure", "end"),
    [
        (failed(429), "sent"),
        (failed(400), "sent"),
        (failed(500), "sent"),
        (failed(503), "sent"),
        (failed(502), "kept"),
        (failed(504), "kept"),
        (failures.classify_exception(TimeoutError(), "node"), "kept"),
    ],
)
async def test_what_was_read_is_kept_and_what_was_refused_is_given_back(
    failure: Failure, end: str
) -> None:
    held, log = Held(), CallLog()
    log.account = held
    charge = await RequestCharge.reserve(log, BODY)
    lost = charge.settle_failed(failure)
    charge.settle_lost()  # the first end counts
    assert held.ends == [end]
    assert log.lost == lost == (RESERVED if end == "kept" else Usage())


async def test_a_request_that_never_left_is_free() -> None:
    held = Held()
    refused = failures.classify_exception(TimeoutError(), "node")
    unsent = Failure(
        EndpointLostError("node: cannot connect", "node"), replace(refused.rule, free=True)
    )
    charge = await RequestCharge.reserve(CallLog(account=held), BODY)
    assert charge.settle_failed(unsent) == Usage()
    assert held.ends == ["free"]


async def test_a_second_request_needs_room_of_its_own() -> None:
    held = Held()
    charge = await RequestCharge.reserve(CallLog(account=held), BODY)
    second = charge.reserve_again()
    assert second is not None
    charge.settle_answered(Usage(60, 7), "m")
    second.settle_lost()
    assert held.ends == ["settled 67", "kept"]
    held.room = False
    assert charge.reserve_again() is None


async def test_without_a_bound_nothing_is_sent_on_a_budget() -> None:
    body = {"messages": BODY["messages"]}
    with pytest.raises(ConfigurationError, match="no max_tokens"):
        await RequestCharge.reserve(CallLog(account=Held()), body)
    await RequestCharge.reserve(CallLog(), body)
