"""Reduce stages as commutative monoids: shards fold their part, the coordinator combines.

The presented aggregate depends on the set of outcomes alone, bit for bit, never on the order in
which items ended nor on how they were grouped.
"""

from .aggregate import AggregatorSet, build_aggregators, combine_states
from .base import Aggregator, State

__all__ = ["Aggregator", "AggregatorSet", "State", "build_aggregators", "combine_states"]
