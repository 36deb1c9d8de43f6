"""Stage ``count``: how many items are done and failed, and why they failed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

from ...backends.core.types import Json, Outcome
from .base import Parameters, State, tally

CLASSES: Final = 100
"""Most error classes that are told apart."""


@dataclass(frozen=True, slots=True)
class Count(Parameters):
    """Counts of items, failed ones by error class.

    Beyond 100 classes the alphabetically first 100 are kept and the rest counted together. A
    class once dropped stays dropped, so the choice does not depend on the order.
    """

    op: ClassVar[str] = "count"

    def empty(self) -> State:
        """Return the state of no outcomes."""
        return _state(self.of(), 0, {}, 0)

    def lift(self, outcomes: Sequence[Outcome]) -> State:
        """Return the state of a batch of outcomes."""
        classes: dict[str, int] = {}
        for outcome in outcomes:
            if outcome.status == "failed":
                name = outcome.error_class or "unknown"
                classes[name] = classes.get(name, 0) + 1
        return _state(self.of(), len(outcomes) - sum(classes.values()), classes, 0)

    @staticmethod
    def combine(a: State, b: State) -> State:
        """Return the state of the outcomes of both."""
        classes = tally(a["classes"], b["classes"])
        return _state(a["of"], a["done"] + b["done"], classes, a["others"] + b["others"])

    def present(self, state: State) -> dict[str, Json]:
        """Return ``done``, ``failed``, and failures by class, the most frequent first."""
        classes: dict[str, int] = state["classes"]
        ranked = sorted(classes.items(), key=lambda pair: (-pair[1], pair[0]))
        if state["others"]:
            ranked.append(("other classes", state["others"]))
        failed = sum(count for _, count in ranked)
        return {
            "op": self.op,
            "done": state["done"],
            "failed": failed,
            "failed_by_class": dict(ranked),
        }


def _state(of: Json, done: int, classes: Mapping[str, int], others: int) -> State:
    names = sorted(classes)
    kept = {name: classes[name] for name in names[:CLASSES]}
    others += sum(classes[name] for name in names[CLASSES:])
    return {"of": of, "done": done, "classes": kept, "others": others}
