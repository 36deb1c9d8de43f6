"""The policies of ``prefix.py`` on real vLLM servers: their counters of prefix caches and queues.

Start the servers with few KV blocks (``--num-gpu-blocks-override``), so that not all groups stay
cached. The policies take turns, each time with new texts, so that nothing is left in the caches
from before.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from fanfold.tests.benchmarks.prefix import POLICIES, Plan, make_plan

_WORDS: Final = (
    "molecule",
    "score",
    "paper",
    "value",
    "system",
    "function",
    "items",
    "name",
    "logP",
)
_MOST_REQUESTS: Final = 1.05
"""Requests per prompt: slow ones at the end are sent again elsewhere (hedged)."""
_COUNTERS: Final = {
    "queries": "vllm:prefix_cache_queries_total",
    "hits": "vllm:prefix_cache_hits_total",
    "queue_s": "vllm:request_queue_time_seconds_sum",
    "requests": "vllm:request_queue_time_seconds_count",
}


@dataclass(frozen=True, slots=True)
class Counts:
    """Counters of all servers.

    Attributes:
        queries: Prompt tokens that were looked up in the prefix caches.
        hits: Those that were found.
        queue_s: Seconds that requests waited inside the servers.
        requests: Number of these requests.
        cpu_s: CPU time of the servers' processes; 0 if unknown.
    """

    queries: float
    hits: float
    queue_s: float
    requests: float
    cpu_s: float

    def __sub__(self, before: Counts) -> Counts:
        """Return what was counted since then."""
        now, then = asdict(self), asdict(before)
        return Counts(**{name: now[name] - then[name] for name in now})


def read_counts(urls: Sequence[str], sessions: Sequence[int]) -> Counts:
    """Read the counters of all servers.

    Args:
        urls: Base URLs, ending in ``/v1``.
        sessions: Session ids of the servers' processes.
    """
    sums = dict.fromkeys(_COUNTERS, 0.0)
    for url in urls:
        with urllib.request.urlopen(f"{url.removesuffix('/v1')}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        for name, metric in _COUNTERS.items():
            found = [line for line in lines if line.partition("{")[0] == metric]
            if not found:
                raise SystemExit(f"{url}: its metrics have no {metric}; which vLLM is it?")
            sums[name] += sum(float(line.rpartition(" ")[2]) for line in found)
    return Counts(**sums, cpu_s=_read_cpu_s(sessions))


def _read_cpu_s(sessions: Sequence[int]) -> float:
    ticks = 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it has ended
        if int(fields[3]) in sessions:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Run:
    """What one run of a policy took.

    Attributes:
        policy: Name of the policy.
        number: Number of the run; its texts follow from it.
        requests: Requests that the servers answered.
        seconds: From the first request to the last answer.
        hits: Share of the prompts' tokens that came from the caches.
        computed: Prompt tokens that the servers computed.
        waited_s: Mean wait of a request inside a server.
        cpu_s: CPU time of the servers' processes; 0 if unknown.
    """

    policy: str
    number: int
    requests: float
    seconds: float
    hits: float
    computed: float
    waited_s: float
    cpu_s: float


def make_prompts(name: str, groups: int, size: int, words: tuple[int, int]) -> list[str]:
    """Return shuffled prompts, of which ``size`` each begin with the same document.

    Args:
        name: Makes all texts differ from those of other runs.
        groups: Number of documents.
        size: Questions about each document.
        words: Words of a document, and of a question.
    """
    draw = random.Random(name)

    def write(count: int, title: str) -> str:
        return " ".join([title, *draw.choices(_WORDS, k=count)])

    prompts = [
        f"{document}\n\n{write(words[1], f'question {number} of {group}')}"
        for group in range(groups)
        for document in [write(words[0], f"{name} {group}")]
        for number in range(size)
    ]
    draw.shuffle(prompts)
    return prompts


async def send(urls: Sequence[str], model: str, prompts: Sequence[str], plan: Plan) -> float:
    """Send all prompts as a policy does; return the seconds."""
    left = iter(plan.order)
    # A model without training would never end by itself.
    extra = {"structured_outputs": {"choice": [" ".join(_WORDS)]}, "temperature": 0}

    async def work() -> None:
        for number in left:
            messages = [{"role": "user", "content": prompts[number]}]
            await fleet.post({"model": model, "messages": messages, "max_tokens": 256, **extra})

    async with plan.open_fleet(urls) as fleet:
        started = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(plan.policy.streams):
                group.create_task(work())
        return time.monotonic() - started


def measure_run(given: argparse.Namespace, policy: str, number: int) -> Run:
    """Run all prompts with one policy."""
    words = given.document, given.question
    prompts = make_prompts(f"run {number}", given.groups, given.size, words)
    # As a user would set it: most of the shorter documents.
    shared = min(len(prompt.partition("\n\n")[0]) for prompt in prompts)
    plan = make_plan(policy, len(prompts), prompts.__getitem__, given.streams, shared)
    before = read_counts(given.endpoints, given.sessions)
    seconds = asyncio.run(send(given.endpoints, given.model, prompts, plan))
    found = read_counts(given.endpoints, given.sessions) - before
    if found.requests > _MOST_REQUESTS * len(prompts):
        raise SystemExit(f"{found.requests:.0f} requests for {len(prompts)} prompts: who else?")
    return Run(
        policy,
        number,
        found.requests,
        seconds,
        found.hits / found.queries,
        found.queries - found.hits,
        found.queue_s / found.requests,
        found.cpu_s,
    )


def show(runs: Sequence[Run]) -> str:
    """Return a table in Markdown: medians, with ranges."""
    lines = [
        "| policy | prompt tokens from the cache | computed | mean wait inside a server "
        "| server CPU | runs |",
        "|---|---|---|---|---|---|",
    ]
    for policy in dict.fromkeys(run.policy for run in runs):
        some = [run for run in runs if run.policy == policy]
        cells = [
            _show([100 * run.hits for run in some], ".0f", " %"),
            _show([run.computed for run in some], ",.0f", ""),
            _show([run.waited_s for run in some], ".2f", " s"),
            _show([run.cpu_s for run in some], ".1f", " s"),
        ]
        lines.append(f"| {policy} | {' | '.join(cells)} | {len(some)} |")
    return "\n".join(lines)


def _show(values: Sequence[float], form: str, unit: str) -> str:
    low, high = min(values), max(values)
    return f"{statistics.median(values):{form}}{unit} ({low:{form}} to {high:{form}})"


def main() -> None:
    """Measure the policies in turn; print a table."""
    parser = argparse.ArgumentParser(prog="prefix_vllm", description=__doc__)
    parser.add_argument("--endpoints", nargs="+", required=True, help="base URLs, ending in /v1")
    parser.add_argument("--sessions", type=int, nargs="*", default=[], help="of the servers")
    parser.add_argument("--model", required=True)
    parser.add_argument("--groups", type=int, default=60)
    parser.add_argument("--size", type=int, default=6)
    parser.add_argument("--document", type=int, default=300, help="words")
    parser.add_argument("--question", type=int, default=150, help="words")
    parser.add_argument("--streams", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--policies", nargs="+", choices=POLICIES, default=list(POLICIES))
    parser.add_argument("--json", type=Path, help="file for the measurements")
    given = parser.parse_args()
    runs = list[Run]()
    for number in range(given.rounds):
        # In another order each time, so that no policy always follows the same one.
        turn = random.Random(number).sample(given.policies, len(given.policies))
        for place, policy in enumerate(turn):
            runs.append(measure_run(given, policy, 100 * number + place))
            print(runs[-1], flush=True)
            if given.json:
                given.json.write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    print(show(runs))


if __name__ == "__main__":
    main()
