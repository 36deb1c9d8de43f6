"""What a request is reserved for, and how it is settled by each kind of end."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest

from fanfold.backends.core.errors import ConfigurationError, EndpointLostError
from fanfold.backends.core.protocols import CallLog, Hold
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet import failures
from fanfold.backends.fleet.failures import Failure, RawAnswer
from fanfold.backends.fleet.request import Charge, most_tokens

BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "é" * 50}], "max_tokens": 20}


RESERVED = Usage(30, 20)


class Held:
    """An account and its holds, which note how they end."""

    def __init__(self) -> None:
        self.ends = list[str]()
        self.room = True

    waits = 0

    async def hold(self, most: Usage, body: Mapping[str, Any], log: CallLog | None = None) -> Hold:
        assert log is not None
        assert most == most_tokens(body)
        return self

    def hold_now(self, most: Usage) -> Hold | None:  # noqa: ARG002 - the protocol's form
        return self if self.room else None

    def settle(self, usage: Usage) -> None:
        self.ends.append(f"settled {usage.tokens}")

    def keep(self) -> Usage:
        self.ends.append("kept")
        return RESERVED

    def free(self, *, sent: bool) -> None:
        self.ends.append("sent" if sent else "free")

    def close(self) -> None: ...


def test_a_token_is_a_byte_at_least() -> None:
    most = most_tokens(BODY)
    assert most.prompt is not None
    assert most.prompt >= 100
    assert most.completion == 20
    longer = most_tokens({**BODY, "tools": [{"type": "function"}], "n": 3})
    assert longer.prompt is not None
    assert longer.prompt > most.prompt
    assert longer.completion == 60


def failed(status: int) -> Failure:
    return failures.of_answer(RawAnswer(status, {}, b"{}"), "node")


@pytest.mark.parametrize(
    ("failure", "end"),
    [
        (failed(429), "sent"),
        (failed(400), "sent"),
        (failed(500), "sent"),
        (failed(503), "sent"),
        (failed(502), "kept"),
        (failed(504), "kept"),
        (failures.of_exception(TimeoutError(), "node"), "kept"),
    ],
)
async def test_what_was_read_is_kept_and_what_was_refused_is_given_back(
    failure: Failure, end: str
) -> None:
    held, log = Held(), CallLog()
    log.account = held
    charge = await Charge.open(log, BODY)
    lost = charge.failed(failure)
    charge.lost()  # the first end counts
    assert held.ends == [end]
    assert log.lost == lost == (RESERVED if end == "kept" else Usage())


async def test_a_request_that_never_left_is_free() -> None:
    held = Held()
    refused = failures.of_exception(TimeoutError(), "node")
    unsent = Failure(
        EndpointLostError("node: cannot connect", "node"), replace(refused.treatment, free=True)
    )
    charge = await Charge.open(CallLog(account=held), BODY)
    assert charge.failed(unsent) == Usage()
    assert held.ends == ["free"]


async def test_a_second_request_needs_room_of_its_own() -> None:
    held = Held()
    charge = await Charge.open(CallLog(account=held), BODY)
    second = charge.again()
    assert second is not None
    charge.answered(Usage(60, 7), "m")
    second.lost()
    assert held.ends == ["settled 67", "kept"]
    held.room = False
    assert charge.again() is None


async def test_without_a_bound_nothing_is_sent_on_a_budget() -> None:
    body = {"messages": BODY["messages"]}
    with pytest.raises(ConfigurationError, match="no max_tokens"):
        await Charge.open(CallLog(account=Held()), body)
    await Charge.open(CallLog(), body)
