"""What nodes may use. The graphs' own context implements it; nodes never see how."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from ..backends.core.messages import ShardResult, ShardTask
from ..backends.core.money import NO_PRICES, Amount, TokenPrices
from ..backends.core.protocols import Account, ChatModel
from ..backends.core.templates import Template
from ..backends.core.types import Item, Json, Shard
from .aggregators import AggregatorSet
from .item.answer import AnswerCheck
from .shard.gate import Gate
from .shard.progress import Progress, ProgressStream
from .state import ItemState, RunKey

Delegate: TypeAlias = Callable[[dict[str, Any]], Awaitable[Any]]


@dataclass(frozen=True)
class ItemContext:
    """What the item graph may use.

    Attributes:
        system: The constant system text, or ``""``.
        prompt: The template of the question.
        model: Who answers.
        answer_check: How answers are judged.
        repairs: How often an invalid answer is sent back.
        delegate: A user's own item graph, called with the columns and the messages.
    """

    system: str
    prompt: Template
    model: ChatModel
    answer_check: AnswerCheck
    repairs: int = 1
    delegate: Delegate | None = None


class ItemSequence(Protocol):
    """The items of a run."""

    def __len__(self) -> int:
        """Return how many there are."""
        ...

    def read(self, lo: int, hi: int) -> list[Item]:
        """Return the items ``lo`` to ``hi`` (exclusive)."""
        ...


class ItemJournal(Protocol):
    """The journal of finished items."""

    def is_finished(self, index: int) -> bool:
        """Say whether an item has ended."""
        ...

    def read_record(self, index: int) -> dict[str, Any]:
        """Return the record of a finished item."""
        ...

    def read_records(self, status: str | None = None) -> Iterator[dict[str, Any]]:
        """Yield the records in input order."""
        ...

    def put(self, record: dict[str, Json]) -> None:
        """Record how an item ended.

        Raises:
            TypeError: JSON has no form for a value in the record; nothing was written.
        """
        ...

    async def flush(self) -> None:
        """Wait until everything recorded so far is on disk."""
        ...


class RunJournal(ItemJournal, Protocol):
    """A run's journal, which workers write to as well."""

    @property
    def duplicates(self) -> int:
        """Return how many records are of items that have another one, which may count."""
        ...

    def extents(self) -> dict[str, int]:
        """Return how far each journal file has been read or written, in bytes, by its name."""
        ...


AnsweredTask: TypeAlias = tuple[ShardTask | None, ShardResult]
"""A worker's summary, with the order that it answers; None: an earlier life has ordered it."""


class ShardCoordinator(Protocol):
    """Those who work elsewhere."""

    @property
    def has_node_endpoints(self) -> bool:
        """Say whether each worker has endpoints of its own."""
        ...

    @property
    def in_flight(self) -> int:
        """Return how many shards are out."""
        ...

    @property
    def nodes(self) -> tuple[int, int]:
        """Return how many nodes are held, and how many of them work."""
        ...

    async def run_shard(
        self, shard: Shard, remaining: Callable[[], Awaitable[list[Item]]]
    ) -> AnsweredTask | None:
        """Have the remaining items of a shard worked on.

        Args:
            shard: The shard.
            remaining: Returns the items that have not ended yet; asked again at each attempt.

        Returns:
            What was answered; None when nothing was left to order, or the run is being stopped.

        Raises:
            RunStoppedError: The shard was lost too often.
            ConfigurationError: The work cannot be done, whatever is tried again.
        """
        ...

    async def refresh(self, worker: str | None = None) -> None:
        """Read what workers, or one of them, have recorded since the last time."""
        ...

    async def stop(self) -> None:
        """Let no worker begin a further item."""
        ...

    async def finish_reading(self) -> None:
        """Read the journal a last time: what workers record from now on counts for nothing."""
        ...


class BudgetStatus(Protocol):
    """What a run may spend."""

    @property
    def needed(self) -> Amount | None:
        """What could not be reserved, if that was refused."""
        ...

    def report(self) -> dict[str, Json]:
        """Return, by limit, what is spent of which cap."""
        ...


def no_account() -> None:
    """Return no account."""


@dataclass(frozen=True)
class RunTools:
    """What the nodes of one open run may use.

    Attributes:
        store: Its items.
        item_journal: Its journal.
        aggregators: Its reduce stages.
        run_item: Takes an item through the item graph and returns the final state.
        gate: Bounds the items in flight, and stops them.
        progress: Counts for whoever watches.
        fingerprint: Digest of what is asked of every item: prompt, schema, model.
        question_digest: Digest of what all questions have in common: schema, model, sampling,
            system text.
        keep_raw: Whether the records keep the text of every answer, not of rejected ones only.
        simulated: Whether the fleet is simulated.
        token_prices: What tokens cost.
        open_account: Returns what one item may spend; None is no limit.
        budget: What the run may spend; None is no limit.
        coordinator: Those who work on shards elsewhere; None: they are worked on here.
        progress_stream: Tells whoever streams the graph how the run goes on.
    """

    store: ItemSequence
    item_journal: RunJournal
    aggregators: AggregatorSet
    run_item: Callable[[Item], Awaitable[ItemState]]
    gate: Gate
    progress: Progress
    fingerprint: bytes
    simulated: bool
    token_prices: TokenPrices = NO_PRICES
    question_digest: bytes = b""
    keep_raw: bool = False
    open_account: Callable[[], Account | None] = no_account
    budget: BudgetStatus | None = None
    coordinator: ShardCoordinator | None = None
    progress_stream: ProgressStream = field(default_factory=ProgressStream)

    def progress_json(self) -> dict[str, Any]:
        """Return the run's counts as its state, its streams and its ``--json`` tell them."""
        return self.progress.to_json(simulated=self.simulated, priced=self.is_priced)

    @property
    def is_priced(self) -> bool:
        """Say whether tokens have a price, or had one in an earlier life."""
        return self.token_prices.priced or self.progress.nano_usd > 0


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that is ready to start.

    Attributes:
        key: Which run it is.
        total: Number of items.
        shard_items: Items per shard.
        window: Shards per superstep.
        sizing: How shards that are worked on elsewhere are sized; None keeps ``shard_items``.
    """

    key: RunKey
    total: int
    shard_items: int
    window: int
    sizing: dict[str, Json] | None = None


@dataclass
class Context(ABC):
    """What the map-reduce may use."""

    @abstractmethod
    async def prepare(
        self,
        path: str | None,
        items: Sequence[Mapping[str, Any]] | None,
        preset: str | None = None,
    ) -> PreparedRun:
        """Make a run's folder from a path or items, or look up the one that the context names."""

    @abstractmethod
    def open_run(self, run: RunKey) -> AbstractAsyncContextManager[RunTools]:
        """Open a run; users in the same loop share what is open.

        Raises:
            ConfigurationError: Its folder is not found, or the context names another run's.
        """

    @abstractmethod
    async def budget_gap(self, run: RunKey, needed: Mapping[str, int]) -> dict[str, Json] | None:
        """Return what to ask of the user while the budget does not carry ``needed``, or None.

        Raises:
            BudgetExhaustedError: The settings say to stop rather than to ask.
        """

    @abstractmethod
    async def raise_limits(self, run: RunKey, answer: Any) -> str | None:
        """Take an answer as the run's new caps; return what is wrong with it, or None."""

    @abstractmethod
    async def finish_run(
        self, run: RunKey, aggregate: list[dict[str, Any]], progress: dict[str, Any]
    ) -> dict[str, Any]:
        """Write the results' files and return references to them."""
