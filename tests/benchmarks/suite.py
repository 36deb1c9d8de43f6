"""``make bench-quick`` and ``make bench``: the published figures.

Each case runs whole processes against a simulated fleet in another process, and alternates its
sides round by round. ``bench-quick`` is to take 3 minutes on two idle cores, ``bench`` 30.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import math
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
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

from .figures import Table, describe_machine, write_figures
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

    def run(self, command: list[str]) -> Spent:
        """Run a command to its end."""
        meter = [sys.executable, "-S", str(FOLDER / "meter.py"), "spent.json"]
        began = time.monotonic()
        found = subprocess.run(
            meter + command,
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            check=False,
        )
        wall = time.monotonic() - began
        spent = json.loads((self.folder / "spent.json").read_text())
        said = json.loads(found.stdout) if found.stdout.startswith(b"{") else {}
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
        """Wait until the fleet has had so many requests."""
        while self.count_requests()["requests"] < number:
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


def measure_cost(quick: bool) -> list[Table]:
    """CPU of each further item: the floor, fanfold, and the plain LangGraph program."""
    items, rounds = (1_000, 3) if quick else (4_000, 5)
    naive_items = 250 if quick else items
    table = Table(
        "cost",
        "What does an item cost?",
        "CPU ms per item",
        f"CPU time of the client from the first to the last of {items:,} items, net of a run of "
        f"one item, with {STREAMS} in flight. The floor is an aiohttp loop without retries, "
        f"journal and checks. Naive LangGraph is a `Send` per item with stock `ChatOpenAI` and "
        f"`SqliteSaver`, over {naive_items:,} items.",
    )
    with open_place(SimulationSpec.fast(nodes=8, max_num_seqs=64), items) as place:
        sides: dict[str, Callable[[int, int], list[str]]] = {
            "raw aiohttp": lambda n, _: _script(place, "floor.py", n),
            "fanfold run": lambda n, r: place.fanfold(f"cost-{n}-{r}", n),
            "naive LangGraph": lambda n, _: _script(place, "naive.py", n),
        }
        for number in range(rounds):
            for side, command in sides.items():
                count = naive_items if side == "naive LangGraph" else items
                one = place.run(command(1, number))
                whole = place.run(command(count, number))
                table.add(side, 1000 * (whole.cpu_s - one.cpu_s) / (count - 1))
    return [table]


def _script(place: Place, name: str, items: int) -> list[str]:
    return [sys.executable, str(FOLDER / name), place.urls[0], str(items), str(STREAMS)]


def measure_items(quick: bool) -> list[Table]:
    """CPU per item and memory for growing inputs."""
    counts = [1_000, 10_000] if quick else [1_000, 10_000, 100_000, 1_000_000]
    cost = Table(
        "items-cpu",
        "Does an item cost more in a large run?",
        "CPU ms per item",
        "The coordinator's CPU time net of a run of one item, one run each.",
    )
    memory = Table(
        "items-memory",
        "How much memory does a large run take?",
        "MB at most",
        "Peak resident memory of the coordinator.",
    )
    with open_place(SimulationSpec.fast(nodes=8, max_num_seqs=64), counts[-1]) as place:
        one = place.run(place.fanfold("items-1", 1))
        for count in counts:
            found = place.run(place.fanfold(f"items-{count}", count))
            row = f"{count:,} items"
            cost.add(row, 1000 * (found.cpu_s - one.cpu_s) / (count - 1))
            memory.add(row, found.peak_mb)
    return [cost, memory]


def measure_streams(quick: bool) -> list[Table]:
    """How busy streams are kept, and what the client takes of the wall time."""
    counts, answer_s = ([10, 100, 1_000], 1.0) if quick else ([10, 100, 1_000, 10_000], 10.0)
    spread = 0.2
    mean_s = answer_s * math.exp(spread**2 / 2)
    used = Table(
        "streams",
        "Are all streams kept busy?",
        "% of the possible throughput",
        f"Items in flight, each answered in {mean_s:.2f} s on average, with a spread: items of the "
        "middle two thirds of the run times that, divided by streams times their time. Ten times "
        "the streams ask for ten times the calls a second; one process makes about a thousand, on "
        "a core of its own.",
        "more",
    )
    share = Table(
        "client-share",
        "How much of the wall time is the client's?",
        "% of one core",
        "CPU time of the coordinator divided by wall time, of the same runs.",
    )
    for count in counts:
        ensure_open_files(count)
        items, tokens = 6 * count, 100
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
        used.add(f"{count:,} streams", 100 * (items - 2 * count) * mean_s / (count * worked_s))
        share.add(f"{count:,} streams", 100 * found.cpu_s / found.wall_s)
    return [used, share]


def _read_ends(folder: Path) -> list[float]:
    """Return the times at which items ended, in seconds, sorted."""
    column = pq.read_table(folder / "results.parquet", columns=["finished_at"])["finished_at"]
    times = [datetime.fromisoformat(str(one)) for one in column.to_pylist()]
    return sorted(one.replace(tzinfo=one.tzinfo or UTC).timestamp() for one in times)


def measure_faults(quick: bool) -> list[Table]:
    """Throughput through a storm and back, and what a kill and poison items cost."""
    items, length_s = (2_000, 12.0) if quick else (20_000, 60.0)
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
        running = threads.submit(place.run, place.fanfold("storm", items, *_PLAIN))
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
    return [storm, lost, *_measure_kill(spec, items), *_measure_poison(spec, items)]


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
        process = subprocess.Popen(
            command, cwd=place.folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        place.wait_for_requests(items // 2)
        process.send_signal(signal.SIGKILL)
        process.wait()
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
            found = place.run(place.fanfold("poison", items, *_PLAIN))
            assert found.said["done"] + found.said["failed"] == items
            table.add(row, found.said["seconds"])
    return [table]


def measure_budget(quick: bool) -> list[Table]:
    """How much of a budget is used, by the fleet's own count."""
    items, rounds = (1_000, 1) if quick else (8_000, 5)
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
            place.run(place.fanfold(f"budget-{number}", items, *more))
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
    rounds = 2 if quick else 9
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
    return [table]


