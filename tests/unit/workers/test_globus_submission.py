"""How the Globus Compute backend handles the service's answers, without a service."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import globus_sdk
import orjson
import pytest
import requests

from fanfold.backends.core.errors import (
    BackendError,
    ConfigurationError,
    FanfoldError,
    JournalError,
    RunStoppedError,
    WorkerLostError,
)
from fanfold.backends.core.token_bucket import TokenBucket
from fanfold.backends.workers.globus.backend import TaskSubmitter, make_globus_backends
from fanfold.backends.workers.globus.errors import service_error, task_failed_error
from fanfold.backends.workers.globus.poller import (
    PollPolicy,
    SerialCaller,
    ServiceConnection,
)
from fanfold.backends.workers.globus.service import (
    MAX_REQUEST_BYTES,
    EndpointHealth,
    Payload,
    SubmittedBatch,
    TaskOutcome,
    _read_outcome,
    convert_errors,
    pack_task,
)
from fanfold.backends.workers.globus.tasks import TaskEntry, TaskLog, TaskRegistry
from fanfold.backends.workers.member import PoolPolicy
from fanfold.backends.workers.pool import BackendPool
from fanfold.backends.workers.testing import make_task as rehearsal

AT_ONCE = PollPolicy(
    burst=1000,
    rate_per_s=1000.0,
    min_pause_s=0.0,
    max_pause_s=0.0,
    health_check_s=0.0,
    missing_timeout_s=0.0,
)


class Fake:
    """A service in which each task ends as it is told to."""

    def __init__(self, **ends: Any) -> None:
        self.told: dict[str, Any] = ends
        self.posts: list[tuple[str, str, list[Payload], str | None]] = []
        self.calls = Counter[str]()
        self.healths: dict[str, EndpointHealth] = {}
        self.closed = False

    def register(self, work: Any) -> str:  # noqa: ARG002 - the protocol's form
        self.calls["register"] += 1
        return "function"

    def fetch_health(self, endpoint: str) -> EndpointHealth:
        return self.healths.get(endpoint, EndpointHealth(online=True))

    def submit(
        self, endpoint: str, function: str, payloads: Sequence[Payload], group: str | None
    ) -> SubmittedBatch:
        self.posts.append((endpoint, function, list(payloads), group))
        shards = [shard_of(payload) for payload in payloads]
        if "refused" in shards:
            raise BackendError("a fault")
        return SubmittedBatch("group", tuple(shards))

    def fetch_outcomes(self, tasks: Sequence[str]) -> dict[str, TaskOutcome | None] | None:
        self.calls["ends"] += 1
        found = {task: self.told.get(task, {"shard": task}) for task in tasks}
        for end in found.values():
            if isinstance(end, type):
                raise end("a fault")
        return {task: end for task, end in found.items() if end != "unknown"}

    def close(self) -> None:
        self.closed = True


def shard_of(payload: Payload) -> str:
    length, _, rest = payload.text.partition("\n")
    return str(orjson.loads(rest[: int(length)].removeprefix("11\n"))[0]["shard"])


def desk(fake: Fake, book: TaskLog | None = None, **options: Any) -> TaskSubmitter:
    return TaskSubmitter(
        lambda: fake, lambda order: order, None, TaskRegistry(book), AT_ONCE, **options
    )


def order(shard: str, text: str = "", deadline_s: float = 600.0) -> dict[str, Any]:
    return {"shard": shard, "attempt": 0, "deadline_s": deadline_s, "text": text}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30.0):
        while not condition():  # noqa: ASYNC110 - a thread sets no events
            await asyncio.sleep(0)


async def test_orders_to_one_endpoint_share_requests_by_their_bytes() -> None:
    fake = Fake()
    one = desk(fake)
    await one.open()
    large = "x" * (MAX_REQUEST_BYTES // 3)
    sent = [one.submit("ab"[n % 2], order(f"s{n}", large)) for n in range(10)]
    answers = await asyncio.gather(*sent)
    assert [answer["shard"] for answer in answers] == [f"s{n}" for n in range(10)]
    for endpoint, function, payloads, _ in fake.posts:
        assert function == "function"
        assert sum(payload.size for payload in payloads) <= MAX_REQUEST_BYTES
        assert {"ab"[int(shard_of(payload)[1:]) % 2] for payload in payloads} == {endpoint}
    assert fake.posts[0][3] is None
    assert {post[3] for post in fake.posts[1:]} == {"group"}
    await one.close()
    assert fake.closed


async def test_a_refused_request_harms_nobody_else() -> None:
    fake = Fake()
    one = desk(fake)
    await one.open()
    with pytest.raises(BackendError, match="a fault"):
        await one.submit("a", order("refused"))
    assert (await one.submit("a", order("s")))["shard"] == "s"
    await one.close()


async def test_a_summary_that_a_stopped_run_did_not_take_is_asked_for_again(tmp_path: Path) -> None:
    fake, book = Fake(**{"0-1": None}), TaskLog(tmp_path / "globus.jsonl")
    pool = BackendPool(make_globus_backends(["e"], 1, desk(fake, book)), PoolPolicy())
    await pool.open_run()
    member = await pool.acquire()
    assert member is not None
    run = asyncio.create_task(pool.run(member, rehearsal("0-1", [{}]), None))
    await until(lambda: bool(fake.posts))
    await pool.stop()
    run.cancel()  # it has waited for long enough
    await asyncio.wait({run})
    fake.told.clear()
    await until(lambda: pool.in_flight == 0)
    await pool.close()
    assert [left.task for left in book.read_open()] == ["0-1"]


@pytest.mark.parametrize("error", [KeyError("tasks"), TypeError("no dict"), ValueError("s3cr3t")])
def test_an_answer_that_is_none_may_be_asked_for_again(error: Exception) -> None:
    """A proxy's page, say; it is not shown, and what fanfold says itself stays as it is."""
    said = f"endpoint e: .*{type(error).__name__}"
    with (
        pytest.raises(BackendError, match=said) as caught,
        convert_errors("endpoint e", ["s3cr3t"]),
    ):
        raise error
    assert "s3cr3t" not in caught.value.message
    assert caught.value.__suppress_context__
    with pytest.raises(WorkerLostError, match=r"^died$"), convert_errors("endpoint e"):
        raise WorkerLostError("died")


