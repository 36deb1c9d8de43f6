"""Items through a gateway that counts tokens in windows, against the least time that these allow.

2,000 items of 150 tokens at 60,000 tokens per window of 6 s and 100 requests per second: five
windows' worth, 30 s. The stand-in of the gateway runs in another process. A naive client sends
everything at once, as ``asyncio.gather`` over ``ChatOpenAI`` does, with its default of two
repetitions.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from fanfold.backends.fleet.endpoint import EndpointSpec
from fanfold.backends.fleet.fleet import Fleet, FleetClient
from fanfold.backends.fleet.policy import FleetPolicy, ModelParams, RateLimitPolicy
from fanfold.tests.support.first_gateway import GatewayProcess, make_spec, run_gateway_process

PROMPT: Final = 110
ANSWER: Final = 40
TOKENS: Final = 60_000
WINDOW_S: Final = 6.0
PER_S: Final = 100


def make_prompt(n: int) -> str:
    """Return a prompt of ``PROMPT`` tokens as the stand-in counts them."""
    return f"item {n:06} ".ljust(4 * (PROMPT - 7), "x")


def compute_bound(items: int) -> float:
    """Return the seconds in which the windows let so many items through."""
    return items * (PROMPT + ANSWER) / TOKENS * WINDOW_S


async def measure(items: int) -> None:
    """Measure fanfold in one process, a run in two processes, and the naive client."""
    print(f"{items:,} items of {PROMPT + ANSWER} tokens; bound {compute_bound(items):.2f} s")
    for name, send in (("fanfold", _ask_fleet), ("2 processes", _run), ("naive", _ask_naively)):
        spec = make_spec(
            requests_per_s=PER_S,
            tokens_per_min_user=TOKENS,
            tokens_per_min_model=10 * TOKENS,
            window_s=WINDOW_S,
            output_tokens=(ANSWER, ANSWER),
            answer_s=0.1,
        )
        async with run_gateway_process(spec) as gateway:
            started = time.perf_counter()
            done = await send(gateway, items)
            seconds = time.perf_counter() - started
            _report(name, items, done, seconds, await gateway.stats())


def _report(name: str, items: int, done: int, seconds: float, stats: dict[str, Any]) -> None:
    answered = [call for call in stats["calls"] if call["tokens"]]
    span = max(c["ended"] for c in answered) - min(c["at"] for c in answered)
    (windows,) = stats["windows"].values()
    tokens = [window["tokens"] for window in windows]
    most = max(window["tokens"] - window["carried"] for window in windows)
    print(
        f"{name:<12} {done:>5} answered, {items - done:>5} lost; {seconds:6.2f} s in all, "
        f"{span:6.2f} s from first request to last answer = {span / compute_bound(items):.3f} of "
        f"the bound; windows {tokens}, at most {most:,} beyond what was in flight before; "
        f"refused {dict(Counter(stats['refusals']))}"
    )


async def _ask_fleet(gateway: GatewayProcess, items: int) -> int:
    member = EndpointSpec(
        f"{gateway.url}/sophia/vllm/v1", "good", tokens_per_min=TOKENS, window_s=WINDOW_S
    )
    policy = FleetPolicy(streams=items, rate_limit=RateLimitPolicy(requests_per_s=0.9 * PER_S))
    async with Fleet([member], replace(policy, whole_answers=True)) as fleet:
        client = FleetClient(fleet, ModelParams("org/m", max_tokens=ANSWER))
        asking = (client.ask([{"role": "user", "content": make_prompt(n)}]) for n in range(items))
        replies = await asyncio.gather(*asking, return_exceptions=True)
    return sum(not isinstance(reply, BaseException) for reply in replies)


async def _run(gateway: GatewayProcess, items: int) -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = (json.dumps({"text": make_prompt(n)}) for n in range(items))
        (folder / "in.jsonl").write_text("\n".join(rows) + "\n")
        settings = {
            "input": {"path": str(folder / "in.jsonl")},
            "task": {"prompt": "{text}"},
            "model": {"name": "org/m", "max_tokens": ANSWER},
            "endpoints": {
                "first": {
                    "base_url": gateway.url,
                    "paths": ["sophia/vllm"],
                    "token_command": "echo good",
                    "requests_per_s": 0.9 * PER_S,
                    "tokens_per_min": TOKENS,
                    "window_s": WINDOW_S,
                }
            },
            "backend": {"kind": "local", "processes": 2},
            "limits": {"streams": 256},
        }
        (folder / "run.yaml").write_text(json.dumps(settings))
        command = ("-m", "fanfold", "run", str(folder / "run.yaml"), "--yes", "--json")
        child = await asyncio.create_subprocess_exec(
            sys.executable, *command, cwd=folder, stdout=asyncio.subprocess.PIPE
        )
        output, _ = await child.communicate()
        last = json.loads(output.decode().strip().splitlines()[-1])
        return int(last["done"])


async def _ask_naively(gateway: GatewayProcess, items: int) -> int:
    from langchain_openai import ChatOpenAI  # noqa: PLC0415 - half a second, for this one only
    from pydantic import SecretStr  # noqa: PLC0415

    model = ChatOpenAI(
        model="org/m",
        base_url=f"{gateway.url}/sophia/vllm/v1",
        api_key=SecretStr("good"),
        max_completion_tokens=ANSWER,
        max_retries=2,
    )
    asking = (model.ainvoke(make_prompt(n)) for n in range(items))
    replies = await asyncio.gather(*asking, return_exceptions=True)
    return sum(not isinstance(reply, BaseException) for reply in replies)
