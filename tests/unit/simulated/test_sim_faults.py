from __future__ import annotations

from dataclasses import replace

import pytest

from fanfold.backends.simulated.engine import EngineRequest
from fanfold.backends.simulated.faults import FaultContext, FaultInjector, FaultRule
from fanfold.backends.simulated.node import Node, QuestionLog
from fanfold.backends.simulated.routes import metrics_text
from fanfold.backends.simulated.values import ApiError

CALL = FaultContext(node=0, arrival=1, key=b"k", attempt=0, now=0.0)


def struck(book: FaultInjector, call: FaultContext) -> str | None:
    rule = book.decide(call).rule
    return rule.kind if rule else None


def test_item_draws_follow_the_item_everywhere() -> None:
    book = FaultInjector(1, 8, (FaultRule("500", p=0.3, draw="item"),))
    fates = {}
    for n in range(300):
        key = b"%d" % n
        calls = [
            FaultContext(node=k, arrival=7 * k + n, key=key, attempt=k, now=float(k))
            for k in range(8)
        ]
        found = {struck(book, call) for call in calls}
        assert len(found) == 1
        fates[key] = found.pop()
    assert sum(fate is not None for fate in fates.values()) == pytest.approx(90, abs=30)


def test_arrival_draws_do_not_depend_on_the_item() -> None:
    one, two = (FaultInjector(1, 2, (FaultRule("500", p=0.5),)) for _ in range(2))
    first = [struck(one, replace(CALL, arrival=n, key=b"a")) for n in range(50)]
    assert first == [struck(two, replace(CALL, arrival=n, key=b"b")) for n in range(50)]
    assert set(first) == {None, "500"}


def test_attempt_draws_change_with_the_attempt_only() -> None:
    book = FaultInjector(1, 2, (FaultRule("500", p=0.5, draw="attempt"),))
    fates = [struck(book, replace(CALL, attempt=n)) for n in range(50)]
    assert set(fates) == {None, "500"}
    assert fates == [struck(book, replace(CALL, attempt=n, node=1, arrival=9)) for n in range(50)]


def test_seeds_differ() -> None:
    books = [FaultInjector(seed, 1, (FaultRule("500", p=0.5),)) for seed in (1, 2)]
    one, two = ([struck(book, replace(CALL, arrival=n)) for n in range(40)] for book in books)
    assert one != two


def test_window_and_count_limit() -> None:
    book = FaultInjector(0, 1, (FaultRule("503", window=(1.0, 2.0), max_count=2),))
    times = [0.9, 1.0, 1.5, 1.6, 2.0]
    assert [struck(book, replace(CALL, now=t)) for t in times] == [None, "503", "503", None, None]


@pytest.mark.parametrize(
    ("nodes", "count"), [(None, 8), (0.25, 2), (0.3, 3), ((1, 5), 2), (0.0, 0)]
)
def test_nodes_concerned(nodes: tuple[int, ...] | float | None, count: int) -> None:
    book = FaultInjector(0, 8, (FaultRule("500", nodes=nodes),))
    assert sum(struck(book, replace(CALL, node=k)) == "500" for k in range(8)) == count


def test_the_first_rule_wins_and_slowness_multiplies() -> None:
    rules = (FaultRule("slow", value=0.5), FaultRule("500"), FaultRule("slow", value=0.1))
    strike = FaultInjector(0, 1, (*rules, FaultRule("503"))).decide(CALL)
    assert strike.rule == FaultRule("500")
    assert strike.speed == pytest.approx(0.05)


def test_stream_faults_spare_plain_answers() -> None:
    book = FaultInjector(0, 1, (FaultRule("stream_cut"),))
    assert struck(book, CALL) is None
    assert struck(book, replace(CALL, stream=True)) == "stream_cut"


def test_repair_rounds_may_be_spared() -> None:
    book = FaultInjector(0, 1, (FaultRule("bad_schema", first_round=True),))
    assert struck(book, CALL) == "bad_schema"
    assert struck(book, replace(CALL, first_round=False)) is None


