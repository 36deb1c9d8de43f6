"""``make bench``: what a run costs, measured in processes of their own.

Figures are CPU times and peak memory of the coordinating process alone; the simulated fleet
runs in another process. Where the machine allows it, ``perf stat`` adds instructions.
"""

from __future__ import annotations

import argparse
import asyncio

from . import calls, end_to_end


def main() -> None:
    """Run the benchmarks that were named, or all."""
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("names", nargs="*", choices=["end_to_end", "calls", []], default=[])
    parser.add_argument("--items", type=int, nargs="+", default=[2_000, 50_000])
    given = parser.parse_args()
    names = given.names or ["end_to_end", "calls"]
    if "end_to_end" in names:
        end_to_end.measure(given.items)
    if "calls" in names:
        asyncio.run(calls.measure())


if __name__ == "__main__":
    main()
