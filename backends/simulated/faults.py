"""Fault rules, and when they apply."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final, Literal, TypeAlias

from ..core.errors import ConfigurationError
from .values import draw_uniform

Draw: TypeAlias = Literal["arrival", "item", "attempt"]

AT_ARRIVAL: Final = frozenset(
    {
        *("429", "429_ra", "500", "500_text", "502_html", "503", "503_busy", "504"),
        *("hang", "drop", "reset"),
    }
)
"""Faults that answer (or refuse) at once, without a slot."""

IN_ANSWER: Final = frozenset(
    {
        *("malformed", "cut_body", "html200", "error200", "null_choices", "empty_choices"),
        *("no_usage", "empty_content", "content_filter", "refusal", "bad_schema"),
    }
)
"""Faults with HTTP 200 after the usual time and a faulty body."""

IN_STREAM: Final = frozenset(["stream_cut", "stream_error", "stream_no_finish", "stream_api_error"])
"""Faults of streamed answers only."""

BY_STATE: Final = frozenset(["tpm", "cold", "401_after"])
"""Refusals that depend on earlier requests, not on a random draw."""

OF_NODE: Final = frozenset(["slow", "die_at", "revive_at", "context", "keepalive_race"])
"""Properties of nodes, not refusals."""

KINDS: Final = AT_ARRIVAL | IN_ANSWER | IN_STREAM | BY_STATE | OF_NODE

_NEEDS_VALUE: Final = frozenset(["die_at", "revive_at", "context", "401_after", "cold", "tpm"])


@dataclass(frozen=True, slots=True)
class FaultRule:
    """One kind of failure, and when it applies.

    All times are simulated seconds since the fleet started (real ones times ``time_scale``),
    except ``Retry-After``, which clients obey in real time.

    Attributes:
        kind: One of `KINDS`.
        nodes: The affected nodes: their numbers, a fraction of them, or None for all.
        p: Probability that the fault applies to a request.
        window: From (inclusive) and to (exclusive), or None for always.
        max_count: Maximum number of applications, or None.
        draw: Seed of the random draw. ``arrival``: node and arrival number; ``item``: the
            conversation, so that the same item fails on every node (poison); ``attempt``: the
            conversation and the number of earlier requests for it.
        value: The kind's number: ``429_ra`` seconds to wait, ``cold`` seconds until ready,
            ``tpm`` tokens per 60 s, ``slow`` speed factor, ``die_at``/``revive_at``/
            ``401_after`` the time, ``context`` the model length in tokens,
            ``keepalive_race`` idle seconds (default 5).
        shape: Form of the error body of a ``429``: ``vllm`` or ``first`` (the FIRST gateway's).
        http_date: Whether ``429_ra`` sends an HTTP date instead of seconds.
        graceful: Whether ``die_at`` answers requests in flight with ``finish_reason: abort``.
        first_round: Whether to spare conversations with an assistant message, so that a repair
            round always succeeds.

    Raises:
        ConfigurationError: The kind is unknown, or a number is out of range.
    """

    kind: str
    nodes: tuple[int, ...] | float | None = None
    p: float = 1.0
    window: tuple[float, float] | None = None
    max_count: int | None = None
    draw: Draw = "arrival"
    value: float | None = None
    shape: Literal["vllm", "first"] = "vllm"
    http_date: bool = False
    graceful: bool = False
    first_round: bool = False

    def __post_init__(self) -> None:
        """Refuse rules that cannot be simulated."""
        if self.kind not in KINDS:
            raise ConfigurationError(
                f"fault kind {self.kind!r} is unknown; known: {', '.join(sorted(KINDS))}"
            )
        if not 0 <= self.p <= 1:
            raise ConfigurationError(f"fault {self.kind}: p must be in [0, 1], not {self.p}")
        if self.draw not in {"arrival", "item", "attempt"}:
            raise ConfigurationError(
                f"fault {self.kind}: draw must be arrival, item or attempt, not {self.draw!r}"
            )
        if isinstance(self.nodes, float) and not 0 <= self.nodes <= 1:
            raise ConfigurationError(f"fault {self.kind}: a fraction of nodes must be in [0, 1]")
        if self.value is None and self.kind in _NEEDS_VALUE:
            raise ConfigurationError(f"fault {self.kind} needs a value (a number)")

    def is_active(self, now: float) -> bool:
        """Return True if a time, in simulated seconds since the start, is in the window."""
        return self.window is None or self.window[0] <= now < self.window[1]

    def to_mapping(self) -> dict[str, Any]:
        """Return the rule as plain data for JSON."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> FaultRule:
        """Build a rule from JSON or YAML data.

        Args:
            data: The attributes by name.

        Raises:
            ConfigurationError: An unknown key or an invalid value.
        """
        unknown = data.keys() - {field.name for field in fields(cls)}
        if unknown or "kind" not in data:
            raise ConfigurationError(
                f"unknown fields of a fault rule: {', '.join(sorted(unknown))}"
                if unknown
                else "a fault rule needs 'kind'"
            )
        plain = dict(data)
        for name in ("nodes", "window"):
            if isinstance(plain.get(name), list):
                plain[name] = tuple(plain[name])
        return cls(**plain)


_MINUTE: Final = 60.0
_KEEP_ALIVE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class FaultContext:
    """Data that the draw of a fault may depend on.

    Attributes:
        node: The node's number.
        arrival: Number of the request on this node.
        key: The question's key.
        attempt: Number of earlier requests for the question, on any node.
        now: Simulated seconds since the start.
        stream: Whether the answer is to be streamed.
        first_round: Whether the conversation has no assistant message.
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
class FaultDecision:
    """Decision for one request.

    Attributes:
        rule: The fault, or None.
        speed: Factor on the speed.
    """

    rule: FaultRule | None = None
    speed: float = 1.0


@dataclass(slots=True)
class _ActiveRule:
    """A rule with its state."""

    rule: FaultRule
    number: int
    nodes: frozenset[int]
    count: int = 0
    cold_since: dict[int, float] = field(default_factory=dict)
    tokens: dict[int, float] = field(default_factory=dict)
    old: set[str | None] = field(default_factory=set)

    def is_exhausted(self) -> bool:
        limit = self.rule.max_count
        return limit is not None and self.count >= limit

    def value(self, default: float = 0.0) -> float:
        return default if self.rule.value is None else self.rule.value


class FaultInjector:
    """Fault rules of a fleet.

    Args:
        seed: Seed of all draws: the same order of requests meets the same faults.
        nodes: Number of nodes of the fleet.
        rules: Initial rules.
    """

    def __init__(self, seed: int, nodes: int, rules: tuple[FaultRule, ...] = ()) -> None:
        self._seed = seed
        self._nodes = nodes
        self._numbered = 0
        self._active: list[_ActiveRule] = []
        self._by_state: dict[str, Callable[[_ActiveRule, FaultContext], bool]] = {
            "cold": _cold,
            "tpm": _over_tokens,
            "401_after": _old_token,
        }
        for rule in rules:
            self.add(rule)

    def add(self, rule: FaultRule) -> frozenset[int]:
        """Add a rule; return the numbers of the affected nodes."""
        active = _ActiveRule(rule, self._numbered, self._affected_nodes(rule))
        self._numbered += 1
        self._active.append(active)
        return active.nodes

    def clear(self) -> None:
        """Remove all rules."""
        self._active.clear()

    def decide(self, call: FaultContext) -> FaultDecision:
        """Return the first rule that applies to a request, and the product of ``slow`` factors."""
        struck, speed = None, 1.0
        for active in self._active:
            kind = active.rule.kind
            if (struck is not None and kind != "slow") or not self._applies(active, call):
                continue
            active.count += 1
            if kind == "slow":
                speed *= active.value(1.0)
            else:
                struck = active.rule
        return FaultDecision(struck, speed)

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
        """Return a node's context length: the smallest of ``usual`` and ``context`` rules."""
        return min([usual, *(int(active.value()) for active in self._of(node, now, "context"))])

    def idle_s(self, node: int, now: float) -> float | None:
        """Return the idle seconds after which a node closes a connection, or None for never."""
        limits = [active.value(_KEEP_ALIVE_S) for active in self._of(node, now, "keepalive_race")]
        return min(limits, default=None)

    def is_cold(self, node: int, now: float) -> bool:
        """Return True if a node is not ready: no request so far, or still warming up."""
        return any(
            now < active.cold_since.get(node, now) + active.value()
            for active in self._of(node, now, "cold")
        )

    def _of(self, node: int, now: float, kind: str) -> list[_ActiveRule]:
        return [
            active
            for active in self._active
            if active.rule.kind == kind and node in active.nodes and active.rule.is_active(now)
        ]

    def _affected_nodes(self, rule: FaultRule) -> frozenset[int]:
        if rule.nodes is None:
            return frozenset(range(self._nodes))
        if isinstance(rule.nodes, tuple):
            return frozenset(rule.nodes)
        count = -int(-rule.nodes * self._nodes // 1)
        ranked = sorted(
            range(self._nodes),
            key=lambda node: draw_uniform(self._seed, self._numbered, "node", node),
        )
        return frozenset(ranked[:count])

    def _applies(self, active: _ActiveRule, call: FaultContext) -> bool:
        rule = active.rule
        if call.node not in active.nodes or not rule.is_active(call.now) or active.is_exhausted():
            return False
        if rule.first_round and not call.first_round:
            return False
        if (rule.kind in IN_STREAM and not call.stream) or rule.kind in _PROPERTIES:
            return False
        if rule.kind in self._by_state:
            return self._by_state[rule.kind](active, call)
        return rule.p >= 1 or self._draw_chance(active, call) < rule.p

    def _draw_chance(self, active: _ActiveRule, call: FaultContext) -> float:
        match active.rule.draw:
            case "arrival":
                return draw_uniform(self._seed, active.number, call.node, call.arrival)
            case "item":
                return draw_uniform(self._seed, active.number, call.key)
            case _:
                return draw_uniform(self._seed, active.number, call.key, call.attempt)


_PROPERTIES: Final = frozenset(["die_at", "revive_at", "context", "keepalive_race"])


def _cold(active: _ActiveRule, call: FaultContext) -> bool:
    since = active.cold_since.setdefault(call.node, call.now)
    return call.now < since + active.value()


def _over_tokens(active: _ActiveRule, call: FaultContext) -> bool:
    return active.tokens.get(int(call.now // _MINUTE), 0.0) >= active.value()


def _old_token(active: _ActiveRule, call: FaultContext) -> bool:
    if call.now < active.value():
        active.old.add(call.token)
        return False
    return call.token in active.old
