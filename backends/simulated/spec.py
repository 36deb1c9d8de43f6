"""Specification of a simulated fleet: one frozen value with a JSON form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Final, Literal, TypeAlias

import orjson

from ..core.errors import ConfigurationError
from .engine import EngineSpec
from .faults import FaultRule

Addressing: TypeAlias = Literal["path", "port", "addr"]
UsageMode: TypeAlias = Literal["full", "details", "null", "omit"]

REFUSED: Final = 2
"""Exit code of a fleet's process that refuses its specification."""


@dataclass(frozen=True, slots=True)
class SimulationSpec:
    """Size, speed, answers and faults of a simulated fleet.

    By default, a question is answered with about 100 tokens of JSON in 0.3 to 1 s.

    Attributes:
        nodes: Number of endpoints.
        model: The served model.
        addressing: ``path`` (one port, ``/node-<k>/v1``), ``port`` (one port per node) or
            ``addr`` (one loopback address per node, Linux only).
        host: Address to listen on; ignored with ``addr``.
        port: First port, or 0 for free ones.
        responder: Name of the responder that generates the answers (`responders.RESPONDERS`).
        seed: Seed of answers, jitter and faults.
        max_num_seqs: Requests that a node processes at once; further ones queue.
        max_num_queued_reqs: Longest queue of a node, or None for no limit.
        max_model_len: Context length in tokens.
        ttft_s: Seconds before the prompt is read.
        prefill_rate: Prompt tokens read per second.
        tpot_s: Seconds per output token of a single request.
        alpha: Slowdown of each request on a full node: the factor on ``tpot_s`` is
            ``1 + alpha * (running - 1) / max_num_seqs``.
        jitter: Sigma of the log-normal factor on all times; 0 is exact.
        time_scale: Divides all times; 10 is ten times as fast.
        output_tokens: Minimum and maximum of tokens of a free text.
        speeds: Factor on a node's speed, by node number; other nodes have 1.
        capacities: ``max_num_seqs`` of single nodes, by node number.
        accuracy: Probability that a responder that knows the truth gives it.
        noise: Standard deviation of a computing responder's error, in its own unit.
        usage: ``full`` (five keys), ``details`` (with cached tokens), ``null`` or ``omit``.
        api_key: Key that ``/v1`` requires, or None for no key. Never shown in ``repr``.
        faults: Fault rules.
        engine: Size and speed of an engine with a prefix cache (`EngineSpec`), which takes the
            place of the settings from ``max_num_seqs`` to ``jitter``; None: each request takes the
            time that these settings give.

    Raises:
        ConfigurationError: A value is out of range.
    """

    nodes: int = 8
    model: str = "simulated-8b"
    addressing: Addressing = "path"
    host: str = "127.0.0.1"
    port: int = 0
    responder: str = "schema"
    seed: int = 0
    max_num_seqs: int = 64
    max_num_queued_reqs: int | None = None
    max_model_len: int = 32_768
    ttft_s: float = 0.1
    prefill_rate: float = 20_000.0
    tpot_s: float = 0.005
    alpha: float = 0.5
    jitter: float = 0.2
    time_scale: float = 1.0
    output_tokens: tuple[int, int] = (64, 160)
    speeds: Mapping[int, float] = field(default_factory=dict)
    capacities: Mapping[int, int] = field(default_factory=dict)
    accuracy: float = 1.0
    noise: float = 0.3
    usage: UsageMode = "full"
    api_key: str | None = field(default=None, repr=False)
    faults: tuple[FaultRule, ...] = ()
    engine: EngineSpec | None = None

    def __post_init__(self) -> None:
        """Refuse values of a wrong type or out of range; the message names the field."""
        self._check_types()
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise _wrong(name, f"must be at least {least}", getattr(self, name))
        for name in ("prefill_rate", "time_scale"):
            if getattr(self, name) <= 0:
                raise _wrong(name, "must be above 0", getattr(self, name))
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise _wrong(name, f"must be one of {', '.join(choices)}", getattr(self, name))
        if not self.model:
            raise _wrong("model", "must not be empty", self.model)
        if not 0 <= self.accuracy <= 1:
            raise _wrong("accuracy", "must be in [0, 1]", self.accuracy)
        if not 1 <= self.output_tokens[0] <= self.output_tokens[1]:
            raise _wrong("output_tokens", "must be (least, most), from 1", self.output_tokens)
        for name in ("speeds", "capacities"):
            if any(value <= 0 for value in getattr(self, name).values()):
                raise _wrong(name, "must be above 0", dict(getattr(self, name)))

    def _check_types(self) -> None:
        for name, (kind, words) in _KINDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool):
                raise _wrong(name, f"must be {words}", value)

    @classmethod
    def fast(cls, **changes: Any) -> SimulationSpec:
        """Return a fleet for tests: first token after 5 ms, 0.2 ms per token, no jitter.

        Args:
            **changes: Attributes that differ.
        """
        quick = cls(ttft_s=0.005, tpot_s=0.0002, prefill_rate=1e6, alpha=0.0, jitter=0.0)
        return replace(quick, **changes)

    @classmethod
    def like_8b(cls, **changes: Any) -> SimulationSpec:
        """Return nodes as slow as a busy 8B model: 131 tokens per answer, 78 ms each.

        Derived, under the assumption of 256 running sequences, from the load tests that
        argonne-lcf/FIRST publishes (``examples/load-testing/benchmark_summary.csv``).

        Args:
            **changes: Attributes that differ.
        """
        busy = cls(tpot_s=0.078, output_tokens=(131, 131), max_num_seqs=256, alpha=0.0)
        return replace(busy, **changes)

    @classmethod
    def like_70b(cls, **changes: Any) -> SimulationSpec:
        """Return nodes as slow as a busy 70B model: 173 tokens per answer, 179 ms each.

        Derived in the same way as `like_8b`.

        Args:
            **changes: Attributes that differ.
        """
        slow = cls(model="simulated-70b", tpot_s=0.179, output_tokens=(173, 173), alpha=0.0)
        return replace(slow, max_num_seqs=256, **changes)

    def to_json(self) -> str:
        """Return the specification as one line of JSON, with the API key."""
        return orjson.dumps(asdict(self), option=orjson.OPT_NON_STR_KEYS).decode()

    @classmethod
    def from_json(cls, text: str | bytes) -> SimulationSpec:
        """Read the output of `to_json`; missing keys have their defaults.

        Raises:
            ConfigurationError: Not a JSON object, an unknown key or a value out of range.
        """
        try:
            data = orjson.loads(text)
        except orjson.JSONDecodeError as error:
            raise ConfigurationError(f"the fleet's specification is not JSON: {error}") from error
        if not isinstance(data, dict):
            raise ConfigurationError("the fleet's specification must be a JSON object")
        return cls.from_mapping(data)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> SimulationSpec:
        """Build a specification from JSON or YAML data.

        Args:
            data: The attributes by name; missing ones have their defaults.

        Raises:
            ConfigurationError: An unknown key, a wrong type or a value out of range.
        """
        known = [item.name for item in fields(cls)]
        unknown = sorted(data.keys() - set(known))
        if unknown:
            raise ConfigurationError(
                f"simulated fleet: unknown {', '.join(unknown)}; known: {', '.join(known)}"
            )
        plain = dict(data)
        try:
            if "output_tokens" in plain:
                low, high = plain["output_tokens"]
                plain["output_tokens"] = (int(low), int(high))
            for name, number in (("speeds", float), ("capacities", int)):
                if name in plain:
                    plain[name] = {int(k): number(v) for k, v in plain[name].items()}
            if isinstance(plain.get("engine"), Mapping):
                plain["engine"] = EngineSpec(**plain["engine"])
            if "faults" in plain:
                plain["faults"] = tuple(map(_rule, plain["faults"]))
            return cls(**plain)
        except (TypeError, ValueError, AttributeError) as error:
            raise ConfigurationError(f"simulated fleet: {error}") from error


