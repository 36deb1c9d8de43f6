"""``make bench-gpu ARGS='--url URL'``: tokens a second through fanfold and ``vllm bench serve``.

For anyone with a server of vLLM and a GPU: both clients send the same prompts to the same server,
with the same number in flight and the same length of answers, and alternate round by round. Each
round has prompts of its own, so that the server's prefix cache helps neither. ``vllm`` must be
on the PATH, or be named by ``--vllm``, with its extra ``bench``.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import urllib.request
from datetime import datetime
from pathlib import Path
from shutil import which
from tempfile import TemporaryDirectory
from typing import Any, Final

import pyarrow.parquet as pq

from .figures import OtherPrograms, Page, Table, describe_machine, write_figures
from .suite import DOCS

WORDS: Final = ("water", "acid", "crystal", "enzyme", "solvent", "protein", "lattice", "polymer")


def write_prompts(folder: Path, items: int, words: int, seed: int) -> None:
    """Write the same prompts for both: ``prompts.jsonl`` for vLLM, ``items.jsonl`` for fanfold."""
    draw = random.Random(seed)
    prompts = [f"{seed}-{n}: " + " ".join(draw.choices(WORDS, k=words)) for n in range(items)]
    for name, field in (("prompts.jsonl", "prompt"), ("items.jsonl", "text")):
        with (folder / name).open("w") as file:
            for n, prompt in enumerate(prompts):
                file.write(json.dumps({"id": str(n), field: prompt}) + "\n")


def run_fanfold(folder: Path, given: argparse.Namespace) -> float:
    """Return the tokens a second of a run of fanfold."""
    settings = {
        "name": "bench-gpu",
        "input": {"path": "items.jsonl", "id": "id"},
        "task": {"prompt": "{text}"},
        "model": {
            "name": given.model,
            "max_tokens": given.tokens,
            "extra_body": {"ignore_eos": True},
        },
        "endpoints": {"urls": [given.url]},
        "limits": {"streams": given.streams, "endpoint_streams": given.streams, "hedge": False},
    }
    (folder / "bench.json").write_text(json.dumps(settings))
    command = [sys.executable, "-P", "-m", "fanfold", "run", "bench.json", "--out", "run", "--json"]
    subprocess.run([*command, "--no-report"], cwd=folder, check=False, stdout=subprocess.PIPE)
    rows: list[dict[str, Any]] = pq.read_table(folder / "run" / "results.parquet").to_pylist()
    # answers end at their limit, so that items count as truncated
    assert all(row["completion_tokens"] == given.tokens for row in rows), "not all were answered"
    ends = [datetime.fromisoformat(str(row["finished_at"])).timestamp() for row in rows]
    begins = [end - row["latency_s"] for end, row in zip(ends, rows, strict=True)]
    return float(sum(row["completion_tokens"] for row in rows) / (max(ends) - min(begins)))


def run_vllm(folder: Path, given: argparse.Namespace) -> float:
    """Return the tokens a second that ``vllm bench serve`` reports."""
    command = [given.vllm, "bench", "serve", "--backend", "openai-chat"]
    command += ["--base-url", given.url.removesuffix("/v1"), "--endpoint", "/v1/chat/completions"]
    command += ["--model", given.model, "--dataset-name", "custom", "--skip-chat-template"]
    command += ["--dataset-path", "prompts.jsonl", "--num-prompts", str(given.items)]
    command += ["--custom-output-len", str(given.tokens), "--max-concurrency", str(given.streams)]
    command += ["--ignore-eos", "--disable-shuffle", "--save-result", "--result-filename", "b.json"]
    if given.tokenizer:
        command += ["--tokenizer", given.tokenizer]
    subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE)
    found: dict[str, Any] = json.loads((folder / "b.json").read_text())
    assert found["completed"] == given.items, "not all prompts were answered"
    return float(found["output_throughput"])


def main() -> None:
    """Measure, and write ``docs/benchmarks/gpu/``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--url", required=True, help="the server, with /v1")
    parser.add_argument("--model", help="as the server names it (its first model)")
    parser.add_argument("--tokenizer", help="name or folder, if the model's name is not one")
    parser.add_argument("--vllm", default="vllm", help="the program")
    parser.add_argument("--items", type=int, default=2_000)
    parser.add_argument("--words", type=int, default=200, help="words in each prompt")
    parser.add_argument("--tokens", type=int, default=200, help="tokens in each answer")
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=DOCS / "gpu", help="folder for the figures")
    given = parser.parse_args()
    if which(given.vllm) is None:
        parser.error(f"{given.vllm} was not found; name the program of vLLM with --vllm")
    if given.model is None:
        with urllib.request.urlopen(f"{given.url}/models") as answer:
            given.model = json.loads(answer.read())["data"][0]["id"]
    others = OtherPrograms()
    table = Table(
        "tokens",
        "How many tokens a second does a server make?",
        "tokens/s",
        f"{given.items:,} prompts of {given.words} words, answers of {given.tokens} tokens, "
        f"{given.streams} in flight, one server.",
        "more",
    )
    sides = {"vllm bench serve": run_vllm, "fanfold run": run_fanfold}
    for number in range(given.rounds):
        for place, (side, run) in enumerate(sides.items()):
            with TemporaryDirectory(prefix="fanfold-bench-") as name:
                write_prompts(Path(name), given.items, given.words, 2 * number + place)
                table.add(side, run(Path(name), given))
            print(f"round {number + 1}: {side}: {table.rows[side][-1]:,.0f} tokens/s", flush=True)
    intro = "A real server of vLLM, whose machine is not described here."
    page = Page([table], describe_machine(others), "make bench-gpu", intro)
    write_figures(given.out, page)
    print(f"{given.out}/README.md written")


if __name__ == "__main__":
    main()