def test_cold_nodes_warm_up_from_the_first_request() -> None:
    book = FaultInjector(0, 2, (FaultRule("cold", nodes=(0,), value=10.0),))
    assert book.is_cold(0, 100.0)
    assert not book.is_cold(1, 100.0)
    times = [100.0, 105.0, 110.0]
    assert [struck(book, replace(CALL, now=t)) for t in times] == ["cold", "cold", None]
    assert not book.is_cold(0, 110.0)


def test_token_window() -> None:
    book = FaultInjector(0, 1, (FaultRule("tpm", value=100.0),))
    assert struck(book, CALL) is None
    book.record_tokens(0, 60, now=1.0)
    book.record_tokens(0, 60, now=2.0)
    assert struck(book, replace(CALL, now=59.0)) == "tpm"
    assert struck(book, replace(CALL, now=60.0)) is None


def test_tokens_expire() -> None:
    book = FaultInjector(0, 1, (FaultRule("401_after", value=5.0),))
    assert struck(book, replace(CALL, token="old")) is None
    assert struck(book, replace(CALL, token="old", now=5.0)) == "401_after"
    assert struck(book, replace(CALL, token="new", now=6.0)) is None


def test_properties_of_nodes() -> None:
    book = FaultInjector(0, 2)
    book.add(FaultRule("context", nodes=(1,), value=64.0))
    book.add(FaultRule("keepalive_race", nodes=(1,), window=(0.0, 5.0)))
    assert [book.max_model_len(k, 0.0, 1000) for k in (0, 1)] == [1000, 64]
    assert [book.idle_s(k, 0.0) for k in (0, 1)] == [None, 5.0]
    assert book.idle_s(1, 6.0) is None
    assert struck(book, replace(CALL, node=1)) is None
    book.clear()
    assert book.max_model_len(1, 0.0, 1000) == 1000


def test_servings_count_duplicates_and_waste() -> None:
    book = QuestionLog()
    assert [book.record_arrival(b"a"), book.record_arrival(b"a"), book.record_arrival(b"b")] == [
        0,
        1,
        0,
    ]
    book.record_answer(b"a", 10, 1.0)
    book.record_answer(b"a", 10, 2.0)
    assert book.summary() == {
        "distinct": 2,
        "answered": 1,
        "served": 2,
        "duplicates": 1,
        "wasted_tokens": 10,
    }
    assert book.by_key()[b"a".hex()]["last_s"] == 2.0


class Work:
    def __init__(self) -> None:
        self.started = 0

    def start(self) -> None:
        self.started += 1

    def make_engine_request(self) -> EngineRequest:
        raise AssertionError("the node has no engine")


def test_a_node_serves_first_come_first_served() -> None:
    node = Node(0, slots=2, queue_limit=2, speed=1.0)
    works = [Work() for _ in range(5)]
    for work in works[:4]:
        node.admit(work)
    with pytest.raises(ApiError, match="limit of 2 queued") as caught:
        node.admit(works[4])
    assert (caught.value.status, caught.value.kind) == (503, "Service Unavailable")
    assert [work.started for work in works] == [1, 1, 0, 0, 0]
    node.release(works[2])  # leaves the queue
    node.release(works[0])
    assert [work.started for work in works] == [1, 1, 0, 1, 0]
    assert (node.running, node.waiting, node.counts.waiting_max) == (2, 0, 2)


def test_metrics_have_the_names_that_clients_read() -> None:
    text = metrics_text(Node(0, 4, None, 1.0), 'a"b').decode()
    assert 'vllm:num_requests_running{engine="0",model_name="a\\"b"} 0.0' in text
    names = {line.split("{")[0] for line in text.splitlines() if not line.startswith("#")}
    assert {"vllm:num_requests_waiting", "vllm:generation_tokens_total"} <= names
