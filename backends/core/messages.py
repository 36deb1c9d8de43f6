"""Messages between a coordinator and its workers: JSON with a version."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from functools import cache
from typing import Any, Final, Self

from .errors import BackendError, ConfigurationError
from .types import Item, Json, Row
from .values import check_counts, check_record, is_count

WIRE_VERSION: Final = 2
"""Version of the two message formats below."""

MAX_MESSAGE_BYTES: Final = 4_000_000
"""Bytes of a message that are aimed at, by `json_size`; a result may take twice as many."""


WALLTIME_REASON: Final = "walltime"
"""First word of the stop reason of a worker or a run that has reached its wall time."""

DUPLICATE_REASON: Final = "this shard task was already started"
"""Stop reason of a worker whose engine delivers a shard task a second time."""


@cache
def own_version() -> str:
    """Return the version of fanfold that is running; cached: the lookup takes a quarter of a ms."""
    from importlib.metadata import version  # noqa: PLC0415 - imports the package email

    return version("fanfold")


@dataclass(frozen=True, slots=True)
class ShardTask:
    """The task of a worker: run one shard.

    Attributes:
        shard: The shard's name within the run.
        attempt: 0 for the first attempt of the shard.
        fanfold: Version of fanfold that the coordinator runs.
        run: The run's ``id``, ``model``, ``simulated`` and ``fingerprint``; ``prefix``, the
            characters that are equal at the beginning of a group of its prompts, or None.
        settings: The run's plain settings, ``${VAR}`` unexpanded, without secrets.
        items: The items: index, id, row, problem.
        urls: Endpoints in place of those in the settings, or None.
        deployments: Chosen deployments of the gateway in the settings, or None.
        images: Images of the items by the items' ids, as plain data; None if the worker reads them.
        journal: Folder in which the worker writes the run's journal, or None to return the records
            in the shard result.
        streams: Limit of items in flight in this worker.
        deadline_s: Seconds after which the worker starts no more items.
        stop_file: While this file exists, the worker starts no more items; or None.
        ends_at: When the worker stops starting items, in seconds since 1970; or None.
        carry: Bytes of the records in a result after which no item starts; a result takes at most
            twice as many, by `json_size`.
        tariff: Prices of tokens, as :class:`~.money.TokenPrices`' fields.
        lease: What the shard task may spend: the lease's ``name``, its ``caps`` as fields of an
            :class:`~.money.Amount`, whether it has a spend log in the run's folder (``booked``),
            and ``until`` when the task must have started, in seconds since 1970; None is no limit.
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
    deployments: list[dict[str, Json]] | None = None
    images: dict[str, list[dict[str, Json]]] | None = None

    def to_json(self) -> dict[str, Json]:
        """Return the task as plain data."""
        return _to_plain(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Parse plain data, with lists allowed in place of tuples.

        Raises:
            ConfigurationError: The version of the format differs.
            BackendError: The data is not a shard task.
        """
        return cls(**_check_fields(data, cls))

    def unpack_items(self, samples: int = 1) -> list[Item]:
        """Return the items.

        Args:
            samples: Items of each row, whose indices follow each other.
        """
        return [
            Item(index, name, row, problem, index % samples)
            for index, name, row, problem in self.items
        ]


@dataclass(frozen=True, slots=True)
class ShardResult:
    """The result of a shard task.

    Attributes:
        shard: The shard's name.
        attempt: The shard task's attempt.
        fanfold: Version of fanfold that the worker runs.
        worker: Host and process, e.g. ``node17:4242``.
        tally: How many items are ``done`` and ``failed``.
        stopped: Why items are left, or None if all ended.
        parts: The items' part of the aggregate.
        records: The items' journal records, or None if they are in the shared journal.
        error: Class and text of the error that prevented or stopped the work; or None.
        seconds: Wall time of the work.
        lease: The shard task's lease, or None.
        used: Amount of the lease that was spent.
        short: Whether items are left because the lease is used up.
        dropped: Items whose records were left out because the result would be too large.
        endpoints: Statistics of each endpoint since the worker's last result.
        timeline: What its endpoints did since its last report, as a
            :class:`~.timeline.TimelineDelta`; None if nothing.
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
    dropped: int = 0
    endpoints: list[dict[str, Json]] | None = None
    timeline: dict[str, Json] | None = None

    def to_json(self) -> dict[str, Json]:
        """Return the result as plain data."""
        return _to_plain(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Self:
        """Parse plain data.

        Raises:
            ConfigurationError: The version of the format differs.
            BackendError: The data is not a shard result, or a number in it is out of range.
        """
        result = cls(**_check_fields(data, cls))
        try:
            _check_numbers(result)
        except (TypeError, ValueError, AttributeError) as error:
            msg = f"worker {result.worker}: invalid result of shard {result.shard}: {error}"
            raise BackendError(msg) from None
        return result


def _check_numbers(result: ShardResult) -> None:
    """Check the counts in a shard result.

    Raises:
        ValueError: A number is out of range.
        TypeError: A value is not an object or a list.
        AttributeError: The same.
    """
    for name, numbers in (("tally", result.tally), ("used", result.used)):
        if numbers is not None:
            check_counts(numbers, numbers.keys(), name)
    for record in result.records or ():
        check_record(record)
    if not is_count(result.dropped):
        msg = f"dropped is {result.dropped!r}, not a count"
        raise ValueError(msg)


def _to_plain(message: ShardTask | ShardResult) -> dict[str, Json]:
    """Return the fields with the version; shallow: a deep copy costs more than the items."""
    return {"v": WIRE_VERSION} | {one.name: getattr(message, one.name) for one in fields(message)}


def _check_fields(data: Mapping[str, Any], kind: type[Any]) -> dict[str, Any]:
    if not isinstance(data, Mapping):
        msg = f"expected {kind.__name__} as a JSON object, found {type(data).__name__}"
        raise BackendError(msg)
    if data.get("v") != WIRE_VERSION:
        msg = (
            f"a worker and its coordinator use different versions of messages (found "
            f"{data.get('v')!r}, expected {WIRE_VERSION}); install the same fanfold on both, "
            f"here {own_version()}"
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
        raise BackendError(f"{kind.__name__}: missing fields: {', '.join(sorted(missing))}")
    return found
