"""A whole run with the default item graph: row in, result on disk."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from fanfold.backends.simulated.process import launch
from fanfold.backends.simulated.spec import SimulationSpec

CONFIG = """\
name: bench
input: {path: items.csv, id: id}
task:
  system: You judge short texts.
  prompt: "Judge this text: {text}"
  schema:
    type: object
    additionalProperties: false
    required: [score, kind, reason]
    properties:
      score: {type: number, minimum: 0, maximum: 1}
      kind: {type: string, enum: [a, b, c]}
      reason: {type: string, minLength: 200, maxLength: 400}
endpoints: {urls: []}
limits: {streams: 256}
reduce:
  - {op: top_k, field: score, k: 20}
  - {op: histogram, field: kind}
  - {op: stats, field: score}
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run cost: CPU and wall seconds, peak memory in MB, instructions or None."""

    cpu_s: float
    wall_s: float
    peak_mb: float
    instructions: int | None


def measure(counts: list[int]) -> None:
    """Print the costs of runs of so many items, and the cost of each further item."""
    counts = [1, *sorted(counts)]
    costs = asyncio.run(_measure(counts))
    print("end to end, default item graph, 256 streams, fleet in another process")
    print(f"{'items':>8} {'CPU s':>8} {'CPU ms/item':>12} {'M instr/item':>13} {'peak MB':>8}")
    base = costs[0]
    for count, cost in zip(counts, costs, strict=True):
        share = 1000 * (cost.cpu_s - base.cpu_s) / max(1, count - 1)
        instructions = "n/a"
        if cost.instructions is not None and base.instructions is not None:
            each = (cost.instructions - base.instructions) / max(1, count - 1)
            instructions = f"{each / 1e6:.2f}"
        print(
            f"{count:>8,} {cost.cpu_s:>8.2f} {share:>12.3f} {instructions:>13} {cost.peak_mb:>8.0f}"
            f"   {count / cost.wall_s:,.0f} items/s"
        )


async def _measure(counts: list[int]) -> list[Cost]:
    spec = SimulationSpec.fast(nodes=8, max_num_seqs=64)
    folder = Path(tempfile.mkdtemp(prefix="fanfold-bench-"))
    try:
        async with launch(spec) as fleet:
            return [await asyncio.to_thread(_run, folder, n, fleet.urls) for n in counts]
    finally:
        shutil.rmtree(folder)


def _run(folder: Path, count: int, urls: tuple[str, ...]) -> Cost:
    (folder / "bench.yaml").write_text(CONFIG)
    with (folder / "items.csv").open("w") as file:
        file.write("id,text\n")
        file.writelines(f"i{n},{'some text of a record ' * 9}{n}\n" for n in range(count))
    cost, result = run_command(folder, "bench.yaml", f"run-{count}", urls)
    assert result["done"] == count, result
    return cost


def run_command(
    folder: Path, settings: str, out: str, urls: tuple[str, ...]
) -> tuple[Cost, dict[str, Any]]:
    """Run the command line to its end; return what it cost, and what it printed as JSON.

    Args:
        folder: The working directory.
        settings: Name of the settings file in it.
        out: Name of the run folder.
        urls: The endpoints.
    """
    counted = folder / "instructions"
    command = [sys.executable, "-P", "-m", "fanfold", "run", settings, "--json"]
    command += ["--endpoints", ",".join(urls), "--out", out]
    if _counts_instructions():
        command = ["perf", "stat", "-x", ",", "-e", "instructions", "-o", str(counted), *command]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
    assert process.stdout is not None
    said = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    result: dict[str, Any] = orjson.loads(said)
    instructions = None
    if counted.exists():
        (line,) = [x for x in counted.read_text().splitlines() if "instructions" in x]
        instructions = int(line.split(",")[0])
    cpu = used.ru_utime + used.ru_stime
    return Cost(cpu, result["seconds"], used.ru_maxrss / 1024, instructions), result


def _counts_instructions() -> bool:
    if shutil.which("perf") is None:
        return False
    command = ["perf", "stat", "-x", ",", "-e", "instructions", "true"]
    said = subprocess.run(command, capture_output=True, text=True, check=False).stderr
    return "not" not in said