def test_a_result_cut_short_is_its_own_task_s_end() -> None:
    whole, cut = ({"status": "success", "result": f"11\n{text}"} for text in ('{"v": 1}', '{"v"'))
    assert _read_outcome(whole) == {"v": 1}
    assert isinstance(_read_outcome(cut), ConfigurationError)


async def test_a_letter_is_answered_whatever_happens_to_its_posting() -> None:
    class Broken(Fake):
        def submit(self, *_: Any) -> SubmittedBatch:
            if not self.calls["post"]:
                self.calls["post"] = 1
                raise RuntimeError("unheard of")
            return super().submit(*_)

    one = desk(Broken())
    await one.open()
    with pytest.raises(BackendError, match="not posted"):
        await asyncio.wait_for(one.submit("a", order("s")), 30)
    assert (await one.submit("a", order("s")))["shard"] == "s"
    await one.close()


async def test_ends_that_are_no_summaries() -> None:
    fake = Fake(lost="unknown", failed=WorkerLostError("died"))
    one = desk(fake)
    await one.open()
    with pytest.raises(WorkerLostError, match="no longer knows"):
        await one.submit("a", order("lost"))
    with pytest.raises(WorkerLostError, match="died"):
        await one.submit("a", order("failed"))
    await one.close()


async def test_a_task_may_be_new_to_those_who_are_asked() -> None:
    """The service took it, and says nothing of it at first."""
    fake = Fake(s="unknown")
    one = TaskSubmitter(
        lambda: fake,
        lambda order: order,
        None,
        TaskRegistry(None),
        replace(AT_ONCE, missing_timeout_s=9),
    )
    await one.open()
    task = asyncio.create_task(one.submit("a", order("s")))
    await until(lambda: fake.calls["ends"] >= 3)
    fake.told.clear()
    assert (await task)["shard"] == "s"
    await one.close()


async def test_a_service_that_fails_for_a_while_is_asked_again() -> None:
    fake = Fake(s=BackendError)
    one = desk(fake)
    await one.open()
    task = asyncio.create_task(one.submit("a", order("s")))
    await until(lambda: fake.calls["ends"] >= 3)
    assert not task.done()
    fake.told["s"] = {"shard": "s"}
    assert (await task)["shard"] == "s"
    fake.told["t"] = ConfigurationError  # no login any more
    with pytest.raises(ConfigurationError, match="a fault"):
        await one.submit("a", order("t"))
    await one.close()


async def test_what_is_out_at_the_end_is_told_so() -> None:
    fake = Fake(s=None)
    one = desk(fake)
    await one.open()
    task = asyncio.create_task(one.submit("a", order("s")))
    await until(lambda: bool(fake.posts))
    await one.close()
    with pytest.raises(BackendError, match="closed"):
        await task


