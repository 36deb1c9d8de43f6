"""``make bench-quick`` and ``make bench``: the published figures.

Each case runs whole processes against a simulated fleet in another process, and alternates its
sides round by round. ``bench-quick`` is to take 3 minutes on two idle cores, ``bench`` 30. A case
that fails is named on the page; the figures of the others are kept.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import os
import signal
import subprocess
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any, Final
from urllib.parse import urlsplit

import pyarrow.parquet as pq

from fanfold.backends.core.process import ensure_open_files
from fanfold.backends.core.types import Outcome
from fanfold.backends.simulated.faults import FaultRule
from fanfold.backends.simulated.process import launch
from fanfold.backends.simulated.spec import SimulationSpec
from fanfold.nodes.aggregators.registry import build_aggregators

from .figures import OtherPrograms, Page, Table, describe_machine, write_figures
from .prefix import POLICIES, measure_one
from .prefix_workloads import make_workloads

FOLDER: Final = Path(__file__).parent
DOCS: Final = FOLDER.parents[1] / "docs" / "benchmarks"
SCHEMA: Final = {
    "type": "object",
    "additionalProperties": False,
    "required": ["score", "kind", "reason"],
    "properties": {
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "kind": {"type": "string", "enum": ["a", "b", "c"]},
        "reason": {"type": "string", "minLength": 200, "maxLength": 400},
    },
}
SYSTEM, PROMPT = "You judge short texts.", "Judge this text: {text}"
TEXT: Final = "some text of a record " * 9
STREAMS: Final = 256
_LONGEST_S: Final = 2400.0
_LONGEST_WAIT_S: Final = 300.0
_DONE, _SOME_FAILED, _BUDGET_EXHAUSTED = 0, 3, 4
"""Exit codes of `fanfold run`."""


@dataclass(frozen=True, slots=True)
class Spent:
    """What a process took: CPU and wall seconds, peak memory in MB, and its JSON output."""

    cpu_s: float
    wall_s: float
    peak_mb: float
    said: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Place:
    """A scratch folder with the input, and the URLs of a simulated fleet."""

    folder: Path
    urls: tuple[str, ...]

    def run(self, command: list[str], codes: Collection[int] = (_DONE,)) -> Spent:
        """Run a command to its end.

        Args:
            command: The command.
            codes: Exit codes of a valid measurement.

        Raises:
            RuntimeError: It ended with another code, or did not end.
        """
        meter = [sys.executable, "-S", str(FOLDER / "meter.py"), "spent.json"]
        began = time.monotonic()
        with (
            (self.folder / "errors.txt").open("w+b") as errors,
            subprocess.Popen(
                meter + command,
                cwd=self.folder,
                stdout=subprocess.PIPE,
                stderr=errors,
                start_new_session=True,
            ) as process,
        ):
            try:
                out, _ = process.communicate(timeout=_LONGEST_S)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                raise
            wall = time.monotonic() - began
            if process.returncode not in codes:
                errors.seek(0)
                last = errors.read().decode(errors="replace").strip()[-300:]
                named = " ".join(command[-8:])
                raise RuntimeError(f"... {named} ended with {process.returncode}: {last}")
        spent = json.loads((self.folder / "spent.json").read_text())
        said = json.loads(out) if out.startswith(b"{") else {}
        return Spent(spent["cpu_s"], wall, spent["peak_mb"], said)

    def fanfold(self, out: str, items: int, *more: str) -> list[str]:
        """Return the command of a run of the first items."""
        command = [sys.executable, "-P", "-m", "fanfold", "run", "bench.yaml", "--json"]
        command += ["--endpoints", ",".join(self.urls), "--out", out, "--limit", str(items)]
        return [*command, *more]

    def control(self, route: str, data: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a request to the control plane of the fleet: POST if there is data."""
        url = f"http://{urlsplit(self.urls[0]).netloc}/_sim/{route}"
        body = None if data is None else json.dumps(data).encode()
        with urllib.request.urlopen(url, body) as answer:
            said: dict[str, Any] = json.loads(answer.read())
        return said

    def wait_for_requests(self, number: int) -> None:
        """Wait until the fleet has had so many requests.

        Raises:
            TimeoutError: There are fewer after a long time: the program that sends them has failed.
        """
        until = time.monotonic() + _LONGEST_WAIT_S
        while (seen := self.count_requests()["requests"]) < number:
            if time.monotonic() > until:
                raise TimeoutError(f"{seen} of {number} requests after {_LONGEST_WAIT_S:g} s")
            time.sleep(0.05)

    def count_requests(self) -> dict[str, int]:
        """Return the fleet's own totals."""
        nodes = self.control("stats")["nodes"]
        names = ("requests", "prompt_tokens", "completion_tokens")
        return {name: sum(node.get(name, 0) for node in nodes) for name in names}


