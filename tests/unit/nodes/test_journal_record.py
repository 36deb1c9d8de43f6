"""What a record contains about the question, a rejected answer, and the requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fanfold.backends.core.errors import EndpointLostError
from fanfold.backends.core.protocols import CallLog
from fanfold.backends.core.templates import ItemPrompt
from fanfold.backends.core.types import Item, Message, Reply, Usage
from fanfold.backends.core.values import MAX_COUNT, check_record
from fanfold.backends.fleet import failures
from fanfold.backends.fleet.endpoint import Endpoint, EndpointSpec
from fanfold.backends.fleet.request import RequestCharge
from fanfold.backends.storage.journal import Journal
from fanfold.configs.loader import load_config
from fanfold.graphs.run.fingerprint import compute_question_digest
from fanfold.nodes.aggregators import build_aggregators
from fanfold.nodes.context import ItemContext, RunTools
from fanfold.nodes.item.answer import AnswerCheck
from fanfold.nodes.item.item_state import ItemState
from fanfold.nodes.item.steps import ITEM_STEPS, walk_steps
from fanfold.nodes.shard.gate import Gate
from fanfold.nodes.shard.progress import Progress
from fanfold.nodes.shard.record import RecordBuilder, put_record

SETTINGS: dict[str, Any] = {
    "task": {
        "system": "Judge.",
        "prompt": "What is {x}?",
        "schema": {"type": "object", "properties": {"a": {"type": "integer"}}},
    },
    "endpoints": {"urls": ["http://127.0.0.1:1"]},
}


class Nothing:
    """A store without items."""

    def __len__(self) -> int:
        return 0

    def read(self, lo: int, hi: int) -> list[Item]:
        raise AssertionError((lo, hi))


def tools_of(folder: Path, settings: dict[str, Any], model: str = "m") -> RunTools:
    ledger = Journal(folder, "r", 10)
    ledger.start_session("test", 60.0)

    async def nobody(_: Item) -> ItemState:
        raise AssertionError

    config = load_config(settings).config
    common = compute_question_digest(config, model)
    gate = Gate(1, 1.0)
    return RunTools(
        Nothing(),
        ledger,
        build_aggregators([{"op": "count"}]),
        nobody,
        gate,
        Progress(),
        b"",
        True,
        question_digest=common,
        constant_messages=config.parse_prompt().constants,
    )


def question(
    folder: Path, changes: dict[str, Any] | None = None, model: str = "m", x: str = "gold"
) -> str | None:
    changes = changes or {}
    settings = SETTINGS | {name: SETTINGS.get(name, {}) | value for name, value in changes.items()}
    tools = tools_of(folder, settings, model)
    config = load_config(settings).config
    messages = config.parse_prompt().build_messages({"x": x})
    state: ItemState = {"messages": messages, "output": {}}
    found: str | None = RecordBuilder(tools).build(Item(0, "i", {"x": x}), state, CallLog(), 0.1)[
        "question"
    ]
    return found


REORDERED = {"properties": {"a": {"type": "integer"}}, "type": "object"}


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"max_tokens": 7}},
        {"model": {"price": {"prompt": 1.0, "completion": 1.0}}},
        {"task": {"schema": REORDERED}},
        {"task": {"repairs": 3}},
        {"endpoints": {"urls": ["http://127.0.0.1:2"], "models": {"alias": "m"}}},
        {"limits": {"streams": 3}},
        {"backend": {"kind": "local", "processes": 2}},
        {"keep": {"raw": "all"}},
    ],
)
def test_a_question_is_the_same_wherever_it_is_asked(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    assert question(tmp_path, changes) == question(tmp_path)
    assert len(question(tmp_path) or "") == 32


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"temperature": 0.5}},
        {"model": {"seed": 3}},
        {"model": {"extra_body": {"top_k": 4}}},
        {"task": {"system": "Judge!"}},
        {"task": {"system": ""}},
        {"task": {"prompt": "What was {x}?"}},
        {"task": {"examples": [{"x": "tin", "output": {"a": 1}}]}},
        {"task": {"system": "", "prompt": "", "messages": [{"role": "user", "content": "{x}"}]}},
        {"task": {"schema": None}},
        {"task": {"schema": {"type": "object"}}},
    ],
)
def test_another_question_has_another_digest(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert question(tmp_path, changes) != question(tmp_path)


def test_all_messages_belong_to_the_question(tmp_path: Path) -> None:
    def ask(x: str, *texts: str) -> str | None:
        roles = ["system", "user", "assistant", "user"]
        given = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]
        task = {"system": "", "prompt": "", "messages": given}
        return question(tmp_path, {"task": task}, x=x)

    asked = [
        ask("gold", "{x}", "a", "b", "c"),
        ask("tin", "{x}", "a", "b", "c"),
        ask("gold", "a", "{x}", "b", "c"),
        ask("tin", "a", "{x}", "b", "c"),
        ask("gold", "a", "b", "{x}", "c"),
        ask("gold", "a", "b", "c", "{x}"),
        ask("tin", "a", "b", "c", "{x}"),
        ask("tin", "a", "{x}{x}", "b{x}", "c"),
        ask("tin", "a", "{x}", "{x}b{x}", "c"),
    ]
    assert len(set(asked)) == len(asked)
    assert ask("tin", "a", "{x}", "b", "c") == asked[3]
    role = {"system_role": "developer"}
    given = {"system": "", "prompt": "", "messages": [{"role": "user", "content": "{x}"}]}
    assert question(tmp_path, {"task": given}) == question(tmp_path, {"task": given, "model": role})
    given["messages"].insert(0, {"role": "system", "content": "a"})  # type: ignore[attr-defined]
    assert question(tmp_path, {"task": given}) != question(tmp_path, {"task": given, "model": role})


def test_model_and_item_belong_to_the_question(tmp_path: Path) -> None:
    assert (
        len({question(tmp_path), question(tmp_path, model="n"), question(tmp_path, x="tin")}) == 3
    )


def test_an_item_that_was_not_rendered_has_no_question(tmp_path: Path) -> None:
    state: ItemState = {"error": {"class": "InvalidItemError", "text": "no"}}
    record = RecordBuilder(tools_of(tmp_path, SETTINGS)).build(
        Item(0, "i", {}), state, CallLog(), 0.1
    )
    assert record["question"] is None
    assert (record["stage"], record["sample"], record["origin"]) == ("", 0, None)


class Script:
    """A model that says what it is told to, one reply after the other."""

    def __init__(self, *replies: str | Exception | Reply) -> None:
        self._replies = list(replies)
        self.asked = list[Sequence[Message]]()

    async def ask(self, messages: Sequence[Message]) -> Reply:
        self.asked.append(messages)
        reply = self._replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, Reply):
            return reply
        return Reply(reply, "stop", None, Usage(1, 1), "e", "m", True)


async def record_of(folder: Path, script: Script, *, keep_raw: bool = False) -> dict[str, Any]:
    tools = replace(tools_of(folder, SETTINGS), keep_raw=keep_raw)
    check = AnswerCheck(SETTINGS["task"]["schema"], 256)
    context = ItemContext(ItemPrompt.parse({"prompt": "{x}"}), script, check, repairs=1)
    state = ItemState(id="i", row={"x": "gold"}, problem=None)
    end = await walk_steps(ITEM_STEPS, state, context)
    return RecordBuilder(tools).build(Item(0, "i", {"x": "gold"}), end, CallLog(), 0.1)


GOOD = '{"a": 1}'


async def test_repairs_leave_the_question_as_it_was(tmp_path: Path) -> None:
    """Else an item that was repaired would be paid again by a run that extends this one."""
    asked = [
        (await record_of(tmp_path, Script(*replies)))["question"]
        for replies in ([GOOD], ["no", GOOD], ["first", "second"])
    ]
    assert asked[0] == asked[1] == asked[2] is not None


@pytest.mark.parametrize(
    ("replies", "keep_raw", "raw"),
    [
        ([GOOD], False, None),
        ([GOOD], True, GOOD),
        (["no", GOOD], False, None),
        (["no", f"```json\n{GOOD}\n```"], True, f"```json\n{GOOD}\n```"),
        (["first", "second"], False, "second"),
        (["first", "second"], True, "second"),
        (["first", EndpointLostError("gone", "e")], False, "first"),
        ([EndpointLostError("gone", "e")], True, None),
        ([Reply("cut of", "length", None, Usage(), "e", "m", True)], False, "cut of"),
        ([Reply("", "stop", "I will not", Usage(), "e", "m", True)], False, "I will not"),
        ([Reply("", "stop", None, Usage(), "e", "m", True)], False, ""),
    ],
)
async def test_the_text_of_a_rejected_answer_is_kept(
    tmp_path: Path, replies: list[Any], keep_raw: bool, raw: str | None
) -> None:
    record = await record_of(tmp_path, Script(*replies), keep_raw=keep_raw)
    assert record["raw"] == raw
    assert "raw_bytes" not in record


@pytest.mark.parametrize("sign", ["x", "é", "水", "\U0001f9ea"])
async def test_a_long_text_is_cut_at_a_character(tmp_path: Path, sign: str) -> None:
    whole = f"a{sign * 16_001}"
    record = await record_of(tmp_path, Script("no", whole))
    raw = record["raw"]
    assert len(raw.encode()) <= 16_000
    assert len(raw.encode()) > 16_000 - 4
    assert raw.endswith("…")
    assert whole.startswith(raw[:-1])
    assert record["raw_bytes"] == len(whole.encode())


async def test_a_text_of_the_largest_size_is_whole(tmp_path: Path) -> None:
    record = await record_of(tmp_path, Script("no", "é" * 8_000))
    assert record["raw"] == "é" * 8_000
    assert "raw_bytes" not in record


class Sink:
    """Stands for the statistics of an endpoint."""

    def add_useful(self, usage: Usage) -> None:
        """Nothing is kept."""


def test_the_first_eight_requests_are_told(tmp_path: Path) -> None:
    log, before = CallLog(), time.time()
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 5}
    charges = list[RequestCharge]()
    for number in range(10):
        charges.append(RequestCharge(log, body))
        charges[-1].record_sent(Endpoint(EndpointSpec("http://e:1", label=f"e{number}")))
    charges[0].settle_failed(failures.classify_exception(TimeoutError(), "e0"))
    charges[1].settle_lost()
    charges[1].settle_lost()
    charges[2].settle_answered(Usage(1, 1), "m")
    charges[9].settle_answered(Usage(1, 1), "m")
    state: ItemState = {"output": {}}
    record = RecordBuilder(tools_of(tmp_path, SETTINGS)).build(Item(0, "i", {}), state, log, 0.1)
    attempts = record["attempts"]
    assert record["requests"] == 10
    assert [one["endpoint"] for one in attempts] == [f"e{n}" for n in range(8)]
    outcomes = [one["outcome"] for one in attempts]
    assert outcomes == ["EndpointLostError", "cancelled", "answered", *[None] * 5]
    assert all(before - 1 <= one["start"] <= time.time() for one in attempts)
    assert [one["seconds"] is None for one in attempts] == [False] * 3 + [True] * 5
    assert all(set(one) == {"endpoint", "start", "seconds", "outcome"} for one in attempts)


@pytest.mark.parametrize(
    "output",
    [{"a": {1, 2}}, 2**70, "\ud800", {1: 2}, [b"x"], object()],
    ids=["set", "huge", "surrogate", "key", "bytes", "object"],
)
async def test_what_cannot_be_written_fails_its_item(tmp_path: Path, output: Any) -> None:
    """Whatever puts it there: the record is written without it."""
    tools = tools_of(tmp_path, SETTINGS)
    log = CallLog(requests=2, usage=Usage(10, 5), model="half \ud800")
    state: ItemState = {"output": output}
    record = RecordBuilder(tools).build(Item(0, "i", {}), state, log, 0.1)
    kept = put_record(tools.item_journal, record)
    assert (kept["status"], kept["error_class"]) == ("failed", "InvalidAnswerError")
    assert "cannot be recorded as JSON" in kept["error"]
    assert tools.item_journal.read_answers(0, 1) == [kept]
    assert (kept["requests"], kept["prompt_tokens"], kept["output"]) == (2, 10, None)
    assert kept["model"] == "half ?"
    put_record(
        tools.item_journal, RecordBuilder(tools).build(Item(1, "j", {}), {"output": 1}, log, 0.1)
    )
    await asyncio.sleep(0)
    assert isinstance(tools.item_journal, Journal)
    await tools.item_journal.aclose()


@pytest.mark.parametrize("endpoints", [1, 2])
@pytest.mark.parametrize(
    "usage",
    [
        Usage(-5, -1, -2),
        Usage(2**63, 2**64, 2**65),
        Usage(1.5, "7", [1]),  # type: ignore[arg-type]
        Usage(True, 3, None),
    ],
    ids=["negative", "huge", "other types", "true"],
)
def test_a_record_can_always_be_read_back(tmp_path: Path, usage: Usage, endpoints: int) -> None:
    """Whatever has counted: a count out of range never reaches the journal."""
    log = CallLog(requests=-1, usage=usage)
    for number in range(endpoints):
        share = log.get_endpoint_usage(f"e{number}", Sink())
        share.usage = share.useful = Usage(-7, 2**63)
    state: ItemState = {"output": {}}
    log.useful, log.useful_endpoint = Usage(-7, 2**63), "e0"
    tools = tools_of(tmp_path, SETTINGS)
    record = RecordBuilder(tools).build(Item(0, "i", {}), state, log, 0.1)
    check_record(record)
    assert record["requests"] == 0
    assert record["prompt_tokens"] in (None, MAX_COUNT)


@pytest.mark.parametrize(
    ("replies", "reasoning", "raw"),
    [
        ([f"<think>so</think>{GOOD}"], "so", GOOD),
        (["<think>so</think>no", f"<think>ah</think>{GOOD}"], "ah", GOOD),
        (["<think>so</think>no", GOOD], None, GOOD),
        (["no", "<think>so</think>no"], "so", "no"),
        ([Reply("<think>so</think>no", "length", None, Usage(), "e", "m", True)], "so", "no"),
    ],
)
async def test_the_reasoning_of_the_last_answer_is_kept(
    tmp_path: Path, replies: list[Any], reasoning: str | None, raw: str
) -> None:
    script = Script(*replies)
    record = await record_of(tmp_path, script, keep_raw=True)
    assert (record.get("reasoning"), record["raw"]) == (reasoning, raw)
    assert "<think>" not in str(script.asked)
