"""All aggregators of a run together, and the reducer that combines their states."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from ...backends.core.errors import ConfigurationError, JournalError
from ...backends.core.types import Json, Outcome
from .agreement import Agreement
from .base import Aggregator, State, make_aggregator
from .grouped import Grouped
from .histogram import Histogram
from .listing import Collect, Count, TopK
from .stats import Stats

VERSION: Final = 1
"""Version of the form of the states."""

AGGREGATORS: Final[dict[str, type[Aggregator]]] = {
    "agreement": Agreement,
    "collect": Collect,
    "count": Count,
    "histogram": Histogram,
    "stats": Stats,
    "top_k": TopK,
}
"""The aggregators, by their name in ``reduce``."""


@dataclass(frozen=True, slots=True)
class AggregatorSet:
    """The aggregators of a run.

    Attributes:
        aggregators: Each aggregator, in the order of the configuration.
    """

    aggregators: tuple[Aggregator, ...]

    def empty(self) -> State:
        """Return the state of no outcomes."""
        return _state([one.empty() for one in self.aggregators])

    def lift(self, outcomes: Iterable[Outcome]) -> State:
        """Return the state of a batch of outcomes.

        Raises:
            ConfigurationError: A histogram has too many different values.
        """
        state = self.empty()
        self.add(state, outcomes)
        return state

    def add(self, state: State, outcomes: Iterable[Outcome]) -> None:
        """Add a batch of outcomes to a state; about 64 at a time cost least.

        Args:
            state: A state that nothing else uses; it is changed.
            outcomes: The outcomes.

        Raises:
            ConfigurationError: A histogram has too many different values.
        """
        batch = tuple(outcomes)
        for one, part in zip(self.aggregators, state["stages"], strict=True):
            one.add(part, batch)

    def present(self, state: State) -> list[dict[str, Json]]:
        """Return the readable result of each aggregator, in the order of the configuration.

        Args:
            state: A combined state; ``{}`` stands for no outcomes.

        Raises:
            ConfigurationError: The state comes from other aggregators.
            JournalError: The state was written by another version of fanfold.
        """
        whole = combine_states(self.empty(), state)
        return [
            one.present(part) for one, part in zip(self.aggregators, whole["stages"], strict=True)
        ]


def build_aggregators(specs: Sequence[Mapping[str, Json]]) -> AggregatorSet:
    """Make the aggregators of a run.

    Args:
        specs: The dicts under ``reduce``, e.g. ``{"op": "top_k", "field": "score", "k": 20}``. Any
            may have ``group_by``, ``max_groups``, and ``groups``: those to show in any case.

    Returns:
        The aggregators.

    Raises:
        ConfigurationError: An op is unknown, or its parameters are wrong.
    """
    for spec in specs:
        if spec.get("op") not in list(AGGREGATORS):
            raise ConfigurationError(
                f"reduce: unknown op {spec.get('op')!r}; the ops are {', '.join(AGGREGATORS)}"
            )
    return AggregatorSet(tuple(_build_aggregator(spec) for spec in specs))


_GROUPING: Final = ("group_by", "max_groups", "groups")


def _build_aggregator(spec: Mapping[str, Json]) -> Aggregator:
    plain = {name: value for name, value in spec.items() if name not in _GROUPING}
    one = make_aggregator(AGGREGATORS[spec["op"]], plain)
    if spec.get("group_by") is None:
        return one
    return Grouped(
        one, spec["group_by"], spec.get("max_groups", 100), tuple(spec.get("groups", ()))
    )


def combine_states(a: State, b: State) -> State:
    """Combine two states of the same aggregators: the reducer of the graph's state.

    Args:
        a: A state, or ``{}`` for no outcomes.
        b: Another.

    Returns:
        The state of the outcomes of both; neither argument is changed.

    Raises:
        ConfigurationError: The states come from different aggregators, or a histogram has too many
            different values.
        JournalError: A state was written by another version of fanfold.
    """
    for state in (a, b):
        if state and state.get("v") != VERSION:
            raise JournalError(
                f"the aggregate has form {state.get('v')!r}, and this version of fanfold reads "
                f"form {VERSION}: resume the run with the version that started it"
            )
    if not a or not b:
        return a or b
    if [part["of"] for part in a["stages"]] != [part["of"] for part in b["stages"]]:
        raise ConfigurationError(
            "reduce: states of different aggregators cannot be combined; after a change of "
            "'reduce', fold the finished items again"
        )
    pairs = zip(a["stages"], b["stages"], strict=True)
    return _state([_combine(left, right) for left, right in pairs])


def _combine(a: State, b: State) -> State:
    combine = AGGREGATORS[a["of"]["op"]].combine
    return Grouped.combine_with(combine, a, b) if "group_by" in a["of"] else combine(a, b)


def _state(parts: list[State]) -> State:
    return {"v": VERSION, "stages": parts}
