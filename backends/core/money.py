"""Limits, prices and costs of calls, in whole numbers, so that sums are exact."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import itemgetter
from typing import Any, Final, NamedTuple, Self

from .types import Json, Usage
from .values import COUNT_FIELDS, check_counts

NANO_PER_USD: Final = 1_000_000_000
"""Nano-dollars in a dollar."""

MS_PER_HOUR: Final = 3_600_000
"""Milliseconds in an hour."""

_PICO_PER_NANO: Final = 1000
_TOKENS: Final = 1_000_000
_PICO: Final = 10**12


class Amount(NamedTuple):
    """An amount spent, reserved or leased.

    Attributes:
        requests: Requests sent.
        tokens: Prompt and completion tokens.
        nano_usd: Nano-dollars.
        node_ms: Milliseconds of allocated nodes.
    """

    requests: int = 0
    tokens: int = 0
    nano_usd: int = 0
    node_ms: int = 0

    def plus(self, other: Amount) -> Amount:
        """Return the sum."""
        return Amount(
            self.requests + other.requests,
            self.tokens + other.tokens,
            self.nano_usd + other.nano_usd,
            self.node_ms + other.node_ms,
        )

    def minus(self, other: Amount) -> Amount:
        """Return the difference; it may be negative."""
        return Amount(
            self.requests - other.requests,
            self.tokens - other.tokens,
            self.nano_usd - other.nano_usd,
            self.node_ms - other.node_ms,
        )

    def replace_part(self, old: Amount, new: Amount) -> Amount:
        """Return the amount with one part of it replaced by another."""
        return Amount(
            self.requests - old.requests + new.requests,
            self.tokens - old.tokens + new.tokens,
            self.nano_usd - old.nano_usd + new.nano_usd,
            self.node_ms - old.node_ms + new.node_ms,
        )

    def times(self, factor: int) -> Amount:
        """Return a multiple."""
        return Amount(*(factor * value for value in self))

    def minimum(self, other: Amount) -> Amount:
        """Return the smaller value of each field."""
        return Amount(*map(min, self, other))

    def maximum(self, other: Amount) -> Amount:
        """Return the larger value of each field."""
        return Amount(*map(max, self, other))

    def to_json(self) -> dict[str, Json]:
        """Return the amount as plain data."""
        return self._asdict()

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Self:
        """Parse plain data; a missing field is 0.

        Raises:
            ValueError: A field is not a count.
        """
        check_counts(data, cls._fields, "amount")
        return cls(**{name: data.get(name) or 0 for name in cls._fields})


class NodeTime(NamedTuple):
    """Time of allocated nodes.

    Attributes:
        node_ms: Milliseconds of allocated nodes.
        idle_ms: Those of them without work.
        nano_usd: Their cost in nano-dollars, idle time included.
    """

    node_ms: int = 0
    idle_ms: int = 0
    nano_usd: int = 0

    def plus(self, other: NodeTime) -> NodeTime:
        """Return the sum."""
        return NodeTime(*(a + b for a, b in zip(self, other, strict=True)))

    @property
    def amount(self) -> Amount:
        """Return the amount that a budget counts."""
        return Amount(0, 0, self.nano_usd, self.node_ms)

    @property
    def idle_nano_usd(self) -> int:
        """Return the cost of idle time in nano-dollars."""
        return self.nano_usd * self.idle_ms // self.node_ms if self.node_ms else 0

    def to_json(self) -> dict[str, Json]:
        """Return the node time as plain data."""
        return self._asdict()

    @classmethod
    def from_json(cls, data: Mapping[str, Json]) -> Self:
        """Parse plain data; a missing field is 0.

        Raises:
            ValueError: A field is not a count.
        """
        check_counts(data, cls._fields, "node time")
        return cls(**{name: data.get(name) or 0 for name in cls._fields})


_get_counts: Final = itemgetter(*COUNT_FIELDS)


@dataclass(slots=True)
class UsageTotals:
    """Sums over records; a field that a record lacks counts as zero.

    Attributes:
        requests: Requests sent, failed ones included.
        prompt_tokens: Prompt tokens of answered requests, as far as reported.
        completion_tokens: Tokens of the answers, as far as reported.
        cached_tokens: Prompt tokens from prefix caches.
        lost_tokens: Upper bound of the tokens of requests that may be billed without an answer.
        useful_tokens: Tokens of the answers that count.
        nano_usd: Nano-dollars.
        useful_nano_usd: Nano-dollars of the answers that count.
        reused: Answers without cost, taken from an earlier equal request.
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
        """Return all tokens that may be billed."""
        return self.prompt_tokens + self.completion_tokens + self.lost_tokens

    @property
    def wasted_tokens(self) -> int:
        """Return tokens that may be billed without use: failed, hedged, sent back for repair."""
        return self.tokens - self.useful_tokens

    @property
    def wasted_nano_usd(self) -> int:
        """Return nano-dollars that may be billed without use."""
        return self.nano_usd - self.useful_nano_usd

    @property
    def amount(self) -> Amount:
        """Return the amount that counts against a budget."""
        return Amount(self.requests, self.tokens, self.nano_usd)

    def add(self, record: Mapping[str, Any]) -> None:
        """Add one record."""
        try:
            numbers = _get_counts(record)
        except KeyError:
            numbers = tuple(map(record.get, COUNT_FIELDS))
        self.add_numbers(numbers)

    def add_numbers(self, numbers: Sequence[int | None]) -> None:
        """Add the :data:`COUNT_FIELDS` of one record."""
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
    def from_numbers(cls, numbers: Iterable[Sequence[int | None]]) -> Self:
        """Return the sums over records, computed by column for speed.

        Args:
            numbers: :data:`COUNT_FIELDS` of each record.
        """
        sums = [sum(filter(None, column)) for column in zip(*numbers, strict=True)]
        return cls(**dict(zip(COUNT_FIELDS, sums, strict=False)))

    @classmethod
    def total(cls, parts: Iterable[UsageTotals]) -> Self:
        """Return the sum of several sums."""
        total = cls()
        for part in parts:
            total.merge(part)
        return total

    def to_dict(self) -> dict[str, int]:
        """Return the sums by their names."""
        return {name: getattr(self, name) for name in self.__slots__}

    def merge(self, other: UsageTotals) -> None:
        """Add other sums."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))


@dataclass(frozen=True, slots=True)
class BudgetLimits:
    """The limits of a budget; None is no limit.

    Attributes:
        requests: Requests.
        tokens: Tokens.
        nano_usd: Nano-dollars.
        node_ms: Milliseconds of allocated nodes.
    """

    requests: int | None = None
    tokens: int | None = None
    nano_usd: int | None = None
    node_ms: int | None = None

    @classmethod
    def from_settings(
        cls,
        usd: float | None = None,
        tokens: int | None = None,
        requests: int | None = None,
        node_hours: float | None = None,
    ) -> Self:
        """Build limits from a user's settings; fractions are rounded down."""
        return cls(
            requests=requests,
            tokens=tokens,
            nano_usd=None if usd is None else int(Fraction(str(usd)) * NANO_PER_USD),
            node_ms=None if node_hours is None else int(Fraction(str(node_hours)) * MS_PER_HOUR),
        )

    @property
    def has_any(self) -> bool:
        """Return True if there is any limit."""
        return any(limit is not None for limit in self.as_tuple())

    @property
    def can_spend(self) -> bool:
        """Return True if any limit lets something be spent."""
        return any(limit for limit in self.as_tuple())

    def as_tuple(self) -> tuple[int | None, ...]:
        """Return the limits in the order of :class:`Amount`'s fields."""
        return self.requests, self.tokens, self.nano_usd, self.node_ms


