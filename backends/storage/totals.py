"""What a journal's records add up to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from ..core.money import Amount
from ..core.values import NUMBERS


@dataclass(frozen=True, slots=True)
class Counts:
    """How many items are done, failed, and still open."""

    done: int
    failed: int
    open: int


@dataclass(slots=True)
class Spent:
    """Sums over records; what a record lacks counts as nothing.

    Attributes:
        requests: Requests sent, failed ones included.
        prompt_tokens: Tokens of the prompts that were answered, as far as reported.
        completion_tokens: Tokens of the answers, as far as reported.
        cached_tokens: Prompt tokens that prefix caches held.
        lost_tokens: The most tokens of requests that may have been paid and brought no answer.
        useful_tokens: Tokens of the answers that count.
        nano_usd: Nano-dollars.
        useful_nano_usd: Nano-dollars of the answers that count.
        reused: Answers that cost nothing, for they were given to an equal request before.
    """

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    lost_tokens: int = 0
    useful_tokens: int = 0
    nano_usd: int = 0
    useful_nano_usd: int = 0
    reused: int = 0

    @property
    def tokens(self) -> int:
        """Return all tokens that may have been paid."""
        return self.prompt_tokens + self.completion_tokens + self.lost_tokens

    @property
    def wasted_tokens(self) -> int:
        """Return the tokens that may have been paid for nothing: failed, hedged, sent back."""
        return self.tokens - self.useful_tokens

    @property
    def wasted_nano_usd(self) -> int:
        """Return the nano-dollars that may have been paid for nothing."""
        return self.nano_usd - self.useful_nano_usd

    @property
    def amount(self) -> Amount:
        """Return what a budget counts of it."""
        return Amount(self.requests, self.tokens, self.nano_usd)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add what one record says."""
        self.add_numbers(list(map(record.get, NUMBERS)))

    def add_numbers(self, numbers: Sequence[int | None]) -> None:
        """Add what one record says of :data:`NUMBERS`."""
        requests, prompt, completion, cached, lost, useful, nano, useful_nano, reused = numbers
        self.requests += requests or 0
        self.prompt_tokens += prompt or 0
        self.completion_tokens += completion or 0
        self.cached_tokens += cached or 0
        self.lost_tokens += lost or 0
        self.useful_tokens += useful or 0
        self.nano_usd += nano or 0
        self.useful_nano_usd += useful_nano or 0
        self.reused += reused or 0

    @classmethod
    def of(cls, numbers: Iterable[Sequence[int | None]]) -> Self:
        """Return the sums over records: column by column, which is less work.

        Args:
            numbers: What each record says of :data:`NUMBERS`.
        """
        sums = [sum(filter(None, column)) for column in zip(*numbers, strict=True)]
        return cls(**dict(zip(NUMBERS, sums, strict=False)))

    def counts(self) -> dict[str, int]:
        """Return the sums by their names."""
        return {name: getattr(self, name) for name in self.__slots__}

    def merge(self, other: Spent) -> None:
        """Add other sums."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(slots=True)
class Fresh:
    """Items that have ended since somebody looked last.

    Attributes:
        done: How many were answered.
        failed: How many ended without an answer.
        spent: What they have spent.
    """

    done: int = 0
    failed: int = 0
    spent: Spent = field(default_factory=Spent)

    def count(self, facts: Sequence[tuple[Any, ...]]) -> None:
        """Count records, by their index, status and :data:`NUMBERS`."""
        done = sum(status == "done" for _, status, *_ in facts)
        self.done, self.failed = self.done + done, self.failed + len(facts) - done
        self.spent.merge(Spent.of(numbers for _, _, *numbers in facts))