@contextmanager
def open_place(spec: SimulationSpec, items: int) -> Iterator[Place]:
    """Start a fleet, and write the input and the configuration."""
    with TemporaryDirectory(prefix="fanfold-bench-") as name, asyncio.Runner() as runner:
        folder = Path(name)
        with (folder / "items.csv").open("w") as file:
            file.write("id,text\n")
            file.writelines(f"i{n},{TEXT}{n}\n" for n in range(items))
        settings = {
            "name": "bench",
            "input": {"path": "items.csv", "id": "id"},
            "task": {"system": SYSTEM, "prompt": PROMPT, "schema": SCHEMA},
            "endpoints": {"urls": []},
            "limits": {"streams": STREAMS},
            "reduce": [
                {"op": "top_k", "field": "score", "k": 20},
                {"op": "stats", "field": "score"},
            ],
        }
        (folder / "bench.yaml").write_text(json.dumps(settings))
        schema = {"name": "answer", "schema": SCHEMA, "strict": True}
        body = {
            "model": spec.model,
            "temperature": 0,
            "max_completion_tokens": 256,
            "response_format": {"type": "json_schema", "json_schema": schema},
        }
        task = {"system": SYSTEM, "prompt": PROMPT, "body": body}
        (folder / "task.json").write_text(json.dumps(task))
        fleet = launch(spec)
        up = runner.run(fleet.__aenter__())
        try:
            yield Place(folder, tuple(up.urls))
        finally:
            runner.run(fleet.__aexit__(None, None, None))


@dataclass(frozen=True, slots=True)
class Side:
    """One program of the comparison.

    Attributes:
        command: Returns the command for a number of items and a round.
        low: Items of its short run; the cost of an item is the difference to the long one.
        high: Items of its long run.
    """

    command: Callable[[int, int], list[str]]
    low: int
    high: int


def measure_cost(quick: bool) -> list[Table]:
    """CPU of each further item, and memory: the floor, fanfold, and the plain LangGraph program."""
    low, high, rounds = (1_000, 5_000, 3) if quick else (2_000, 10_000, 3)
    naive_items = 200 if quick else 1_000
    table = Table(
        "cost",
        "What does an item cost?",
        "CPU ms per item",
        f"CPU time of the client: the difference of runs of {high:,} and {low:,} items, divided by "
        f"that of the items, with {STREAMS} in flight. So the start of the programs does not "
        "count. The floor is an aiohttp loop without retries, journal and checks. Naive LangGraph "
        "is a `Send` per item with stock `ChatOpenAI` and `SqliteSaver`, of "
        f"{naive_items:,} items and one.",
    )
    memory = Table(
        "cost-memory",
        "How much memory does it take?",
        "MB at most",
        "Peak resident memory of the longer runs.",
    )
    with open_place(SimulationSpec.fast(nodes=8, max_num_seqs=64), high) as place:
        sides = {
            "raw aiohttp": Side(lambda n, _: _script(place, "floor.py", n), low, high),
            "fanfold run": Side(lambda n, r: place.fanfold(f"cost-{n}-{r}", n), low, high),
            "naive LangGraph": Side(lambda n, _: _script(place, "naive.py", n), 1, naive_items),
        }
        for number in range(rounds):
            # There and back again, so that no side always follows the same one.
            for name in list(sides) if number % 2 == 0 else reversed(sides):
                side = sides[name]
                short = place.run(side.command(side.low, number))
                whole = place.run(side.command(side.high, number))
                table.add(name, 1000 * (whole.cpu_s - short.cpu_s) / (side.high - side.low))
                memory.add(name, whole.peak_mb)
    for one in (table, memory):
        one.rows = {name: one.rows[name] for name in sides}
    return [table, memory]


