"""Many streams with a budget that ends in the middle; and the cost of accounting per call."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from fanfold.backends.budget.budget import Budget, BudgetSettings
from fanfold.backends.budget.spend_log import SpendLogs
from fanfold.backends.core.money import Amount, BudgetLimits, TokenPrices
from fanfold.backends.core.process import ensure_open_files
from fanfold.backends.core.protocols import CallLog
from fanfold.backends.core.types import Usage
from fanfold.backends.fleet.request import RequestCharge
from fanfold.backends.simulated.process import launch
from fanfold.backends.simulated.spec import SimulationSpec

NODES, TOKENS, CALLS = 20, 100, 20_000
CONFIG = """\
name: budget
input: {path: items.csv, id: id}
task: {prompt: "Judge this text: {text}"}
endpoints: {urls: []}
model: {max_tokens: 200, price: {prompt: 0.15, completion: 0.6}}
"""


async def measure(streams: int, answer_s: float) -> None:
    """Print how much of a budget is used, by the fleet's own counts, and the cost per call."""
    ensure_open_files(streams)
    spec = SimulationSpec(
        nodes=NODES,
        max_num_seqs=2 * streams // NODES,
        ttft_s=0.0,
        prefill_rate=1e9,
        tpot_s=answer_s / TOKENS,
        output_tokens=(TOKENS // 2, TOKENS),
        alpha=0.0,
        jitter=0.2,
    )
    folder = Path(tempfile.mkdtemp(prefix="fanfold-bench-"))
    try:
        async with launch(spec) as up:
            await asyncio.to_thread(_run, folder, streams, up.urls)
    finally:
        shutil.rmtree(folder)
    await _cost(1.0)


def _run(folder: Path, streams: int, urls: tuple[str, ...]) -> None:
    items = 4 * streams
    (folder / "budget.yaml").write_text(CONFIG)
    with (folder / "items.csv").open("w") as file:
        file.write("id,text\n")
        file.writelines(f"i{n},{'some text of a record ' * 9}{n}\n" for n in range(items))
    cap = items // 2 * 130  # about half of what all items take
    command = [sys.executable, "-P", "-m", "fanfold", "run", "budget.yaml", "--json", "--out", "r"]
    command += ["--endpoints", ",".join(urls), "--budget-tokens", str(cap)]
    command += ["--set", f"limits.streams={streams}"]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE)
    assert process.stdout is not None
    out = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    result = json.loads(out)
    nodes = _nodes(urls[0])
    spent = sum(n["prompt_tokens"] + n["completion_tokens"] for n in nodes)
    print(
        f"{streams} streams, {items} items, a cap of {cap:,} tokens: exit code "
        f"{result['exit_code']}, {spent:,} tokens by the fleet's books ({100 * spent / cap:.2f} % "
        f"of the cap), {result['done']:,} items in {result['seconds']:.0f} s, "
        f"{1000 * (used.ru_utime + used.ru_stime) / max(1, result['done']):.2f} CPU ms per item"
    )


def _nodes(url: str) -> list[dict[str, Any]]:
    """Return the fleet's counts, node by node."""
    place = urlsplit(url)
    with urllib.request.urlopen(f"http://{place.netloc}/_sim/stats") as answer:
        stats: dict[str, Any] = json.loads(answer.read())
    return list(stats["nodes"])


async def _cost(usd: float) -> None:
    """Print the CPU time of reserving and settling a call."""
    body = {
        "messages": [{"role": "user", "content": "some text of a record " * 30}],
        "max_tokens": 200,
    }
    with tempfile.TemporaryDirectory() as folder:
        shelf = SpendLogs(Path(folder) / "budget", "run")
        terms = BudgetSettings(
            BudgetLimits.from_settings(usd=10_000 * usd),
            TokenPrices.from_usd(0.15, None, 0.6),
            repairs=1,
        )
        budget = Budget(terms, Amount(), shelf.create(shelf.session_path(1)))
        for limited in (False, True):
            began = time.process_time()
            for _ in range(CALLS):
                account = budget.open_account() if limited else None
                charge = await RequestCharge.reserve(CallLog(account=account), body)
                charge.settle_answered(Usage(170, 80), "m")
                if account is not None:
                    account.close()
            each = 1e6 * (time.process_time() - began) / CALLS
            print(f"accounting {'within a budget' if limited else 'alone'}: {each:.1f} µs per call")
        await budget.balance.aclose()