@dataclass(frozen=True, slots=True)
class TokenPrices:
    """Prices of tokens and nodes.

    Attributes:
        prompt: Pico-dollars per prompt token: a million times the dollars per million tokens.
        cached: Pico-dollars per prompt token from a prefix cache.
        completion: Pico-dollars per completion token.
        node: Nano-dollars per second of one node.
    """

    prompt: int = 0
    cached: int = 0
    completion: int = 0
    node: int = 0

    @classmethod
    def from_usd(
        cls,
        prompt: float = 0.0,
        cached: float | None = None,
        completion: float = 0.0,
        node_hour: float = 0.0,
    ) -> Self:
        """Build prices from dollars per million tokens, and dollars per node-hour.

        Args:
            prompt: Price of prompt tokens.
            cached: Price of cached prompt tokens; None: the price of other prompt tokens.
            completion: Price of completion tokens.
            node_hour: Price of a node for an hour.
        """
        pico = _PICO // _TOKENS
        return cls(
            prompt=_up(prompt, pico),
            cached=_up(prompt if cached is None else cached, pico),
            completion=_up(completion, pico),
            node=_up(node_hour / 3600, NANO_PER_USD),
        )

    @property
    def priced(self) -> bool:
        """Return True if tokens have a price."""
        return any((self.prompt, self.cached, self.completion))

    def to_json(self) -> dict[str, int]:
        """Return the prices as plain data."""
        return {name: getattr(self, name) for name in self.__slots__}

    def nano_usd(self, usage: Usage) -> int:
        """Return the cost of a call in nano-dollars, rounded up; unknown tokens cost nothing."""
        prompt, cached = usage.prompt or 0, min(usage.cached or 0, usage.prompt or 0)
        pico = (prompt - cached) * self.prompt + cached * self.cached
        pico += (usage.completion or 0) * self.completion
        return -(-pico // _PICO_PER_NANO)

    def amount(self, usage: Usage, requests: int = 1) -> Amount:
        """Return the amount of requests with so many tokens in all."""
        tokens = (usage.prompt or 0) + (usage.completion or 0)
        return Amount(requests, tokens, self.nano_usd(usage))

    def node_amount(self, node_ms: int) -> Amount:
        """Return the amount of allocated nodes for a time."""
        return Amount(0, 0, -(-node_ms * self.node // 1000), node_ms)


NO_PRICES: Final = TokenPrices()
"""All prices are zero or unknown."""


def _up(price: float, unit: int) -> int:
    """Return a price in whole small units, rounded up."""
    exact = Fraction(str(price)) * unit
    return -(-exact.numerator // exact.denominator)