def _script(place: Place, name: str, items: int) -> list[str]:
    return [sys.executable, str(FOLDER / name), place.urls[0], str(items), str(STREAMS)]


def measure_profile(quick: bool) -> list[Table]:
    """The parts of the program that an item's CPU time goes to."""
    items = 3_000 if quick else 20_000
    table = Table(
        "profile",
        "Where does the CPU time of an item go?",
        "% of the CPU time",
        f"A run of {items:,} items of the kind above, looked at every 2 ms of its CPU time: the "
        "innermost function that belongs to a part counts, with all that it calls in compiled "
        "code. Parts below 1 % are left out.",
        better="",
    )
    with open_place(SimulationSpec.fast(nodes=8, max_num_seqs=64), items) as place:
        run = place.fanfold("profile", items)
        start = run.index("fanfold")
        sampled = [*run[:start], "fanfold.tests.benchmarks.sampling", "profile.json"]
        place.run([*sampled, *run[start + 1 :]])
        counts: dict[str, int] = json.loads((place.folder / "profile.json").read_text())
    total = sum(counts.values())
    for part, count in sorted(counts.items(), key=lambda one: -one[1]):
        if count >= total / 100:
            table.add(part, 100 * count / total)
    return [table]


def measure_items(quick: bool) -> list[Table]:
    """CPU per item and memory for growing inputs."""
    rounds = {1_000: 3, 10_000: 1} if quick else {1_000: 5, 10_000: 3, 100_000: 1, 1_000_000: 1}
    cost = Table(
        "items-cpu",
        "Does an item cost more in a large run?",
        "CPU ms per item",
        "The coordinator's CPU time net of a run of one item just before; answers of 8 tokens "
        "without a schema. A small run takes little more than its start, whose variation is most "
        "of the range.",
    )
    memory = Table(
        "items-memory",
        "How much memory does a large run take?",
        "MB at most",
        "Peak resident memory of the coordinator.",
    )
    spec = replace(SimulationSpec.fast(nodes=8, max_num_seqs=64), output_tokens=(8, 8))
    with open_place(spec, max(rounds)) as place:
        for count, times in rounds.items():
            for number in range(times):
                one = place.run(place.fanfold(f"one-{count}-{number}", 1, *_PLAIN))
                found = place.run(place.fanfold(f"items-{count}-{number}", count, *_PLAIN))
                row = f"{count:,} items"
                cost.add(row, 1000 * (found.cpu_s - one.cpu_s) / (count - 1))
                memory.add(row, found.peak_mb)
    return [cost, memory]


