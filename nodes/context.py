"""What nodes may use; the context of the graphs implements it, and nodes do not see how."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from contextvars import Context as Variables
from contextvars import copy_context
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

from ..backends.core.images import ItemImage
from ..backends.core.messages import ShardResult, ShardTask
from ..backends.core.money import NO_PRICES, Amount, TokenPrices
from ..backends.core.protocols import Account, CallLog, ChatModel, CompletionClient
from ..backends.core.samples import SampleFold
from ..backends.core.templates import ItemPrompt
from ..backends.core.types import Item, Json, Row, RunKey, Shard
from .aggregators import AggregatorSet
from .item.answer import AnswerCheck
from .item.item_state import ItemState
from .item.part import PartSplit
from .shard.gate import Gate
from .shard.progress import Progress, ProgressStream

Delegate: TypeAlias = Callable[[dict[str, Any]], Awaitable[Any]]


class ImageSource(Protocol):
    """Reads the images of items."""

    async def read(self, item_id: str, row: Row) -> list[ItemImage]:
        """Return the images of an item.

        Raises:
            InvalidItemError: One cannot be sent.
            ConfigurationError: No item's can be read.
        """
        ...


@dataclass(frozen=True)
class ItemContext:
    """What the item graph may use.

    Attributes:
        prompt: The templates of an item's messages.
        model: The client of the model.
        answer_check: The check of answers.
        repairs: How often an invalid answer is sent back.
        delegate: A user's item graph, called with the columns and the messages.
        images: Reads the images that are sent after the prompt; None if there are none.
        certainty: Keys down to the field whose certainty is recorded; None records none.
        split: How parts that are too long are asked in pieces; None: they fail.
        asks_pieces_together: Whether the pieces of a part are asked at the same time: a request may
            take hours, as in a batch.
        completions: The client that sends an item's own request in place of the prompt, if items
            are requests.
    """

    prompt: ItemPrompt
    model: ChatModel
    answer_check: AnswerCheck
    repairs: int = 1
    delegate: Delegate | None = None
    completions: CompletionClient | None = None
    images: ImageSource | None = None
    certainty: tuple[str, ...] | None = None
    split: PartSplit | None = None
    asks_pieces_together: bool = False


class ItemRuntime(Protocol):
    """What a step of an item is called with; LangGraph's ``Runtime`` fits."""

    @property
    def context(self) -> ItemContext:
        """Return what the step may use."""
        ...


class ItemSequence(Protocol):
    """The items of a run."""

    def __len__(self) -> int:
        """Return the number of items."""
        ...

    def read(self, lo: int, hi: int) -> list[Item]:
        """Return the items ``lo`` to ``hi`` (exclusive)."""
        ...


class WorkOrder(ItemSequence, Protocol):
    """The items of a run in the order of work; shards are ranges of positions in it."""

    def indices(self, lo: int, hi: int) -> list[int]:
        """Return the indices of the items at the positions ``lo`` to ``hi`` (exclusive)."""
        ...

    def position(self, index: int) -> int:
        """Return the position of an item."""
        ...


class ItemJournal(Protocol):
    """The journal of finished items."""

    @property
    def duplicates(self) -> int:
        """Return the number of records of items that have another record, which may count."""
        ...

    def is_finished(self, index: int) -> bool:
        """Return True if an item has ended."""
        ...

    def find_open(self, lo: int, hi: int) -> int:
        """Return the first item of a range that has not ended; ``hi`` if all have."""
        ...

    def read_answers(self, lo: int, hi: int) -> list[dict[str, Any] | None]:
        """Return how each item of a range ended; None for those that have not.

        These are records with ``status``, ``output`` and ``error_class`` at least.
        """
        ...

    def put(self, record: dict[str, Json]) -> None:
        """Record how an item ended.

        Raises:
            TypeError: A value of the record cannot be written as JSON; nothing was written.
        """
        ...

    async def flush(self) -> None:
        """Wait until everything recorded so far is on disk."""
        ...


AnsweredTask: TypeAlias = tuple[ShardTask | None, ShardResult]
"""A worker's result with its task; None if an earlier session sent the task."""


class ShardCoordinator(Protocol):
    """The workers of a run, as nodes see them."""

    @property
    def in_flight(self) -> int:
        """Return how many shards workers have."""
        ...

    @property
    def nodes(self) -> tuple[int, int]:
        """Return the number of nodes in use, and how many of them are working."""
        ...

    def run_shard(
        self, shard: Shard, remaining: Callable[[], Awaitable[list[Item]]]
    ) -> AsyncGenerator[AnsweredTask, None]:
        """Have workers run the remaining items of a shard, with as many tasks as that takes.

        Args:
            shard: The shard.
            remaining: Returns the items that have not ended yet; called for each task.

        Yields:
            Each answer, its records in the journal; none once the run is being stopped.

        Raises:
            RunStoppedError: The shard was lost too often, or a worker reports that the run must
                stop.
            ConfigurationError: No retry can help.
        """
        ...

    async def refresh(self, worker: str | None = None) -> None:
        """Read the records that all workers, or one of them, added since the last call."""
        ...

    def stop(self) -> None:
        """Let no worker begin a further item; returns before they have stopped."""
        ...

    async def finish_reading(self) -> None:
        """Read the journal a last time: later records of workers do not count."""
        ...


