"""Ten thousand answers of a minute each, in flight at once in one process."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from fanfold.backends.core.process import ensure_open_files
from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams
from fanfold.backends.simulated.process import launch
from fanfold.backends.simulated.spec import SimulationSpec

NODES, SIGMA, TOKENS = 20, 0.2, 100


async def measure(streams: int, answer_s: float, window_s: float) -> None:
    """Print throughput over ``streams / latency``, memory per stream and CPU time per call.

    Calls begin evenly over one answer's time, so that the steady state is there from the start
    of the window. The latency is the servers' own: what the client adds counts against it.
    """
    ensure_open_files(streams)  # the servers' process inherits the limit
    mean_s = answer_s * math.exp(SIGMA**2 / 2)
    spec = SimulationSpec(
        nodes=NODES,
        max_num_seqs=2 * streams // NODES,
        ttft_s=0.0,
        prefill_rate=1e9,
        tpot_s=answer_s / TOKENS,
        output_tokens=(TOKENS, TOKENS),
        alpha=0.0,
        jitter=SIGMA,
    )
    policy = replace(FleetPolicy.from_limits(streams=streams), hedge=None)
    async with (
        launch(spec) as up,
        Fleet([EndpointSpec(url) for url in up.urls], policy) as fleet,
    ):
        model = FleetClient(fleet, ModelParams(spec.model, max_tokens=2 * TOKENS))
        text = "some text of a record " * 30
        ended = 0

        async def work(number: int) -> None:
            nonlocal ended
            await asyncio.sleep(answer_s * number / streams)
            while True:
                question = f"{text}{number} {time.monotonic()}"
                await model.ask([{"role": "user", "content": question}])
                ended += 1

        before = _resident_kb()
        with _working(streams, work):
            await asyncio.sleep(1.5 * answer_s)
            memory = (_resident_kb() - before) / streams
            full = fleet.in_flight
            started, cpu, first = time.monotonic(), time.process_time(), ended
            await asyncio.sleep(window_s)
            seconds, cpu = time.monotonic() - started, time.process_time() - cpu
            rate = (ended - first) / seconds
        failed = sum(sum(report.failures.values()) for report in fleet.report())
    print(
        f"{streams} streams of {answer_s:g} s (mean {mean_s:.2f} s) over {seconds:.0f} s: "
        f"{rate:.1f} answers/s, {rate * mean_s / streams:.3f} of streams / latency; "
        f"{full} in flight, {failed} failed, {memory:.1f} kB per stream, "
        f"{1000 * cpu / (rate * seconds):.2f} CPU ms per call, {cpu / seconds:.0%} of a core"
    )


@contextmanager
def _working(streams: int, work: Callable[[int], Coroutine[Any, Any, None]]) -> Iterator[None]:
    tasks = [asyncio.create_task(work(number)) for number in range(streams)]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()


def _resident_kb() -> float:
    """Return the process' resident memory (Linux)."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4.0
