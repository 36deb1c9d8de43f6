"""What a coordinator and its workers say to each other: JSON, with a version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from importlib.metadata import version
from typing import Any, Final, Self

from .errors import BackendError, ConfigurationError
from .types import Item, Json, Row
from .values import check_counts, check_record

WIRE_VERSION: Final = 2
"""Version of the two forms below."""

MAX_MESSAGE_BYTES: Final = 4_000_000
"""Most bytes of an order or a summary: engines carry 10 MB at most, some of them inflated."""


WALLTIME_REASON: Final = "walltime"
"""How the reason begins for which a worker or a run stops when its time is over."""

DUPLICATE_REASON: Final = "the order has been begun before"
"""Why a worker does nothing with an order that its engine delivers once more."""


@cache
def own_version() -> str:
    """Return the version of fanfold that is running; looking it up costs a quarter of a ms."""
    return version("fanfold")


@dataclass(frozen=True, slots=True)
class ShardTask:
    """What a worker is asked to do: one shard.

    Attributes:
        shard: The shard's name within the run.
        attempt: 0 for the first order of the shard.
        fanfold: Version of fanfold that the coordinator runs.
        run: The run's ``id``, ``model``, ``simulated`` and ``fingerprint``.
        settings: The run's plain settings, ``${VAR}`` unexpanded, without secrets.
        items: The items: index, id, row, problem.
        urls: Endpoints in place of those that the settings name, or None.
        journal: Folder in which the worker keeps the run's journal, or None to have the records
            sent home.
        streams: Most items in flight in this worker.
        deadline_s: Seconds after which the worker takes no more items.
        stop_file: While this file is there, the worker takes no more items; or None.
        ends_at: When the worker takes no more items, in seconds since 1970; or None.
        carry: Most bytes of the summary, as JSON.
        tariff: What tokens cost, as :class:`~.money.Tariff`'s fields.
        lease: What the order may spend: the lease's ``name``, its ``caps`` as fields of an
            :class:`~.money.Amount`, whether a book of it is ``booked`` in the run's folder, and
            ``until`` when it may be begun, in seconds since 1970; None is no limit.
    """

    shard: str
    attempt: int
    fanfold: str
    run: dict[str, Json]
    settings: dict[str, Json]
    items: list[tuple[int, str, Row, str | None]]
    urls: list[str] | None
    journal: str | None
    streams: int
    deadline_s: float
    stop_file: str | None = None
    ends_at: float | None = None
    carry: int = MAX_MESSAGE_BYTES
    tariff: dict[str, int] = field(default_factory=dict)
    lease: dict[str, Json] | None = None

    def to_json(self) -> dict[str, Json]:
        """Return it as plain data."""
        return _to_plain(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read it, lists in place of tuples allowed.

        Raises:
            ConfigurationError: Another version of the form.
            BackendError: No order at all.
        """
        return cls(**_check_fields(data, cls))

    def unpack_items(self) -> list[Item]:
        """Return the items."""
        return [Item(index, name, row, problem) for index, name, row, problem in self.items]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """What a worker brings home.

    Attributes:
        shard: The shard's name.
        attempt: The order's attempt.
        fanfold: Version of fanfold that the worker runs.
        worker: Host and process, e.g. ``node17:4242``.
        tally: How many items are ``done`` and ``failed``.
        stopped: Why items are left, or None when all ended.
        parts: The items' part of the aggregate.
        records: The items' journal records, or None when they are in the shared journal.
        error: Class and text of what kept the worker from its work, or from going on; or None.
        seconds: Wall time of the work.
        lease: The order's lease, or None.
        used: What was spent of it.
        short: Whether items are left because the lease is used up.
        endpoints: What each endpoint did since the worker's last summary.
    """

    shard: str
    attempt: int
    fanfold: str
    worker: str
    tally: dict[str, int] | None = None
    stopped: str | None = None
    parts: dict[str, Json] | None = None
    records: list[dict[str, Json]] | None = None
    error: dict[str, str] | None = None
    seconds: float = 0.0
    lease: str | None = None
    used: dict[str, int] | None = None
    short: bool = False
    endpoints: list[dict[str, Json]] | None = None

    def to_json(self) -> dict[str, Json]:
        """Return it as plain data."""
        return _to_plain(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Read it.

        Raises:
            ConfigurationError: Another version of the form.
            BackendError: No summary at all, or a number in it is out of range.
        """
        summary = cls(**_check_fields(data, cls))
        try:
            _check_numbers(summary)
        except (TypeError, ValueError, AttributeError) as error:
            msg = f"worker {summary.worker}: its summary of shard {summary.shard}: {error}"
            raise BackendError(msg) from None
        return summary


def _check_numbers(summary: ShardResult) -> None:
    """Check what is counted of a summary.

    Raises:
        ValueError: A number is out of range.
        TypeError: Something is no object or list.
        AttributeError: The same.
    """
    for name, numbers in (("tally", summary.tally), ("used", summary.used)):
        if numbers is not None:
            check_counts(numbers, numbers.keys(), name)
    for record in summary.records or ():
        check_record(record)


def _to_plain(form: ShardTask | ShardResult) -> dict[str, Json]:
    """Return the fields with the version; not a deep copy, which costs more than the items."""
    return {"v": WIRE_VERSION} | {one.name: getattr(form, one.name) for one in fields(form)}


def _check_fields(data: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        msg = f"expected {kind.__name__} as a JSON object, found {type(data).__name__}"
        raise BackendError(msg)
    if data.get("v") != WIRE_VERSION:
        msg = (
            f"a worker and its coordinator speak different versions (found {data.get('v')!r}, "
            f"expected {WIRE_VERSION}); install the same fanfold on both, here {own_version()}"
        )
        raise ConfigurationError(msg)
    names = {one.name for one in fields(kind)}
    found = {name: value for name, value in data.items() if name in names}
    needed = {
        one.name
        for one in fields(kind)
        if one.default is MISSING and one.default_factory is MISSING
    }
    if missing := needed - found.keys():
        raise BackendError(f"{kind.__name__}: lacks {', '.join(sorted(missing))}")
    return found