class BudgetStatus(Protocol):
    """The budget of a run, as nodes see it."""

    @property
    def needed(self) -> Amount | None:
        """Return the amount that could not be reserved, or None."""
        ...

    def report(self) -> dict[str, Json]:
        """Return, by limit, the amount spent and the cap."""
        ...


def no_account() -> None:
    """Return no account."""


@dataclass(frozen=True)
class RunTools:
    """What the nodes of one open run may use.

    Attributes:
        store: Its items.
        item_journal: Its journal.
        aggregators: Its aggregators.
        run_item: Runs an item through the item graph and returns the final state.
        gate: Limits the items in flight, and stops them.
        progress: Its counts.
        fingerprint: Digest of what all items share: prompt, schema, model.
        question_digest: Digest of what all questions share: schema, model, sampling, system text,
            examples.
        constant_messages: Number of messages at the beginning of every item that it covers.
        fold: How the answers of samples are folded; None if each row is asked once.
        keep_raw: Whether records keep the text of every answer, not only of rejected ones.
        simulated: Whether the fleet is simulated.
        token_prices: Prices of tokens.
        open_account: Opens the account of one item; None means no limit.
        budget: The budget of the run; None means no limit.
        open_calls: Calls of the items that have no record yet, by the log's identity; those of
            items that were cut off stay.
        coordinator: The workers that run shards; None if this process runs them.
        progress_stream: Streams the counts to clients of the graph.
        stage: Name of the stage that the run belongs to; empty for a run of its own.
        order: The items in the order of work; None: that of the store.
        make_item_variables: Returns the context variables of items' tasks.
        folding: Lets one shard at a time fold in items that have ended; threads that do so
            together only wait for each other.
    """

    store: ItemSequence
    item_journal: ItemJournal
    aggregators: AggregatorSet
    run_item: Callable[[Item], Awaitable[ItemState]]
    gate: Gate
    progress: Progress
    fingerprint: bytes
    simulated: bool
    token_prices: TokenPrices = NO_PRICES
    question_digest: bytes = b""
    constant_messages: int = 0
    fold: SampleFold | None = None
    keep_raw: bool = False
    open_account: Callable[[], Account | None] = no_account
    budget: BudgetStatus | None = None
    open_calls: dict[int, CallLog] = field(default_factory=dict)
    coordinator: ShardCoordinator | None = None
    progress_stream: ProgressStream = field(default_factory=ProgressStream)
    stage: str = ""
    make_item_variables: Callable[[], Variables] = copy_context
    folding: asyncio.Lock = field(default_factory=asyncio.Lock)
    order: WorkOrder | None = None

    def position(self, index: int) -> int:
        """Return the position of an item in the order of work."""
        return index if self.order is None else self.order.position(index)

    def indices(self, lo: int, hi: int) -> Sequence[int]:
        """Return the indices of the items at the positions ``lo`` to ``hi`` (exclusive)."""
        return range(lo, hi) if self.order is None else self.order.indices(lo, hi)

    def read(self, lo: int, hi: int) -> list[Item]:
        """Return the items at the positions ``lo`` to ``hi`` (exclusive)."""
        return (self.order or self.store).read(lo, hi)

    def progress_json(self) -> dict[str, Any]:
        """Return the counts as the state, the streams and ``--json`` contain them."""
        counts = self.progress.to_json(simulated=self.simulated, priced=self.is_priced)
        return counts | ({"stage": self.stage} if self.stage else {})

    @property
    def is_priced(self) -> bool:
        """Return True if tokens have a price, or had one in an earlier session."""
        return self.token_prices.priced or self.progress.usage.nano_usd > 0


@dataclass(frozen=True, slots=True)
class PreparedRun:
    """A run that is ready to start.

    Attributes:
        key: The run's key.
        total: Number of items.
        shard_items: Items per shard.
        window: Shards per superstep.
        sizing: How remote shards are sized; None keeps ``shard_items``.
        stages: Names of the stages if it is a pipeline, which has no shards of its own.
    """

    key: RunKey
    total: int
    shard_items: int
    window: int
    sizing: dict[str, Json] | None = None
    stages: tuple[str, ...] = ()


@dataclass
class Context(ABC):
    """What the map-reduce graph may use."""

    @abstractmethod
    async def prepare(
        self,
        path: str | None,
        items: Sequence[Mapping[str, Any]] | None,
        preset: str | None = None,
    ) -> PreparedRun:
        """Create a run folder from a path or items, or open the one that the context names."""

    @abstractmethod
    def open_run(self, run: RunKey) -> AbstractAsyncContextManager[RunTools]:
        """Open a run; users in the same event loop share the open run.

        Raises:
            ConfigurationError: Its folder is not found, or the context names another run's.
        """

    @abstractmethod
    async def budget_gap(self, run: RunKey, needed: Mapping[str, int]) -> dict[str, Json] | None:
        """Return the question to the user if the budget does not cover ``needed``, else None.

        Raises:
            BudgetExhaustedError: The settings require a stop instead of a question.
        """

    @abstractmethod
    async def raise_limits(self, run: RunKey, answer: Any) -> str | None:
        """Set the run's caps to an answer; return what is wrong with it, or None."""

    @abstractmethod
    async def finish_run(
        self, run: RunKey, aggregate: list[dict[str, Any]], progress: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """Run the final reducers and write the result files.

        Args:
            run: The run's key.
            aggregate: The results of the aggregators.
            progress: The counts of the run.

        Returns:
            The results of all entries of ``reduce``, and references to the files.
        """