def measure_prefix(quick: bool) -> list[Table]:
    """Part of the work bound that policies reach, over modelled servers in virtual time."""
    groups, seeds = (100, [0]) if quick else (400, [0, 1])
    table = Table(
        "prefix",
        "How far from the work bound are load-balancing policies?",
        "time / work bound",
        "The real load balancer in virtual time, over a model of eight servers with prefix caches; "
        f"{50 * groups:,} items. Never below 1. [Scheduling](../scheduling.md#prefix-caches) "
        "describes the workloads and has all seeds.",
    )
    names = ["two-thirds 2:1", "held out"] if quick else list(make_workloads())
    policies = ["today", "auto"] if quick else list(POLICIES)
    for seed in seeds:
        for name in names:
            for policy in policies:
                found = measure_one(name, policy, seed, groups)
                table.add(f"{name}, {_POLICY_NAMES[policy]}", found.seconds / found.bound_s)
    return [table]


_POLICY_NAMES: Final = {
    "today": "input order",
    "today, affinity": "input order with affinity",
    "round robin": "round robin",
    "power of two": "power of two",
    "auto": "auto",
}


CASES: Final[dict[str, Callable[[bool], list[Table]]]] = {
    "cost": measure_cost,
    "items": measure_items,
    "streams": measure_streams,
    "faults": measure_faults,
    "budget": measure_budget,
    "prefix": measure_prefix,
    "reduce": measure_reduce,
    "start": measure_start,
}


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", choices=[*CASES, []], default=[])
    parser.add_argument("--quick", action="store_true", help="fewer items and rounds")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder for the figures")
    given = parser.parse_args()
    machine, tables = describe_machine(), list[Table]()
    for name in given.cases or CASES:
        began = time.monotonic()
        tables += CASES[name](given.quick)
        print(f"{name}: {time.monotonic() - began:.0f} s", flush=True)
    how = "make bench-quick" if given.quick else "make bench"
    write_figures(given.out, tables, machine, how)
    print(f"{given.out}/README.md written")


if __name__ == "__main__":
    main()