async def test_an_endpoint_that_goes_offline_loses_its_tasks_only() -> None:
    fake = Fake(s=None, t=None)
    one = desk(fake)
    await one.open()
    first = asyncio.create_task(one.submit("a", order("s")))
    second = asyncio.create_task(one.submit("b", order("t")))
    await until(lambda: len(fake.posts) == 2)
    fake.healths["a"] = EndpointHealth(online=False)
    with pytest.raises(WorkerLostError, match="endpoint a is offline"):
        await first
    assert (one.poller.is_online("a"), one.poller.is_online("b")) == (False, True)
    fake.told["t"] = {"shard": "t"}
    assert (await second)["shard"] == "t"
    fake.healths.clear()
    await one.poller.check_endpoint("a")
    assert one.poller.is_online("a")
    await one.close()


async def test_results_that_arrive_after_their_loss_are_kept(tmp_path: Path) -> None:
    """One request asks for those of all shards; each is given once, and its task is closed."""
    book = TaskLog(tmp_path / "book")
    fake = Fake(s=None, t=None, u=None, v=None)
    one = desk(fake, book)
    await one.open()
    sent = [asyncio.create_task(one.submit("a", order(shard))) for shard in "stu"]
    other = asyncio.create_task(one.submit("b", order("v")))
    await until(lambda: len(book.read_open()) == 4)
    fake.healths["a"] = EndpointHealth(online=False)
    errors = await asyncio.gather(*sent, return_exceptions=True)
    assert {type(error) for error in errors} == {WorkerLostError}
    fake.told |= {"s": {"shard": "s"}, "t": {"shard": "t"}, "u": WorkerLostError("died")}
    fake.told["v"] = {"shard": "v"}
    await other
    asked = fake.calls["ends"]
    assert await one.collect("s") == {"shard": "s"}
    assert fake.calls["ends"] == asked + 1
    assert await one.collect("t") == {"shard": "t"}
    assert await one.collect("s") is None
    assert await one.collect("u") is None
    assert await one.collect("v") is None
    await one.close()
    assert [left.task for left in book.read_open()] == ["u"]


async def test_a_shard_in_flight_again_is_not_collected() -> None:
    """Its new task brings the result; an older one would be kept for nothing."""
    fake = Fake(s=None)
    one = desk(fake)
    await one.open()
    first = asyncio.create_task(one.submit("a", order("s")))
    await until(lambda: bool(fake.posts))
    fake.healths["a"] = EndpointHealth(online=False)
    with pytest.raises(WorkerLostError):
        await first
    fake.healths.clear()
    again = asyncio.create_task(one.submit("b", order("s")))
    await until(lambda: len(fake.posts) == 2 and one.poller.is_polled("s"))
    assert await one.collect("s") is None
    fake.told["s"] = {"shard": "s"}
    assert await again == {"shard": "s"}
    await one.close()


@pytest.mark.parametrize("unknown", [["t3"], ["t0", "t7"], [f"t{n}" for n in range(8)]])
async def test_an_unknown_task_hides_no_other(unknown: list[str]) -> None:
    """Even if the service refuses each request that names one."""

    class Refusing(Fake):
        def fetch_outcomes(self, tasks: Sequence[str]) -> dict[str, TaskOutcome | None] | None:
            if set(unknown) & set(tasks):
                return None
            return super().fetch_outcomes(tasks)

    one = desk(Refusing())
    await one.open()
    sent = [one.submit("a", order(f"t{n}")) for n in range(8)]
    answers = await asyncio.gather(*sent, return_exceptions=True)
    lost = [f"t{n}" for n, answer in enumerate(answers) if isinstance(answer, WorkerLostError)]
    assert lost == unknown
    assert sum(isinstance(answer, dict) for answer in answers) == 8 - len(unknown)
    await one.close()


async def test_of_several_tasks_of_a_shard_one_is_enough(tmp_path: Path) -> None:
    book = TaskLog(tmp_path / "book")
    book.write([], [entry("t1", "0-1"), entry("t2", "0-1"), entry("t3", "1-2", "gone")])
    fake = Fake(t1="unknown", t2={"shard": "0-1"}, t3=WorkerLostError("died"))
    one = desk(fake, book)
    await one.open()
    left = one.tasks.take_orphaned("e", ["e", "f"], one.poller)
    assert left.keys() == {"0-1", "1-2"}, "the first endpoint speaks for those that are gone"
    assert one.tasks.take_orphaned("e", ["e", "f"], one.poller) == {}
    assert fake.calls["ends"] == 0, "asked before anybody wants to know"
    assert (await left["0-1"])["shard"] == "0-1"
    with pytest.raises(WorkerLostError, match=r"died.*earlier coordinator"):
        await left["1-2"]
    await one.close()
    assert [entry.task for entry in book.read_open()] == ["t3"]


