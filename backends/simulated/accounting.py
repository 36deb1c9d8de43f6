"""What happened: counters per node, and how often each question was served."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True)
class NodeCounts:
    """Counters of one node.

    Attributes:
        requests: Completion requests that arrived, refused ones included.
        refused: Requests refused for their own fault or for a full queue, by status.
        finished: Answers sent, by finish reason.
        injected: Faults that struck, by kind.
        disconnects: Clients that left before their answer.
        prompt_tokens: Of the answers sent.
        completion_tokens: Of the answers sent.
        broken_tokens: Prompt and output tokens of those of them that nobody can read.
        abandoned_tokens: Prompt tokens read, and output tokens written, for clients that left
            or when the node died.
        running_max: Most requests worked on at once.
        waiting_max: Longest queue.
    """

    requests: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    finished: Counter[str] = field(default_factory=Counter)
    injected: Counter[str] = field(default_factory=Counter)
    disconnects: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    broken_tokens: int = 0
    abandoned_tokens: int = 0
    running_max: int = 0
    waiting_max: int = 0

    def to_mapping(self) -> dict[str, Any]:
        """Return the counters as JSON can say them."""
        values = {name: getattr(self, name) for name in self.__slots__}
        return {k: dict(v) if isinstance(v, Counter) else v for k, v in values.items()}


@dataclass(slots=True)
class Servings:
    """What became of one question.

    Attributes:
        asked: Times that it arrived.
        served: Times that it was answered completely.
        tokens: Prompt and output tokens of these answers.
        first_s: When it was first served, in simulated seconds since the start.
        last_s: When it was last served.
    """

    asked: int = 0
    served: int = 0
    tokens: int = 0
    first_s: float | None = None
    last_s: float | None = None


class ServingBook:
    """All questions by key: which were served more than once, and what that wasted."""

    def __init__(self) -> None:
        self._servings: dict[bytes, Servings] = {}
        self._wasted = 0

    def asked(self, key: bytes) -> int:
        """Note an arrival.

        Args:
            key: The question's key.

        Returns:
            How often it arrived before.
        """
        serving = self._servings.get(key)
        if serving is None:
            serving = self._servings[key] = Servings()
        serving.asked += 1
        return serving.asked - 1

    def served(self, key: bytes, tokens: int, now: float) -> None:
        """Note a complete answer.

        Args:
            key: The question's key.
            tokens: Prompt and output tokens.
            now: Simulated seconds since the start.
        """
        serving = self._servings.setdefault(key, Servings())
        if serving.served:
            self._wasted += tokens
        else:
            serving.first_s = now
        serving.served += 1
        serving.tokens += tokens
        serving.last_s = now

    def summary(self) -> dict[str, int]:
        """Return totals: distinct questions, servings, duplicates, tokens wasted on these."""
        served = sum(serving.served for serving in self._servings.values())
        answered = sum(serving.served > 0 for serving in self._servings.values())
        return {
            "distinct": len(self._servings),
            "answered": answered,
            "served": served,
            "duplicates": served - answered,
            "wasted_tokens": self._wasted,
        }

    def by_key(self) -> dict[str, dict[str, Any]]:
        """Return every question's servings, by its key in hexadecimal."""
        return {
            key.hex(): {name: getattr(serving, name) for name in Servings.__slots__}
            for key, serving in self._servings.items()
        }

    def clear(self) -> None:
        """Forget everything."""
        self._servings.clear()
        self._wasted = 0
