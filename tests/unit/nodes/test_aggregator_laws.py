"""The monoid laws; order, grouping and transport do not change a result."""

from __future__ import annotations

import copy
import itertools
import json
from functools import reduce
from typing import Any

import orjson
import ormsgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError, JournalError
from fanfold.backends.core.types import FieldVote, FoldedAnswer, Outcome
from fanfold.nodes.aggregators import AggregatorSet, State, build_aggregators, combine_states

SPECS: list[dict[str, Any]] = [
    {"op": "count"},
    {"op": "stats", "field": "score"},
    {"op": "stats", "field": "deep.score", "quantiles": [0, 0.5, 1]},
    {"op": "histogram", "field": "label"},
    {"op": "histogram", "field": "score", "bins": 4, "low": -1, "high": 1},
    {"op": "histogram", "field": "score", "bins": [0, 1, 10.5]},
    {"op": "top_k", "field": "score", "k": 3, "show": ["note"]},
    {"op": "top_k", "field": "deep.score", "k": 2, "order": "smallest"},
    {"op": "collect", "limit": 3},
    {"op": "collect", "limit": 2, "field": "label"},
    {"op": "agreement"},
    {"op": "stats", "field": "parts[].score"},
    {"op": "histogram", "field": "parts[].label", "categories": ["yes", "no", True]},
    {"op": "histogram", "field": "parts[].score", "bins": [0, 1, 2]},
    {"op": "top_k", "field": "parts[].score", "k": 3},
    {"op": "collect", "limit": 2, "field": "parts[].label"},
    {"op": "count", "group_by": "input.note", "max_groups": 2},
    {"op": "stats", "field": "score", "group_by": "label", "max_groups": 3, "groups": ["yes", 1]},
    {"op": "histogram", "field": "label", "group_by": "score", "max_groups": 2},
    {"op": "top_k", "field": "score", "k": 1, "group_by": "label", "max_groups": 2},
    {"op": "collect", "limit": 1, "group_by": "deep.score", "max_groups": 1},
    {"op": "stats", "field": "parts[].score", "group_by": "parts[].label", "max_groups": 2},
    {"op": "top_k", "field": "parts[].score", "k": 2, "group_by": "parts[].label"},
    {"op": "count", "group_by": "parts[].score", "max_groups": 2},
]
ALL = build_aggregators(SPECS)

numbers = st.one_of(
    st.floats(),
    st.floats(-2, 2),
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([0.0, -0.0, 10**400, -(2**63), 2**63, 2**53 + 1]),
)
labels = st.one_of(
    st.sampled_from(["yes", "no", "1", "true", True, False, 1, 0, 1.0, 0.5]),
    st.none(),
    st.integers(),
    st.text(st.characters(exclude_categories=()), max_size=3),
    st.lists(st.integers(), max_size=2),
)
outputs = st.one_of(
    st.none(),
    st.text(max_size=3),
    st.fixed_dictionaries(
        {},
        optional={
            "score": st.one_of(numbers, labels),
            "label": st.one_of(labels, numbers),
            "deep": st.one_of(st.none(), st.fixed_dictionaries({"score": numbers})),
            "parts": st.one_of(
                st.none(),
                st.lists(
                    st.one_of(
                        st.none(),
                        st.fixed_dictionaries({}, optional={"score": numbers, "label": labels}),
                    ),
                    max_size=3,
                ),
            ),
        },
    ),
)


folded_answers = st.lists(
    st.tuples(st.sampled_from(["label", "deep.x", "\ud800"]), st.integers(1, 3), st.booleans()),
    max_size=3,
    unique_by=lambda vote: vote[0],
).map(
    lambda votes: FoldedAnswer(
        3,
        3 if votes else 0,
        None,
        None,
        None,
        tuple(FieldVote(name, most, 3, is_tie=tie) for name, most, tie in votes),
    )
)


@st.composite
def outcome_lists(draw: st.DrawFn) -> list[Outcome]:
    made = []
    for index in range(draw(st.integers(0, 12))):
        error = draw(st.sampled_from([None, None, None, "EmptyAnswerError", "BackendError"]))
        made.append(
            Outcome(
                index=index,
                id=f"item {index}",
                status="failed" if error else "done",
                output=None if error else draw(outputs),
                error_class=error,
                row={"note": draw(st.text(max_size=2))},
                folded=draw(st.one_of(st.none(), folded_answers)),
            )
        )
    return made


def through_json(state: State) -> State:
    read = orjson.loads(orjson.dumps(state))
    assert isinstance(read, dict)
    assert json.loads(json.dumps(state, allow_nan=False)) == read
    return read


def through_msgpack(state: State) -> State:
    read = ormsgpack.unpackb(ormsgpack.packb(state))
    assert isinstance(read, dict)
    return read


def shown(state: State, aggregate: AggregatorSet = ALL) -> str:
    presented = aggregate.present(state)
    orjson.dumps(presented)
    return json.dumps(presented, allow_nan=False)


def in_shards(items: list[Outcome], cuts: list[int]) -> list[State]:
    edges = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    return [ALL.lift(items[lo:hi]) for lo, hi in itertools.pairwise(edges)]


