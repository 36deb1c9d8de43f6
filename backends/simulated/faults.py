"""Which fault strikes which request."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from .dice import chance
from .rules import IN_STREAM, FaultRule

_MINUTE: Final = 60.0
_KEEP_ALIVE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Call:
    """What the draw of a fault may depend on.

    Attributes:
        node: The node's number.
        arrival: Number of the request on this node.
        key: The question's key.
        attempt: How often the question was asked before, of any node.
        now: Simulated seconds since the start.
        stream: Whether the answer is to be streamed.
        first_round: Whether the conversation holds no assistant's message.
        token: The ``Authorization`` header, or None.
    """

    node: int
    arrival: int
    key: bytes
    attempt: int
    now: float
    stream: bool = False
    first_round: bool = True
    token: str | None = None


@dataclass(frozen=True, slots=True)
class Strike:
    """What befalls one request.

    Attributes:
        rule: The fault, or None.
        speed: Factor on the speed.
    """

    rule: FaultRule | None = None
    speed: float = 1.0


@dataclass(slots=True)
class _Active:
    """A rule with what it remembers."""

    rule: FaultRule
    number: int
    nodes: frozenset[int]
    count: int = 0
    cold_since: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, float] = field(default_factory=dict)
    old: set[str | None] = field(default_factory=set)

    def spent(self) -> bool:
        limit = self.rule.max_count
        return limit is not None and self.count >= limit

    def value(self, default: float = 0.0) -> float:
        return default if self.rule.value is None else self.rule.value


class FaultBook:
    """The fleet's fault rules.

    Args:
        seed: Seeds all draws: the same order of requests meets the same faults.
        nodes: How many nodes the fleet has.
        rules: The rules to start with.
    """

    def __init__(self, seed: int, nodes: int, rules: tuple[FaultRule, ...] = ()) -> None:
        self._seed = seed
        self._nodes = nodes
        self._numbered = 0
        self._active: list[_Active] = []
        self._by_state: dict[str, Callable[[_Active, Call], bool]] = {
            "cold": _cold,
            "tpm": _over_tokens,
            "401_after": _old_token,
        }
        for rule in rules:
            self.add(rule)

    def add(self, rule: FaultRule) -> frozenset[int]:
        """Add a rule.

        Args:
            rule: The rule.

        Returns:
            The numbers of the nodes concerned.
        """
        active = _Active(rule, self._numbered, self._concerned(rule))
        self._numbered += 1
        self._active.append(active)
        return active.nodes

    def clear(self) -> None:
        """Forget all rules."""
        self._active.clear()

    def strike(self, call: Call) -> Strike:
        """Decide what befalls a request.

        Args:
            call: The request.

        Returns:
            The first rule that strikes, and the product of all ``slow`` factors that do.
        """
        struck, speed = None, 1.0
        for active in self._active:
            kind = active.rule.kind
            if (struck is not None and kind != "slow") or not self._strikes(active, call):
                continue
            active.count += 1
            if kind == "slow":
                speed *= active.value(1.0)
            else:
                struck = active.rule
        return Strike(struck, speed)

    def record_tokens(self, node: int, tokens: int, now: float) -> None:
        """Count tokens against the token windows.

        Args:
            node: The node that answered.
            tokens: Prompt and output tokens.
            now: Simulated seconds since the start.
        """
        for active in self._active:
            if active.rule.kind == "tpm" and node in active.nodes:
                window = int(now // _MINUTE)
                active.tokens = {window: active.tokens.get(window, 0.0) + tokens}

    def max_model_len(self, node: int, now: float, usual: int) -> int:
        """Return a node's context length.

        Args:
            node: The node's number.
            now: Simulated seconds since the start.
            usual: The fleet's context length in tokens.

        Returns:
            The smaller of the usual one and what ``context`` rules say.
        """
        return min([usual, *(int(active.value()) for active in self._of(node, now, "context"))])

    def idle_s(self, node: int, now: float) -> float | None:
        """Return after how many idle seconds a node closes a connection, or None for never."""
        limits = [active.value(_KEEP_ALIVE_S) for active in self._of(node, now, "keepalive_race")]
        return min(limits, default=None)

    def is_cold(self, node: int, now: float) -> bool:
        """Tell whether a node is not ready: never asked, or still warming up."""
        return any(
            now < active.cold_since.get(node, now) + active.value()
            for active in self._of(node, now, "cold")
        )

    def _of(self, node: int, now: float, kind: str) -> list[_Active]:
        return [
            active
            for active in self._active
            if active.rule.kind == kind and node in active.nodes and active.rule.active(now)
        ]

    def _concerned(self, rule: FaultRule) -> frozenset[int]:
        if rule.nodes is None:
            return frozenset(range(self._nodes))
        if isinstance(rule.nodes, tuple):
            return frozenset(rule.nodes)
        count = -int(-rule.nodes * self._nodes // 1)
        ranked = sorted(
            range(self._nodes), key=lambda node: chance(self._seed, self._numbered, "node", node)
        )
        return frozenset(ranked[:count])

    def _strikes(self, active: _Active, call: Call) -> bool:
        rule = active.rule
        if call.node not in active.nodes or not rule.active(call.now) or active.spent():
            return False
        if rule.first_round and not call.first_round:
            return False
        if (rule.kind in IN_STREAM and not call.stream) or rule.kind in _PROPERTIES:
            return False
        if rule.kind in self._by_state:
            return self._by_state[rule.kind](active, call)
        return rule.p >= 1 or self._drawn(active, call) < rule.p

    def _drawn(self, active: _Active, call: Call) -> float:
        match active.rule.draw:
            case "arrival":
                return chance(self._seed, active.number, call.node, call.arrival)
            case "item":
                return chance(self._seed, active.number, call.key)
            case _:
                return chance(self._seed, active.number, call.key, call.attempt)


_PROPERTIES: Final = frozenset(["die_at", "revive_at", "context", "keepalive_race"])


def _cold(active: _Active, call: Call) -> bool:
    since = active.cold_since.setdefault(call.node, call.now)
    return call.now < since + active.value()


def _over_tokens(active: _Active, call: Call) -> bool:
    return active.tokens.get(int(call.now // _MINUTE), 0.0) >= active.value()


def _old_token(active: _Active, call: Call) -> bool:
    if call.now < active.value():
        active.old.add(call.token)
        return False
    return call.token in active.old