def entry(task: str, shard: str, endpoint: str = "e") -> TaskEntry:
    return TaskEntry(shard, task, "group", endpoint, 0.0)


def test_a_torn_line_of_the_book_is_left_out_and_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "book"
    book = TaskLog(path)
    assert book.read_open() == []
    book.write([], [entry("t1", "0-1")])
    with path.open("ab") as file:
        file.write(b'{"shard": "1-')
    assert [e.task for e in book.read_open()] == ["t1"]
    book.write(["t1"], [entry("t2", "1-2")])
    assert [e.task for e in book.read_open()] == ["t2"]
    path.write_bytes(b'{"shard": 1}\n' + path.read_bytes())
    with pytest.raises(JournalError, match="line 1: damaged"):
        book.read_open()


def test_a_long_torn_line_of_the_book_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "book"
    book = TaskLog(path)
    book.write([], [entry("t1", "0-1")])
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"closed":["' + b"x" * 10_000)
    book.write([], [entry("t2", "1-2")])
    assert path.read_bytes().startswith(whole + b'{"shard":"1-2"')
    assert [e.task for e in book.read_open()] == ["t1", "t2"]


@pytest.mark.parametrize("damage", ["bit", "repeated", "removed", "moved", "cut of its head"])
def test_damage_of_the_book_is_told(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "book"
    TaskLog(path).write([], [entry("t1", "0-1"), entry("t2", "1-2")])
    TaskLog(path).write(["t1"], [entry("t3", "2-3")])
    assert [e.task for e in TaskLog(path).read_open()] == ["t2", "t3"]
    one, two, three, four = path.read_bytes().splitlines(keepends=True)
    changed = {
        "bit": [one, two.replace(b"t2", b"t0"), three, four],
        "repeated": [one, two, one, three, four],
        "removed": [one, two, four],
        "moved": [two, one, three, four],
        "cut of its head": [two, three, four],
    }
    path.write_bytes(b"".join(changed[damage]))
    with pytest.raises(JournalError, match=r"line [123]: damaged \(the checksum"):
        TaskLog(path).read_open()


def test_an_order_travels_as_json_in_the_services_form() -> None:
    payload = pack_task({"shard": "ü", "rows": ['"\\\n']})
    length, _, rest = payload.text.partition("\n")
    arguments, keywords = rest[: int(length)], rest[int(length) :]
    assert orjson.loads(arguments.removeprefix("11\n")) == [{"shard": "ü", "rows": ['"\\\n']}]
    assert keywords == "5\n11\n{}"
    with pytest.raises(ConfigurationError, match=r"lower shard\.items"):
        pack_task({"shard": "0-1", "text": "x" * MAX_REQUEST_BYTES})


@pytest.mark.parametrize(
    ("text", "kind", "advice"),
    [
        ("Traceback\nRuntimeError: Function x not permitted on endpoint y", ConfigurationError,
         "fanfold globus register"),
        ("a.MaxResultSizeExceeded: 11 > 10", RunStoppedError, "shard.items"),
        ("ModuleNotFoundError: No module named 'fanfold'\n----", ConfigurationError, "install"),
        ("parsl.executors.errors.WorkerLost: Task failure due to loss of worker", WorkerLostError,
         "loss of worker"),
        ("BadStateException\n\tSTDERR: fanfold 0.9 is required here, found 0.1", ConfigurationError,
         "failed: STDERR: fanfold 0.9 is required here, found 0.1; install"),
        ("", WorkerLostError, "no reason given"),
    ],
)  # fmt: skip
def test_failed_tasks_say_what_to_do(text: str, kind: type[FanfoldError], advice: str) -> None:
    error = task_failed_error(text)
    assert type(error) is kind
    assert advice in error.message


@pytest.mark.parametrize(
    ("status", "kind", "advice"),
    [
        (401, ConfigurationError, "log in"),
        (403, ConfigurationError, "may not use it"),
        (404, ConfigurationError, "backend.endpoints"),
        (413, ConfigurationError, "shard.items"),
        (422, ConfigurationError, "backend.user_endpoint_config"),
        (429, BackendError, "status.globus.org"),
        (503, BackendError, "status.globus.org"),
    ],
)
def test_refusals_say_what_to_do(status: int, kind: type[FanfoldError], advice: str) -> None:
    response = requests.Response()
    response.status_code, response._content = status, b'{"reason": "because"}'
    response.headers["Content-Type"] = "application/json"
    response.request = requests.Request("GET", "http://127.0.0.1/").prepare()
    error = service_error(globus_sdk.GlobusAPIError(response), "endpoint e")
    assert type(error) is kind
    assert "because" in error.message
    assert advice in error.message


@pytest.mark.parametrize(
    ("reason", "kind", "words"),
    [
        ("k: s3cr3t is\n bad\n\nFailed validating s", ConfigurationError, "k: ********** is bad; "),
        (
            "PID: 1\n\nAnother instance of this endpoint is running.",
            BackendError,
            "restarts after three heartbeats",
        ),
    ],
)
def test_what_a_manager_refuses(reason: str, kind: type[FanfoldError], words: str) -> None:
    """It shows no secret; and an endpoint that was killed comes again."""
    response = requests.Response()
    response.status_code, response._content = 422, orjson.dumps({"reason": reason})
    response.headers["Content-Type"] = "application/json"
    response.request = requests.Request("POST", "http://127.0.0.1/").prepare()
    error = service_error(globus_sdk.GlobusAPIError(response), "endpoint e", ["s3cr3t"])
    assert type(error) is kind
    assert words in error.message


async def test_turns_do_not_gather_behind_a_slow_answer() -> None:
    """Else those that were granted meanwhile would all be asked at once."""
    held, turns = threading.Event(), list[int]()

    class Counting(TokenBucket):
        def take(self, amount: float, now: float) -> float:
            turns.append(1)
            return super().take(amount, now)

    talk = ServiceConnection(Fake, AT_ONCE)
    await talk.open()
    talk._bucket = Counting(AT_ONCE.rate_per_s, AT_ONCE.burst)
    asked = [asyncio.create_task(talk.request(lambda _: held.wait(30))) for _ in range(3)]
    for _ in range(20):
        await asyncio.sleep(0)
    assert len(turns) == 1
    held.set()
    assert await asyncio.gather(*asked) == [True] * 3
    assert len(turns) == 3
    await talk.close()


def health(engine: str, holds: int = 0) -> EndpointHealth:
    details = {"engine_type": engine, "outstanding_tasks": holds, "heartbeat_period": 10}
    return EndpointHealth.from_json({"status": "online", "details": details})


@pytest.mark.parametrize(
    ("state", "age_s", "idle", "lost"),
    [
        (EndpointHealth.from_json({"status": "offline"}), 0.0, False, "offline"),
        (health("GlobusComputeEngine", 0), 31.0, True, "restarted"),
        (health("GlobusComputeEngine", 0), 31.0, False, None),  # may just be coming home
        (health("GlobusComputeEngine", 0), 29.0, True, None),  # the report may be older
        (health("GlobusComputeEngine", 1), 9e9, True, None),  # waits in a batch system's queue
        (health("ThreadPoolEngine", 0), 31.0, True, None),  # does not count
        (health("ThreadPoolEngine", 0), 201.0, True, "deadline_s"),
        (EndpointHealth.from_json({"status": "online"}), 9e9, True, None),  # a manager
    ],
)
def test_what_an_endpoint_has_lost(
    state: EndpointHealth, age_s: float, idle: bool, lost: str | None
) -> None:
    error = state.task_error("e", age_s, 100.0, idle)
    assert (lost in error.message) if lost and error else (error is None and lost is None)


def test_no_ten_seconds_see_more_than_seventeen_requests() -> None:
    now, turns, policy = 1000.0, list[float](), PollPolicy()
    bucket = TokenBucket(policy.rate_per_s, policy.burst)
    for n in range(200):
        if n % 40 == 0:
            now += 30.0
        now += bucket.take(1.0, now)
        turns.append(now)
    counts = [sum(t <= other < t + 10.000001 for other in turns) for t in turns]
    assert max(counts) == 17


async def test_a_call_that_hangs_holds_nobody_up() -> None:
    line, release = SerialCaller(), threading.Event()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(line.call(release.wait), 0.01)
    line.close()
    assert await SerialCaller().call(str.upper, "x") == "X"
    assert any(thread.name == "globus" and thread.daemon for thread in threading.enumerate())
    release.set()