@settings(deadline=None)
@given(outcome_lists(), st.data())
def test_order_and_grouping_do_not_show(items: list[Outcome], data: st.DataObject) -> None:
    whole = shown(ALL.lift(items))
    states = in_shards(data.draw(st.permutations(items)), data.draw(st.lists(st.integers(0, 99))))
    while len(states) > 1:
        left = states.pop(data.draw(st.integers(0, len(states) - 1)))
        right = states.pop(data.draw(st.integers(0, len(states) - 1)))
        states.append(combine_states(left, right))
    assert shown(states[0]) == whole


@settings(deadline=None)
@given(outcome_lists(), st.integers(0, 12), st.integers(0, 12))
def test_monoid_laws(items: list[Outcome], i: int, j: int) -> None:
    a, b, c = ALL.lift(items[: min(i, j)]), ALL.lift(items[min(i, j) : j]), ALL.lift(items[j:])
    assert shown(combine_states(a, combine_states(b, c))) == shown(
        combine_states(combine_states(a, b), c)
    )
    assert shown(combine_states(a, b)) == shown(combine_states(b, a))
    for identity in ({}, ALL.empty()):
        assert shown(combine_states(a, identity)) == shown(combine_states(identity, a)) == shown(a)
    assert combine_states({}, {}) == {}
    assert shown({}) == shown(ALL.empty())


@settings(deadline=None)
@given(outcome_lists(), st.lists(st.integers(0, 99), max_size=4))
def test_adding_to_a_state_is_combining_with_it(items: list[Outcome], cuts: list[int]) -> None:
    edges = [0, *sorted(cut % (len(items) + 1) for cut in cuts), len(items)]
    added = ALL.empty()
    for lo, hi in itertools.pairwise(edges):
        ALL.add(added, items[lo:hi])
    assert shown(combine_states(added, ALL.empty())) == shown(
        reduce(combine_states, in_shards(items, cuts))
    )
    through_msgpack(through_json(added))


def test_groups_beyond_twice_the_limit_are_dropped_while_a_state_grows() -> None:
    # 100,000 rows of 10,000 each: 10 groups
    spec = {"op": "collect", "limit": 10_000, "group_by": "label", "max_groups": 3}
    stage = build_aggregators([spec])
    state = stage.empty()
    for n in reversed(range(1_000)):
        stage.add(state, [Outcome(n, f"{n}", "done", {"label": n % 500 or 7})])
        assert len(state["stages"][0]["groups"]) <= 21
    (found,) = stage.present(state)
    assert [(one["group"], one["size"]) for one in found["groups"]] == [(1, 2), (2, 2), (7, 4)]
    assert (found["others"], found["other_groups"]) == (992, None)


@settings(deadline=None)
@given(outcome_lists(), st.lists(st.integers(0, 99), max_size=4))
def test_states_survive_checkpoints_and_processes(items: list[Outcome], cuts: list[int]) -> None:
    states = in_shards(items, cuts)
    travelled = [through_msgpack(through_json(state)) for state in states]
    resumed: State = {}
    for state in travelled:
        resumed = through_json(through_msgpack(combine_states(resumed, state)))
    assert shown(resumed) == shown(reduce(combine_states, states))


@settings(deadline=None)
@given(outcome_lists(), st.lists(st.integers(0, 99), max_size=4))
def test_combine_leaves_its_arguments_alone(items: list[Outcome], cuts: list[int]) -> None:
    states = in_shards(items, cuts)
    before = copy.deepcopy(states)
    reduce(combine_states, states)
    assert repr(states) == repr(before)


def test_large_integers_in_states_are_text() -> None:
    state = ALL.lift([Outcome(0, "a", "done", {"score": 1e300, "label": 2**200})])

    def walk(value: object) -> None:
        if isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, int):
            assert abs(value) < 2**63
        else:
            assert value is None or isinstance(value, str | float)

    walk(state)


def test_the_size_does_not_grow_with_the_items() -> None:
    def size(start: int, stop: int) -> int:
        batches = (
            ALL.lift(
                [
                    Outcome(i, f"{i:06}", "done", {"score": i % 97 / 7, "label": i % 5})
                    for i in range(at, at + 50)
                ]
            )
            for at in range(start, stop, 50)
        )
        return len(orjson.dumps(reduce(combine_states, batches)))

    assert size(100_000, 102_000) < size(100_000, 101_000) * 1.1


def test_states_of_other_aggregators_do_not_combine() -> None:
    other = build_aggregators([{"op": "top_k", "field": "score", "k": 4}])
    mine = build_aggregators([{"op": "top_k", "field": "score", "k": 5}])
    with pytest.raises(ConfigurationError, match="fold the finished items again"):
        combine_states(other.empty(), mine.empty())
    with pytest.raises(ConfigurationError, match="different aggregators"):
        mine.present(other.empty())
    with pytest.raises(ConfigurationError, match="different aggregators"):
        mine.present(build_aggregators([]).empty())


def test_states_of_another_version_are_refused() -> None:
    with pytest.raises(JournalError, match="form 2"):
        combine_states({}, ALL.empty() | {"v": 2})


def test_no_aggregators() -> None:
    none = build_aggregators([])
    assert none.present(combine_states(none.lift([Outcome(0, "a", "done", 1)]), {})) == []
