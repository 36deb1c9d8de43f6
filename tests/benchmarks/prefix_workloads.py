"""Workloads of the prefix-cache benchmark, fixed before any policy was written.

Prompts are of 1,536 tokens, of which the first 64 are the same for all items. The answers make
the work of the servers for prompts two times or half of that for answers (without a cache, with
full batches). A server works on 64 requests at once. Its KV cache has blocks for 64 requests that
share nothing, so that memory never limits a batch, and for the shared beginnings of 8 groups.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Final

from fanfold.backends.simulated.engine import BLOCK_TOKENS, EngineSpec

SERVERS: Final = 8
BATCH: Final = 64
STREAMS: Final = 1024
PROMPT: Final = 1536
CONSTANT: Final = 64
GROUPS, SIZE = 400, 50
CACHED_GROUPS: Final = 8
_CHARS: Final = 4


@dataclass(frozen=True, slots=True)
class BenchItem:
    """One item: the parts of its prompt with their tokens, and the tokens of its answer.

    Attributes:
        parts: Name and tokens of each part; equal parts have equal names.
        answer: Tokens of the answer.
    """

    parts: tuple[tuple[str, int], ...]
    answer: int

    @property
    def prompt_tokens(self) -> int:
        """Return the length of the prompt."""
        return sum(tokens for _, tokens in self.parts)

    def render(self) -> str:
        """Return the prompt: each part repeats its name."""
        return "".join(_fill(name, tokens * _CHARS) for name, tokens in self.parts)


def _fill(name: str, chars: int) -> str:
    word = f"{name} "
    return (word * (chars // len(word) + 1))[:chars]


@dataclass(frozen=True, slots=True)
class Workload:
    """Items in the order of their input, and the servers that answer them.

    Attributes:
        name: Short name.
        items: The items.
        engine: One of the servers.
    """

    name: str
    items: Sequence[BenchItem]
    engine: EngineSpec

    def bound_s(self, servers: int = SERVERS) -> float:
        """Return the work bound: no schedule of these servers ends earlier.

        Each different block of a prompt is computed once over all servers, each token of an
        answer takes part in a full batch, and no server is ever idle.
        """
        engine = self.engine
        known: set[tuple[tuple[str, int], ...]] = set()
        prompt = answer = context = 0
        for item in self.items:
            for end in range(1, len(item.parts) + 1):
                if item.parts[:end] not in known:
                    known.add(item.parts[:end])
                    tokens = item.parts[end - 1][1]
                    prompt += tokens
            answer += item.answer
            context += item.answer * item.prompt_tokens + item.answer**2 // 2
        steps = answer / engine.max_num_seqs
        work = (
            prompt * engine.prompt_token_s
            + steps * engine.step_s
            + context * engine.context_token_s
        )
        return work / servers


def answer_tokens(prefill_share: float, prompt: int = PROMPT) -> int:
    """Return the length of answers for a ratio of the work for prompts to that for answers."""
    spec = EngineSpec()
    prefill = prompt * spec.prompt_token_s
    answer = 1.0
    for _ in range(20):  # the context grows with the answer
        context = prompt + answer / 2
        answer = prefill / prefill_share / (spec.step_s / BATCH + context * spec.context_token_s)
    return round(answer)


def make_engine(answer: int, shared: int, private: int) -> EngineSpec:
    """Return servers whose cache holds a batch and the shared parts of 8 groups."""
    own = BATCH * -(-(CONSTANT + shared + private + answer) // BLOCK_TOKENS)
    blocks = own + CACHED_GROUPS * -(-shared // BLOCK_TOKENS)
    return EngineSpec(kv_blocks=blocks, max_num_seqs=BATCH)


def grouped(
    name: str, share: float, prefill_share: float, seed: int, groups: int = GROUPS
) -> Workload:
    """Return groups of 50 items whose prompts share a part, shuffled."""
    shared = int(PROMPT * share) // BLOCK_TOKENS * BLOCK_TOKENS - CONSTANT
    answer = answer_tokens(prefill_share)
    items = [
        BenchItem(
            (
                ("instruction", CONSTANT),
                (f"group {group:04}", shared),
                (f"item {group:04} {number:02}", PROMPT - CONSTANT - shared),
            ),
            answer,
        )
        for group in range(groups)
        for number in range(SIZE)
    ]
    random.Random(seed).shuffle(items)
    return Workload(name, items, make_engine(answer, shared, PROMPT - CONSTANT - shared))


def unshared(name: str, seed: int, groups: int = GROUPS) -> Workload:
    """Return items that share nothing but the instruction."""
    answer = answer_tokens(1.0)
    own = PROMPT - CONSTANT
    items = [
        BenchItem((("instruction", CONSTANT), (f"item {number:06}", own)), answer)
        for number in range(groups * SIZE)
    ]
    random.Random(seed).shuffle(items)
    return Workload(name, items, make_engine(answer, 0, own))


def heavy_tails(name: str, seed: int, groups: int = GROUPS) -> Workload:
    """Return items without sharing whose prompts and answers are log-normal (sigma 1)."""
    draw = random.Random(seed)
    mean = answer_tokens(1.0)
    items = []
    for number in range(groups * SIZE):
        own = min(16_000, max(32, round(PROMPT / 1.65 * math.exp(draw.gauss(0, 1)))))
        answer = min(4_000, max(4, round(mean / 1.65 * math.exp(draw.gauss(0, 1)))))
        items.append(BenchItem((("instruction", CONSTANT), (f"item {number:06}", own)), answer))
    engine = make_engine(4 * mean, 0, 4 * PROMPT)
    return Workload(name, items, engine)


def held_out(name: str, seed: int, groups: int = GROUPS) -> Workload:
    """Return the workload that no policy was tuned on: nested sharing, groups of any size, tails.

    Group sizes are Zipf-like, a quarter of the items share nothing, groups have subgroups that
    share a further part, and the input is sorted by a column that cuts across the groups.
    """
    draw = random.Random(seed)
    mean = answer_tokens(1.0)
    total = groups * SIZE
    items: list[BenchItem] = []
    group = 0
    while len(items) < 0.75 * total:
        group += 1
        size = min(600, max(2, round(600 / group**0.7 * draw.uniform(0.5, 1.5))))
        shared = draw.randrange(160, 960, BLOCK_TOKENS)
        for number in range(size):
            sub = number % draw.randint(1, 6)
            own = min(6000, max(32, round(500 * math.exp(draw.gauss(0, 0.7)))))
            answer = min(2000, max(4, round(mean / 1.3 * math.exp(draw.gauss(0, 0.7)))))
            parts = (
                ("instruction", CONSTANT),
                (f"group {group:04}", shared),
                (f"sub {group:04} {sub}", 128),
                (f"item {group:04} {number:03}", own),
            )
            items.append(BenchItem(parts, answer))
    for number in range(total - len(items)):
        own = min(6000, max(32, round(1000 * math.exp(draw.gauss(0, 0.7)))))
        answer = min(2000, max(4, round(mean / 1.3 * math.exp(draw.gauss(0, 0.7)))))
        items.append(BenchItem((("instruction", CONSTANT), (f"alone {number:05}", own)), answer))
    items.sort(key=lambda item: (item.answer % 7, draw.random()))
    return Workload(name, items, make_engine(2 * mean, 720, 1500))


def make_workloads() -> dict[str, Callable[[int, int], Workload]]:
    """Return the workloads by name; each is made from a seed and a number of groups."""
    made: dict[str, Callable[[int, int], Workload]] = {}
    for share, share_name in ((1 / 3, "third"), (2 / 3, "two-thirds")):
        for ratio, ratio_name in ((2.0, "2:1"), (0.5, "1:2")):
            name = f"{share_name} {ratio_name}"

            def make(
                seed: int, groups: int, name: str = name, share: float = share, ratio: float = ratio
            ) -> Workload:
                return grouped(name, share, ratio, seed, groups)

            made[name] = make
    made["unshared"] = lambda seed, groups: unshared("unshared", seed, groups)
    made["heavy tails"] = lambda seed, groups: heavy_tails("heavy tails", seed, groups)
    made["held out"] = lambda seed, groups: held_out("held out", seed, groups)
    return made


def without_cache(workload: Workload) -> Workload:
    """Return the workload on servers without a prefix cache."""
    return replace(workload, engine=replace(workload.engine, prefix_caching=False))