_WHOLE: tuple[Any, str] = (int, "a whole number")
_REAL: tuple[Any, str] = (int | float, "a number")
_TEXT: tuple[Any, str] = (str, "text")
_KINDS: dict[str, tuple[Any, str]] = {
    **dict.fromkeys(("nodes", "port", "seed", "max_num_seqs", "max_model_len"), _WHOLE),
    **dict.fromkeys(("ttft_s", "prefill_rate", "tpot_s", "alpha", "jitter"), _REAL),
    **dict.fromkeys(("time_scale", "accuracy", "noise"), _REAL),
    **dict.fromkeys(("model", "addressing", "host", "responder", "usage"), _TEXT),
    "max_num_queued_reqs": (int | None, "a whole number or null"),
    "api_key": (str | None, "text or null"),
}
_LEAST: dict[str, float] = {
    "nodes": 1,
    "port": 0,
    "max_num_seqs": 1,
    "max_model_len": 1,
    "ttft_s": 0,
    "tpot_s": 0,
    "alpha": 0,
    "jitter": 0,
    "noise": 0,
}
_CHOICES: dict[str, tuple[str, ...]] = {
    "addressing": ("path", "port", "addr"),
    "usage": ("full", "details", "null", "omit"),
}


def _wrong(name: str, rule: str, value: object) -> ConfigurationError:
    return ConfigurationError(f"simulated fleet: {name} {rule}, not {value!r}")


def _rule(data: FaultRule | Mapping[str, Any]) -> FaultRule:
    return data if isinstance(data, FaultRule) else FaultRule.from_mapping(data)
