"""Operators: deterministic coroutines that reduce the items of a stage by asking the model.

``base.py`` has the interface, ``registry.py`` lists the operators.
"""

from .base import (
    Answer,
    Ask,
    FailedItem,
    LevelPlan,
    LevelTask,
    Operator,
    OperatorEnd,
    Question,
    SizeEstimate,
    StageResult,
    StageTools,
)
from .cascade import Cascade
from .registry import OPERATORS, make_operator

__all__ = [
    "OPERATORS",
    "Answer",
    "Ask",
    "Cascade",
    "FailedItem",
    "LevelPlan",
    "LevelTask",
    "Operator",
    "OperatorEnd",
    "Question",
    "SizeEstimate",
    "StageResult",
    "StageTools",
    "make_operator",
]
