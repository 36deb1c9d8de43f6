"""Orders of work on real vLLM servers: their own counters of prefix caches and queues.

Start the servers with few KV blocks (``--num-gpu-blocks-override``), so that not all groups stay
cached. The orders alternate in one run, each time with new texts, so that nothing is left in the
caches from before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_WORDS = ("molecule", "score", "paper", "value", "system", "function", "items", "name", "logP")
_COUNTERS = {
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


def write_rows(path: Path, name: str, groups: int, size: int, words: tuple[int, int]) -> None:
    """Write shuffled rows, of which ``size`` each have the same document.

    Args:
        path: The file.
        name: Makes all texts differ from those of other runs.
        groups: Number of documents.
        size: Questions about each document.
        words: Words of a document, and of a question.
    """
    draw = random.Random(name)

    def write(count: int, title: str) -> str:
        return " ".join([title, *draw.choices(_WORDS, k=count)])

    rows = [
        {"document": document, "question": write(words[1], f"question {number} of {group}")}
        for group in range(groups)
        for document in [write(words[0], f"{name} {group}")]
        for number in range(size)
    ]
    draw.shuffle(rows)
    path.write_text("".join(json.dumps({"id": n, **row}) + "\n" for n, row in enumerate(rows)))


def run_once(given: argparse.Namespace, order: str, number: int) -> tuple[Counts, float]:
    """Run all rows in one order; return what the servers counted, and the seconds."""
    with tempfile.TemporaryDirectory() as folder:
        words = given.document, given.question
        write_rows(Path(folder) / "rows.jsonl", f"run {number}", given.groups, given.size, words)
        settings: dict[str, Any] = {
            "input": {"path": "rows.jsonl", "id": "id"},
            "task": {"prompt": "{document}\n\n{question}"},
            "model": {
                "name": given.model,
                # A model without training would never end by itself.
                "extra_body": {"structured_outputs": {"choice": [" ".join(_WORDS)]}},
            },
            "endpoints": {"urls": given.endpoints, "api_key": "EMPTY"},
            "limits": {"streams": given.streams, "order": order},
        }
        (Path(folder) / "run.yaml").write_text(json.dumps(settings))
        before, started = read_counts(given.endpoints, given.sessions), time.monotonic()
        subprocess.run(
            [sys.executable, "-m", "fanfold", "run", "run.yaml", "--out", "run", "--quiet"],
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
        )
        seconds = time.monotonic() - started
        return read_counts(given.endpoints, given.sessions) - before, seconds


def main() -> None:
    """Measure both orders in turn, and print a table."""
    parser = argparse.ArgumentParser(prog="prefix_vllm", description=__doc__)
    parser.add_argument("--endpoints", nargs="+", required=True, help="base URLs, ending in /v1")
    parser.add_argument("--sessions", type=int, nargs="*", default=[], help="of the servers")
    parser.add_argument("--model", required=True)
    parser.add_argument("--groups", type=int, default=40)
    parser.add_argument("--size", type=int, default=10)
    parser.add_argument("--document", type=int, default=300, help="words")
    parser.add_argument("--question", type=int, default=150, help="words")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=2)
    given = parser.parse_args()
    rows: dict[str, list[tuple[Counts, float]]] = {"input": [], "auto": []}
    for number in range(given.rounds * 2):
        order = ("input", "auto", "auto", "input")[number % 4]
        found, seconds = run_once(given, order, number)
        rows[order].append((found, seconds))
        print(order, asdict(found), f"{seconds:.1f} s", flush=True)
    print("| order | prompt tokens from the cache | computed | waits in a server | server CPU |")
    print("|---|---|---|---|---|")
    for order, runs in rows.items():
        hits = statistics.mean(one.hits / one.queries for one, _ in runs)
        computed = statistics.mean(one.queries - one.hits for one, _ in runs)
        queued = statistics.mean(one.queue_s / one.requests for one, _ in runs)
        cpu_s = statistics.mean(one.cpu_s for one, _ in runs)
        print(
            f"| {order} | {100 * hits:.0f} % | {computed:,.0f} | {queued:.2f} s | {cpu_s:.1f} s |"
        )


if __name__ == "__main__":
    main()
