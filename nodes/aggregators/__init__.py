"""Reduce stages as commutative monoids: shards fold their part, the coordinator combines.

The presented aggregate depends on the set of outcomes alone, bit for bit, never on the order in
which items ended nor on how they were grouped.
"""

from .aggregate import Aggregate, build, combine
from .base import Aggregator, State

__all__ = ["Aggregate", "Aggregator", "State", "build", "combine"]
