"""Aggregators as commutative monoids: shards fold their part, the coordinator combines the parts.

The presented aggregate depends on the set of outcomes only, bit for bit. It does not depend on the
order in which items ended or on how they were grouped. ``registry.py`` lists the aggregators.
"""

from .base import Aggregator, State
from .registry import AggregatorSet, build_aggregators, combine_states

__all__ = ["Aggregator", "AggregatorSet", "State", "build_aggregators", "combine_states"]
