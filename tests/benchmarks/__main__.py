"""Single measurements; ``suite.py`` has the published figures (``make bench``).

Figures are CPU times and peak memory of the coordinating process alone; the simulated fleet
runs in another process. Where the machine allows it, ``perf stat`` adds instructions. ``reuse``,
``storm``, ``streams``, ``shards``, ``stages``, ``start``, ``ranking``, ``resume``, ``resume_runs``,
``budget`` and ``limits`` take minutes and run only when they are named.
"""

from __future__ import annotations

import argparse
import asyncio

from . import (
    budget,
    calls,
    end_to_end,
    limits,
    parts,
    ranking,
    resume,
    resume_runs,
    reuse,
    shards,
    stages,
    start,
    storm,
    streams,
)

NAMES = (
    "end_to_end",
    "calls",
    "parts",
    "ranking",
    "resume",
    "resume_runs",
    "reuse",
    "shards",
    "stages",
    "start",
    "storm",
    "streams",
    "budget",
    "limits",
)


def main() -> None:  # noqa: PLR0912 - a branch for each measurement
    """Run the benchmarks that were named, or the short ones."""
    parser = argparse.ArgumentParser(prog="python -m fanfold.tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", choices=[*NAMES, []], default=[])
    parser.add_argument("--items", type=int, nargs="+", default=[2_000, 50_000])
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(10)))
    parser.add_argument("--kinds", nargs="+", choices=["storm", "calm"], default=["storm", "calm"])
    parser.add_argument("--median", type=float, default=2.0, help="of the storm's answers, in s")
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--answer", type=float, default=60.0, help="of the streams, in s")
    parser.add_argument("--window", type=float, default=180.0, help="of steady state, in s")
    parser.add_argument("--backends", nargs="+", choices=list(shards.BACKENDS), default=[])
    parser.add_argument(
        "--operators", nargs="+", choices=stages.OPERATORS, default=stages.OPERATORS
    )
    given = parser.parse_args()
    names = given.names or ["end_to_end", "calls", "parts"]
    if "end_to_end" in names:
        end_to_end.measure(given.items)
    if "calls" in names:
        asyncio.run(calls.measure())
    if "parts" in names:
        asyncio.run(parts.measure())
        parts.measure_choice()
    if "ranking" in names:
        ranking.measure(given.seeds)
    if "resume" in names:
        resume.measure(200_000)
    if "resume_runs" in names:
        resume_runs.measure(max(given.items))
    if "reuse" in names:
        asyncio.run(reuse.measure([100_000, 1_000_000]))
    if "shards" in names:
        shards.measure(given.backends)
    if "stages" in names:
        stages.measure(given.operators, 7)
    if "start" in names:
        start.measure(5)
    if "streams" in names:
        asyncio.run(streams.measure(given.streams, given.answer, given.window))
    if "budget" in names:
        asyncio.run(budget.measure(given.streams, given.answer))
    if "limits" in names:
        asyncio.run(limits.measure(2_000))
    if "storm" in names:
        storm.measure(given.seeds, 10_000, given.median, given.kinds)


if __name__ == "__main__":
    main()
