"""Model of one vLLM engine: KV blocks with a prefix cache, a queue, steps over a batch.

Each step of the engine gives every sequence that decodes one
token, and fills the rest of its token budget with prompts (chunked prefill). A step takes::

    step_s + context_token_s * tokens of context + prompt_token_s * prompt tokens that are computed

The constants are those of NVIDIA Dynamo's engine simulator (``lib/mocker``, polynomial model,
default arguments), which were fitted to measurements of an 8B model on an H100: a decode step of
``5.74 + 54.01 y - 25.74 y^2`` ms at the share ``y`` of a cache of 16,384 blocks of 64 tokens, and
0.01518344 ms per prompt token. Left out are the terms in ``y^2`` and in the square of the prompt,
which are small here, and the prefill's own constant: prompts are computed in the same step as the
tokens of the batch (Sarathi-Serve, arXiv:2403.02310), so the constant of a step occurs once.

Blocks follow vLLM's design of automatic prefix caching (docs.vllm.ai, "Automatic Prefix Caching"):
only full blocks are cached, a block is known by its tokens and all tokens before it, at least one
token of a prompt is computed, blocks without a reference are evicted in the order of their last
use, and of one request the end before the beginning. Differences: the blocks of an answer are
reserved when its request starts, so that nothing is preempted, and a block counts as cached from
the step in which its request starts.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Final

from ..core.errors import ConfigurationError

BLOCK_TOKENS: Final = 16
"""Tokens of a block, as in vLLM."""


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Size and speed of an engine.

    Attributes:
        kv_blocks: Blocks of 16 tokens in the KV cache.
        max_num_seqs: Requests processed at once.
        max_num_batched_tokens: Limit of tokens computed in one step.
        step_s: Seconds of a step, whatever it computes.
        context_token_s: Further seconds per token of context of the sequences that decode.
        prompt_token_s: Further seconds per prompt token that is computed.
        prefix_caching: Whether blocks are used again.

    Raises:
        ConfigurationError: A number is not above 0.
    """

    kv_blocks: int = 32_768
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    step_s: float = 5.74e-3
    context_token_s: float = 54.01e-3 / (16_384 * 64)
    prompt_token_s: float = 1.518344e-5
    prefix_caching: bool = True

    def __post_init__(self) -> None:
        """Refuse sizes and times that are not above 0; times per token may be 0."""
        for name in ("kv_blocks", "max_num_seqs", "max_num_batched_tokens", "step_s"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(
                    f"simulated fleet: engine: {name} must be above 0, not {getattr(self, name)}"
                )


def hash_blocks(text: str, block_chars: int) -> list[int]:
    """Return the keys of the full blocks of a text; each depends on all text before it."""
    key, keys = 0, []
    for start in range(0, len(text) - block_chars + 1, block_chars):
        key = hash((key, text[start : start + block_chars]))
        keys.append(key)
    return keys


class BlockCache:
    """The KV blocks of an engine: used ones with their references, and free ones by last use.

    Args:
        blocks: Number of blocks.

    Attributes:
        queries: Blocks of prompts that were looked up.
        hits: Those of them that were found.
    """

    def __init__(self, blocks: int) -> None:
        self._blank = blocks
        self._used: dict[int, int] = {}
        self._free: OrderedDict[int, None] = OrderedDict()
        self._names = itertools.count(1)
        self._anonymous = 0
        self.blocks = blocks
        self.queries = 0
        self.hits = 0

    @property
    def in_use(self) -> int:
        """Number of blocks with a reference."""
        return len(self._used) + self._anonymous

    def count_cached(self, keys: Sequence[int]) -> int:
        """Return how many blocks at the beginning of a prompt are cached."""
        count = 0
        for key in keys:
            if key not in self._used and key not in self._free:
                break
            count += 1
        return count

    def has_room(self, keys: Sequence[int], cached: int, further: int) -> bool:
        """Return True if there are free blocks for a request.

        Args:
            keys: The full blocks of its prompt.
            cached: Those at the beginning that are cached.
            further: The blocks after them: the end of the prompt, and the answer.
        """
        needed = len(keys) - cached + further
        kept = sum(key in self._free for key in keys[:cached])
        return needed + kept <= self._blank + len(self._free)

    def acquire(self, keys: Iterable[int], further: int) -> None:
        """Take the blocks of a request; those that are cached are shared."""
        for key in keys:
            references = self._used.get(key)
            if references is not None:
                self._used[key] = references + 1
                continue
            if key in self._free:
                del self._free[key]
            else:
                self._take_one()
            self._used[key] = 1
        for _ in range(further):
            self._take_one()
        self._anonymous += further

    def release(self, keys: Sequence[int], further: int) -> None:
        """Give back the blocks of a request; they stay cached until others need them."""
        self._anonymous -= further
        for _ in range(further):
            # Blocks of answers are cached too, but no other prompt begins with them.
            self._free[-next(self._names)] = None
        for key in reversed(keys):
            references = self._used[key] - 1
            if references:
                self._used[key] = references
            else:
                del self._used[key]
                self._free[key] = None

    def _take_one(self) -> None:
        if self._blank:
            self._blank -= 1
        else:
            self._free.popitem(last=False)


@dataclass(slots=True, eq=False)
class EngineRequest:
    """One request to an engine.

    Attributes:
        keys: Keys of the full blocks of its prompt.
        prompt_tokens: Length of its prompt.
        answer_tokens: Length of its answer, from 1.
        cached_tokens: Prompt tokens that were found in the cache.
        first_at: When its first token came; None before that.
        ended_at: When its last token came, NaN if it was cancelled; None before that.
        on_progress: Called by an `EngineDriver` after its first and after its last token.
        left: Prompt tokens that are not computed yet, once it runs.
        further: Its blocks after the full blocks of its prompt.
        last_step: Number of the step that gives its last token.
        is_running: Whether it has left the queue.
    """

    keys: Sequence[int]
    prompt_tokens: int
    answer_tokens: int
    cached_tokens: int = 0
    first_at: float | None = None
    ended_at: float | None = None
    on_progress: Callable[[EngineRequest], None] | None = None
    left: int = field(default=0, init=False)
    further: int = field(default=0, init=False)
    last_step: int = field(default=0, init=False)
    is_running: bool = field(default=False, init=False)


class Engine:
    """Queue, batch and cache of one engine; requests start first come, first served.

    It is pure: times are passed in, in seconds. Call ``advance`` at ``due_at``, and before anything
    else at a later time.

    Args:
        spec: Size and speed.

    Attributes:
        cache: Its KV blocks.
        due_at: When the present steps end, or None if it has no work.
        busy_s: Seconds in which it has worked.
        computed_tokens: Prompt tokens that it has computed.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.spec = spec
        self.cache = BlockCache(spec.kv_blocks)
        self.due_at: float | None = None
        self.busy_s = 0.0
        self.computed_tokens = 0
        self._waiting: deque[EngineRequest] = deque()
        self._prefilling: list[tuple[EngineRequest, int]] = []
        self._open_prompts: deque[EngineRequest] = deque()
        self._decoding: list[tuple[int, int, EngineRequest]] = []
        self._ticks = itertools.count()
        self._running = 0
        self._decoders = 0
        self._context = 0
        self._step = 0
        self._began = 0.0
        self._length = 0.0
        self._steps = 0

    @property
    def running(self) -> int:
        """Number of requests in the batch."""
        return self._running

    @property
    def waiting(self) -> int:
        """Number of queued requests."""
        return len(self._waiting)

    def submit(self, request: EngineRequest, now: float) -> None:
        """Accept a request.

        Raises:
            ValueError: The cache is too small for it.
        """
        total = -(-(request.prompt_tokens + request.answer_tokens) // BLOCK_TOKENS)
        if total > self.cache.blocks:
            raise ValueError(f"a request of {total} blocks does not fit {self.cache.blocks}")
        request.further = total - len(request.keys)
        self._waiting.append(request)
        if self.due_at is None:
            self._begin_steps(now)
        elif self._steps > 1 and len(self._waiting) == 1 and self._can_start(request):
            # It joins the batch with the next step.
            done = max(1, math.ceil((now - self._began) / self._length - 1e-9))
            self._steps = min(self._steps, done)
            self.due_at = self._began + self._steps * self._length

    def cancel(self, request: EngineRequest) -> None:
        """Drop a request; the step that computes it runs to its end."""
        if request.ended_at is not None:
            return
        request.ended_at = math.nan
        if not request.is_running:
            self._waiting.remove(request)
            return
        self._running -= 1
        self._context -= request.prompt_tokens - request.left
        if request.first_at is not None:
            self._decoders -= 1
            self._context -= self._step - (request.last_step - request.answer_tokens) - 1
        elif request in self._open_prompts:
            self._open_prompts.remove(request)
        self.cache.release(request.keys, request.further)

    def advance(self, now: float) -> list[EngineRequest]:
        """Compute all steps that end by now.

        Returns:
            The requests whose first or last token came, in that order.
        """
        changed: list[EngineRequest] = []
        while self.due_at is not None and self.due_at <= now:
            at = self.due_at
            self.busy_s += at - self._began
            self._finish_steps(at, changed)
            self._begin_steps(at)
        return changed

    def _finish_steps(self, at: float, changed: list[EngineRequest]) -> None:
        self._step += self._steps
        self._context += self._steps * self._decoders
        while self._decoding and self._decoding[0][0] <= self._step:
            request = heapq.heappop(self._decoding)[2]
            if request.ended_at is None:
                self._decoders -= 1
                self._end(request, at, changed)
        for request, tokens in self._prefilling:
            if request.ended_at is not None:
                continue
            self._context += tokens
            request.left -= tokens
            if request.left:
                continue
            request.first_at = at
            changed.append(request)
            request.last_step = self._step + request.answer_tokens - 1
            if request.answer_tokens == 1:
                changed.pop()  # its first token is its last
                self._end(request, at, changed)
                continue
            self._decoders += 1
            heapq.heappush(self._decoding, (request.last_step, next(self._ticks), request))
        self._prefilling.clear()

    def _end(self, request: EngineRequest, at: float, changed: list[EngineRequest]) -> None:
        request.ended_at = at
        self._running -= 1
        self._context -= request.prompt_tokens + request.answer_tokens - 1
        self.cache.release(request.keys, request.further)
        changed.append(request)

    def _can_start(self, request: EngineRequest) -> bool:
        if self._running >= self.spec.max_num_seqs:
            return False
        cached = self._count_cached(request)
        return self.cache.has_room(request.keys, cached, request.further)

    def _count_cached(self, request: EngineRequest) -> int:
        if not self.spec.prefix_caching:
            return 0
        most = (request.prompt_tokens - 1) // BLOCK_TOKENS  # one token must be computed
        return self.cache.count_cached(request.keys[:most])

    def _begin_steps(self, now: float) -> None:
        """Begin the next step, or as many equal ones as nothing can change."""
        budget = self.spec.max_num_batched_tokens - self._decoders
        computed = 0
        while budget > 0 and (self._open_prompts or self._start_next()):
            request = self._open_prompts[0]
            tokens = min(request.left, budget)
            budget -= tokens
            computed += tokens
            self._prefilling.append((request, tokens))
            if tokens < request.left:
                break
            self._open_prompts.popleft()
        spec = self.spec
        if not computed and not self._decoders:
            self.due_at = None
            return
        steps = 1
        if not computed:
            while self._decoding[0][2].ended_at is not None:
                heapq.heappop(self._decoding)  # cancelled
            steps = self._decoding[0][0] - self._step
        context = self._context + self._decoders * (steps - 1) / 2
        self._began, self._steps = now, steps
        self._length = spec.step_s + spec.context_token_s * context + spec.prompt_token_s * computed
        self.computed_tokens += computed
        self.due_at = now + steps * self._length

    def _start_next(self) -> bool:
        """Move the oldest waiting request to the batch, if there is room."""
        if not self._waiting or not self._can_start(self._waiting[0]):
            return False
        request = self._waiting.popleft()
        cached = self._count_cached(request)
        self.cache.queries += len(request.keys)
        self.cache.hits += cached
        self.cache.acquire(request.keys, request.further)
        request.cached_tokens = cached * BLOCK_TOKENS
        request.left = request.prompt_tokens - request.cached_tokens
        request.is_running = True
        self._context += request.cached_tokens
        self._running += 1
        self._open_prompts.append(request)
        return True


class EngineDriver:
    """Runs an engine in the time of the running event loop.

    Args:
        engine: The engine.
        speed: Seconds of the engine in one second of the loop.
    """

    def __init__(self, engine: Engine, speed: float = 1.0) -> None:
        self.engine = engine
        self._speed = speed
        self._timer: asyncio.TimerHandle | None = None

    def submit(self, request: EngineRequest) -> None:
        """Accept a request."""
        self._advance()
        self.engine.submit(request, self._now())
        self._set_timer()

    def cancel(self, request: EngineRequest) -> None:
        """Drop a request."""
        self._advance()
        self.engine.cancel(request)

    def _now(self) -> float:
        return asyncio.get_running_loop().time() * self._speed

    def _on_timer(self) -> None:
        self._timer = None
        self._advance(self.engine.due_at)
        self._set_timer()

    def _advance(self, due: float | None = None) -> None:
        # A timer may come a fraction of the clock's resolution before the time for which it is set.
        now = self._now() if due is None else max(due, self._now())
        for request in self.engine.advance(now):
            if request.on_progress is not None:
                request.on_progress(request)

    def _set_timer(self) -> None:
        due = self.engine.due_at
        if self._timer is not None:
            if due is not None and self._timer.when() == due / self._speed:
                return
            self._timer.cancel()
            self._timer = None
        if due is not None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(due / self._speed, self._on_timer)