def measure_streams(quick: bool) -> list[Table]:
    """How busy streams are kept, and what the client takes of the wall time."""
    # One process makes about a thousand calls a second: ten thousand streams need longer answers.
    answers = {10: 2.0, 100: 2.0, 1_000: 2.0, 10_000: 20.0}
    if quick:
        answers = {10: 1.0, 1_000: 2.0}
    spread = 0.2
    used = Table(
        "streams",
        "Are all streams kept busy?",
        "% of the possible throughput",
        "Items in flight: those of the middle half of the run times the mean time of an "
        "answer, divided by streams times the time in which they ended. The answers' times have a "
        "spread (lognormal, 0.2). One process makes about a thousand calls a second, on a core of "
        "its own: more streams of short answers would wait for it.",
        "more",
    )
    share = Table(
        "client-share",
        "How much of the wall time is the client's?",
        "% of one core",
        "CPU time of the coordinator divided by wall time, of the same runs. The start counts, "
        "which is most of it with 10 streams.",
    )
    for count, answer_s in answers.items():
        mean_s = answer_s * math.exp(spread**2 / 2)
        ensure_open_files(count)
        items, tokens = 4 * count, 100
        spec = SimulationSpec(
            nodes=20,
            max_num_seqs=max(1, 2 * count // 20),
            ttft_s=0.0,
            prefill_rate=1e9,
            tpot_s=answer_s / tokens,
            output_tokens=(tokens, tokens),
            alpha=0.0,
            jitter=spread,
        )
        with open_place(spec, items) as place:
            more = ["--set", f"limits.streams={count}", "--set", "task.schema=null"]
            more += ["--set", "reduce=[]", "--set", "limits.hedge=false"]
            more += ["--set", f"limits.endpoint_streams={max(1, 2 * count // 20)}"]
            found = place.run(place.fanfold("streams", items, *more))
            ends = _read_ends(place.folder / "streams")
        worked_s = ends[-count - 1] - ends[count - 1]  # while all streams are in use
        row = f"{count:,} streams of {answer_s:g} s"
        used.add(row, 100 * (items - 2 * count) * mean_s / (count * worked_s))
        share.add(row, 100 * found.cpu_s / found.wall_s)
    return [used, share]


def _read_ends(folder: Path) -> list[float]:
    """Return the times at which items ended, in seconds, sorted."""
    column = pq.read_table(folder / "results.parquet", columns=["finished_at"])["finished_at"]
    times = [datetime.fromisoformat(str(one)) for one in column.to_pylist()]
    return sorted(one.replace(tzinfo=one.tzinfo or UTC).timestamp() for one in times)


def measure_faults(quick: bool) -> list[Table]:
    """Throughput through a storm and back, and what a kill and poison items cost."""
    items, length_s = (2_000, 12.0) if quick else (15_000, 45.0)
    after_s = length_s / 6
    spec = _make_steady(items, length_s)
    storm = Table(
        "storm",
        "What does a failure storm cost, and is the throughput back afterwards?",
        "items/s",
        "In the middle of the run, for a quarter of its time, half of the requests to half of the "
        "nodes fail (HTTP 500, 503, broken connections). Afterwards these nodes are probed before "
        "they get items again. The last items of the run do not count.",
        "more",
    )
    lost = Table(
        "storm-failed",
        "How many items does the storm cost?",
        "% of the items",
        "Items of the same run that failed because all of their attempts did "
        "(`limits.attempts`); `resume --retry-failed` asks them again.",
    )
    with open_place(spec, items) as place, ThreadPoolExecutor(1) as threads:
        running = threads.submit(
            place.run, place.fanfold("storm", items, *_PLAIN), (_DONE, _SOME_FAILED)
        )
        place.wait_for_requests(int(0.35 * items))
        began = time.time()
        for kind in ("500", "503", "drop"):
            place.control("fault", {"kind": kind, "nodes": [0, 1, 2, 3], "p": 0.2})
        time.sleep(length_s / 4)
        place.control("reset", {})
        ended = time.time()
        found = running.result()
        ends = _read_ends(place.folder / "storm")
    assert found.said["done"] + found.said["failed"] == items, found.said
    lost.add("failed", 100 * found.said["failed"] / items)
    for name, low, high in (
        ("before", ends[0], began),
        ("during", began, ended),
        (f"first {after_s:g} s after", ended, min(ended + after_s, ends[-STREAMS])),
        ("later", ended + after_s, ends[-STREAMS]),
    ):
        if high <= low:
            continue
        storm.add(name, sum(low <= one < high for one in ends) / max(high - low, 1e-9))
    spec = _make_steady(items, length_s / 2)
    tables = [storm, lost, *_measure_kill(spec, items)]
    return tables if quick else [*tables, *_measure_poison(spec, items)]


def _make_steady(items: int, length_s: float) -> SimulationSpec:
    """Return a fleet that answers all items in ``length_s`` with 256 in flight."""
    return SimulationSpec(
        nodes=8,
        max_num_seqs=32,
        ttft_s=0.0,
        prefill_rate=1e9,
        tpot_s=STREAMS * length_s / items / 100,
        output_tokens=(100, 100),
        alpha=0.0,
        jitter=0.2,
    )


_PLAIN: Final = ("--set", "task.schema=null", "--set", "reduce=[]")


def _with_faults(spec: SimulationSpec, faults: list[FaultRule]) -> SimulationSpec:
    return replace(spec, faults=tuple(faults))


def _measure_kill(spec: SimulationSpec, items: int) -> list[Table]:
    table = Table(
        "kill",
        "How many items are asked twice after kill -9?",
        "% of the items",
        f"A run of {items:,} items with {STREAMS} in flight is killed in the middle and resumed; "
        "the fleet's own count of requests above the items. At most the items in flight can be.",
    )
    with open_place(spec, items) as place:
        command = place.fanfold("kill", items, *_PLAIN, "--set", "limits.hedge=false")
        with subprocess.Popen(
            command, cwd=place.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process:
            try:
                place.wait_for_requests(items // 2)
            finally:
                process.kill()
        resumed = place.run([sys.executable, "-P", "-m", "fanfold", "resume", "kill", "--json"])
        assert resumed.said["done"] == items, resumed.said
        table.add("asked twice", 100 * (place.count_requests()["requests"] - items) / items)
        table.add("in flight at the kill", 100 * STREAMS / items)
    return [table]


def _measure_poison(spec: SimulationSpec, items: int) -> list[Table]:
    table = Table(
        "poison",
        "Do poison items hold up the others?",
        "seconds",
        "One item in a hundred fails on every node (HTTP 500), against the same run without.",
    )
    for row, faults in (
        ("no failures", []),
        ("1 % poison items", [FaultRule("500", p=0.01, draw="item")]),
    ):
        with open_place(_with_faults(spec, faults), items) as place:
            found = place.run(place.fanfold("poison", items, *_PLAIN), (_DONE, _SOME_FAILED))
            assert found.said["done"] + found.said["failed"] == items
            table.add(row, found.said["seconds"])
    return [table]


def measure_budget(quick: bool) -> list[Table]:
    """How much of a budget is used, by the fleet's own count."""
    items, rounds = (1_000, 1) if quick else (8_000, 3)
    table = Table(
        "budget",
        "How much of a token budget is used?",
        "% of the limit",
        f"A limit of about half of what {items:,} items need, by the servers' own count of "
        "tokens. It must never exceed 100.",
        "more",
    )
    spec = SimulationSpec.fast(nodes=8, max_num_seqs=64)
    for number in range(rounds):
        with open_place(spec, items) as place:
            limit = items // 2 * 220
            more = ("--budget-tokens", str(limit), "--set", "budget.on_limit=stop")
            place.run(place.fanfold(f"budget-{number}", items, *more), (_BUDGET_EXHAUSTED,))
            totals = place.count_requests()
            spent = totals["prompt_tokens"] + totals["completion_tokens"]
            table.add("spent", 100 * spent / limit)
    return [table]


def measure_reduce(quick: bool) -> list[Table]:
    """The cost of each aggregator."""
    items, rounds = (20_000, 3) if quick else (200_000, 5)
    outcomes = [
        Outcome(n, f"i{n}", "done", {"score": n % 977 / 977, "kind": "abc"[n % 3]})
        for n in range(items)
    ]
    specs: dict[str, dict[str, Any]] = {
        "count": {"op": "count"},
        "stats": {"op": "stats", "field": "score"},
        "histogram": {"op": "histogram", "field": "kind", "categories": ["a", "b", "c"]},
        "top_k": {"op": "top_k", "field": "score", "k": 20},
    }
    table = Table(
        "reduce",
        "What does an aggregator cost?",
        "CPU µs per item",
        f"Folding {items:,} answers, in slices of 64 as a run does.",
    )
    for _ in range(rounds):
        for name, spec in specs.items():
            made = build_aggregators([spec])
            state, began = made.empty(), time.process_time()
            for low in range(0, items, 64):
                made.add(state, outcomes[low : low + 64])
            table.add(name, 1e6 * (time.process_time() - began) / items)
    return [table]


def measure_start(quick: bool) -> list[Table]:
    """What a command takes before it does anything."""
    rounds = 2 if quick else 5
    table = Table(
        "start", "How long do commands take to start?", "CPU s", "Whole processes, alternating."
    )
    with open_place(SimulationSpec.fast(nodes=1, max_num_seqs=8), 1) as place:
        place.run(place.fanfold("start", 1))
        fanfold = [sys.executable, "-P", "-m", "fanfold"]
        commands = {
            "import fanfold": [sys.executable, "-c", "import fanfold"],
            "fanfold --help": [*fanfold, "--help"],
            "fanfold status": [*fanfold, "status", "start"],
            "fanfold check": [*fanfold, "check", "bench.yaml", "--endpoints", place.urls[0]],
        }
        for number in range(rounds):
            for name, command in commands.items():
                table.add(name, place.run(command).cpu_s)
            table.add("fanfold run, one item", place.run(place.fanfold(f"one-{number}", 1)).cpu_s)
            table.add("raw aiohttp, one item", place.run(_script(place, "floor.py", 1)).cpu_s)
    return [table]


def measure_prefix(quick: bool) -> list[Table]:
    """Part of the work bound that policies reach, over modelled servers in virtual time."""
    groups = 100 if quick else 400
    table = Table(
        "prefix",
        "How far from the work bound are load-balancing policies?",
        "% above the work bound",
        "The real load balancer in virtual time, over a model of eight servers with prefix caches; "
        f"{50 * groups:,} items, one seed. No schedule of these servers is below 0. "
        "[Scheduling](../scheduling.md#prefix-caches) describes the workloads and has ten seeds.",
        grouped=True,
    )
    names = ["two-thirds 2:1", "held out"] if quick else list(make_workloads())
    policies = ("today", "auto") if quick else POLICIES
    both = [(name, policy) for name in names for policy in policies]
    # Virtual time does not depend on what else the machine does.
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        measured = partial(measure_one, seed=0, groups=groups)
        found = pool.map(measured, *zip(*both, strict=True))
        for one in found:
            table.add(
                f"{one.workload}, {_POLICY_NAMES[one.policy]}",
                100 * (one.seconds / one.bound_s - 1),
            )
    return [table]


_POLICY_NAMES: Final = {
    "today": "input order",
    "today, affinity": "with affinity",
    "round robin": "round robin",
    "power of two": "power of two",
    "auto": "auto",
}


def find_losses(tables: Sequence[Table]) -> list[str]:
    """Return the part of the page that says where fanfold loses, from the figures."""
    found = {table.name: table.rows for table in tables}

    def read(table: str, row: str) -> float:
        return median(found[table][row])

    lines = list[str]()
    if "cost" in found:
        own, floor = read("cost", "fanfold run"), read("cost", "raw aiohttp")
        lines.append(
            f"An item costs {own:.2g} ms of CPU time, {own / floor:.1f} times that of a bare loop "
            f"({floor:.2g} ms)."
        )
        if "profile" in found:
            parts = [
                f"{part.partition(':')[0].partition(' (')[0]} {values[0]:.0f} %"
                for part, values in found["profile"].items()
            ]
            lines[-1] += f" The three largest parts of it: {', '.join(parts[:3])}."
        own, floor = read("cost-memory", "fanfold run"), read("cost-memory", "raw aiohttp")
        lines.append(f"A run takes {own:.0f} MB of memory; a bare loop takes {floor:.0f} MB.")
    if "start" in found:
        own = read("start", "fanfold run, one item")
        floor = read("start", "raw aiohttp, one item")
        lines.append(f"Starting takes {own:.1f} s of CPU time; a bare loop takes {floor:.1f} s.")
    if "streams" in found:
        row, values = min(found["streams"].items(), key=lambda one: median(one[1]))
        lines.append(f"{row} reach {median(values):.0f} % of the possible throughput.")
    if "storm" in found:
        before = read("storm", "before")
        lost = {row: 100 * (1 - median(values) / before) for row, values in found["storm"].items()}
        row = max(lost, key=lambda one: lost[one])
        lines.append(f"A failure storm costs up to {lost[row]:.0f} % of the throughput ({row}).")
    if "kill" in found:
        lines.append(
            f"After `kill -9`, {read('kill', 'asked twice'):.1f} % of the items are asked twice: "
            "those in flight."
        )
    if "budget" in found:
        rest = 100 - read("budget", "spent")
        lines.append(f"{rest:.1f} % of a token budget remain unused when a run stops at it.")
    if not lines:
        return []
    text = "\n".join(f"- {line}" for line in lines)
    return [
        "## Where does fanfold lose?\n\n"
        + text
        + "\n\nSee also [the figures beside other packages]"
        "(peers/README.md) and [when not to use fanfold](../comparison.md#when-not-to-use-fanfold)."
    ]


CASES: Final[dict[str, Callable[[bool], list[Table]]]] = {
    "cost": measure_cost,
    "profile": measure_profile,
    "streams": measure_streams,
    "faults": measure_faults,
    "budget": measure_budget,
    "prefix": measure_prefix,
    "reduce": measure_reduce,
    "start": measure_start,
    "items": measure_items,
}
_NOT_QUICK: Final = ("items",)


def measure_cases(
    names: Sequence[str], quick: bool
) -> tuple[list[Table], dict[str, str], OtherPrograms]:
    """Measure cases; return tables, the cases that failed with the reason, and other programs."""
    others, tables = OtherPrograms(), list[Table]()
    missing = dict.fromkeys(names, "interrupted")
    try:
        for name in names:
            began = time.monotonic()
            try:
                tables += CASES[name](quick)
            except Exception as error:  # noqa: BLE001 - named on the page, and the exit code is 1
                traceback.print_exc()
                missing[name] = " ".join(f"{type(error).__name__}: {error}".split())
            else:
                del missing[name]
            print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    except KeyboardInterrupt:
        print("interrupted; the figures so far are kept", flush=True)
    return tables, missing, others


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--quick", action="store_true", help="fewer items and rounds")
    parser.add_argument("--out", type=Path, help=f"folder for the figures ({DOCS}, for all cases)")
    given = parser.parse_args()
    if given.cases and given.out is None:
        parser.error("some cases alone would replace the page of all: name a folder with --out")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    names = given.cases or [name for name in CASES if not given.quick or name not in _NOT_QUICK]
    began = time.monotonic()
    tables, missing, others = measure_cases(names, given.quick)
    how = "make bench-quick" if given.quick else "make bench"
    out: Path = given.out or DOCS
    machine = describe_machine(others) | {"seconds": round(time.monotonic() - began)}
    page = Page(tables, machine, how, summary=find_losses(tables), missing=missing)
    write_figures(out, page)
    print(f"{out}/README.md written after {machine['seconds']} s")
    if missing:
        sys.exit(f"not measured: {', '.join(missing)}")


if __name__ == "__main__":
    main()
