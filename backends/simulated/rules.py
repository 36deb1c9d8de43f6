"""What can go wrong on purpose: the value that describes one fault.

==================  ===========================================================================
``429 429_ra``      too many requests, without and with ``Retry-After``
``500 503 504``     JSON errors; ``500_text`` plain text, ``502_html`` a proxy's page,
                    ``503_busy`` vLLM's full queue
``hang``            no answer until the client leaves
``drop reset``      the connection closes, or breaks, before any byte
``cut_body``        fewer bytes than ``Content-Length`` says
``malformed``       half a JSON document; ``html200`` a login page; ``error200`` an error object;
                    ``null_choices empty_choices no_usage`` what they say: all with status 200
``empty_content``   an answer without text; ``content_filter`` and ``refusal`` withheld ones;
                    ``bad_schema`` one that breaks the schema
``stream_cut``      the connection closes amid a stream; ``stream_error`` an error event;
                    ``stream_no_finish`` no last chunk; ``stream_api_error`` an error as text
``tpm``             a budget of tokens per minute is spent
``cold``            not ready for a while after the first request
``401_after``       tokens seen before a moment are refused after it
``slow``            a factor on the speed
``die_at``          the node stops (``revive_at``: starts again)
``context``         a smaller context length
``keepalive_race``  idle connections are closed
==================  ===========================================================================
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Final, Literal, TypeAlias

from ..core.errors import ConfigurationError

Draw: TypeAlias = Literal["arrival", "item", "attempt"]

AT_ARRIVAL: Final = frozenset(
    {
        *("429", "429_ra", "500", "500_text", "502_html", "503", "503_busy", "504"),
        *("hang", "drop", "reset"),
    }
)
"""Answered (or not) at once, without taking a slot."""

IN_ANSWER: Final = frozenset(
    {
        *("malformed", "cut_body", "html200", "error200", "null_choices", "empty_choices"),
        *("no_usage", "empty_content", "content_filter", "refusal", "bad_schema"),
    }
)
"""HTTP 200 after the usual time, with something wrong inside."""

IN_STREAM: Final = frozenset(["stream_cut", "stream_error", "stream_no_finish", "stream_api_error"])
"""Streamed answers only."""

BY_STATE: Final = frozenset(["tpm", "cold", "401_after"])
"""Refusals that depend on what happened before, not on a draw."""

OF_NODE: Final = frozenset(["slow", "die_at", "revive_at", "context", "keepalive_race"])
"""Properties of nodes rather than refusals."""

KINDS: Final = AT_ARRIVAL | IN_ANSWER | IN_STREAM | BY_STATE | OF_NODE

_NEEDS_VALUE: Final = frozenset(["die_at", "revive_at", "context", "401_after", "cold", "tpm"])


@dataclass(frozen=True, slots=True)
class FaultRule:
    """One kind of failure, and when it strikes.

    All times are simulated seconds since the fleet started (real ones times ``time_scale``),
    except a ``Retry-After``, which the client obeys in real time.

    Attributes:
        kind: One of `KINDS`; the module's table says what each does.
        nodes: The nodes concerned: their numbers, a fraction of them, or None for all.
        p: Probability that the fault strikes a request.
        window: From (inclusive) and to (exclusive), or None for always.
        max_count: Most strikes, or None.
        draw: What the probability is drawn from. ``arrival``: node and arrival number;
            ``item``: the conversation, so that the same item fails on every node (poison);
            ``attempt``: the conversation and how often it was asked before.
        value: The kind's number: ``429_ra`` seconds to wait, ``cold`` seconds until ready,
            ``tpm`` tokens per 60 s, ``slow`` speed factor, ``die_at``/``revive_at``/
            ``401_after`` the moment, ``context`` the model length in tokens,
            ``keepalive_race`` idle seconds (default 5).
        shape: Whose error body a ``429`` carries: ``vllm`` or ``first`` (the FIRST gateway's).
        http_date: Whether ``429_ra`` sends an HTTP date in place of seconds.
        graceful: Whether ``die_at`` answers what is in flight with ``finish_reason: abort``.
        first_round: Whether to spare conversations that hold an assistant's message, so that a
            repair round always cures the fault.

    Raises:
        ConfigurationError: An unknown kind, or a number out of its range.
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
        """Refuse what cannot be simulated."""
        if self.kind not in KINDS:
            raise ConfigurationError(
                f"fault kind {self.kind!r} is unknown; known are {', '.join(sorted(KINDS))}"
            )
        if not 0 <= self.p <= 1:
            raise ConfigurationError(f"fault {self.kind}: p must lie in [0, 1], not {self.p}")
        if self.draw not in {"arrival", "item", "attempt"}:
            raise ConfigurationError(
                f"fault {self.kind}: draw must be arrival, item or attempt, not {self.draw!r}"
            )
        if isinstance(self.nodes, float) and not 0 <= self.nodes <= 1:
            raise ConfigurationError(f"fault {self.kind}: a fraction of nodes lies in [0, 1]")
        if self.value is None and self.kind in _NEEDS_VALUE:
            raise ConfigurationError(f"fault {self.kind} needs a value (a number)")

    def active(self, now: float) -> bool:
        """Tell whether the rule applies at a moment.

        Args:
            now: Simulated seconds since the start.

        Returns:
            Whether ``now`` lies in the window.
        """
        return self.window is None or self.window[0] <= now < self.window[1]

    def to_mapping(self) -> dict[str, Any]:
        """Return the rule as JSON can say it."""
        return asdict(self)

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> FaultRule:
        """Build a rule from JSON or YAML.

        Args:
            data: The attributes by name.

        Returns:
            The rule.

        Raises:
            ConfigurationError: An unknown key or a value that makes no sense.
        """
        unknown = data.keys() - {field.name for field in fields(cls)}
        if unknown or "kind" not in data:
            raise ConfigurationError(
                f"a fault rule needs 'kind' and knows no {sorted(unknown)}"
                if unknown
                else "a fault rule needs 'kind'"
            )
        plain = dict(data)
        for name in ("nodes", "window"):
            if isinstance(plain.get(name), list):
                plain[name] = tuple(plain[name])
        return cls(**plain)
