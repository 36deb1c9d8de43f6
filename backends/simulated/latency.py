"""How long an answer takes."""

from __future__ import annotations

import math
from dataclasses import dataclass

from .dice import normal
from .spec import SimulationSpec


@dataclass(frozen=True, slots=True)
class Timing:
    """Real seconds from the start of the work on a request.

    Attributes:
        first_s: Until the first token.
        total_s: Until the last one.
    """

    first_s: float
    total_s: float


class LatencyModel:
    """Time to first token and per token, as the specification sets them.

    ``first = ttft_s + prompt / prefill_rate``, then ``tpot_s * (1 + alpha * (running - 1) /
    slots)`` per output token; all of it times a log-normal factor, divided by the node's speed
    and by ``time_scale``. The wait in the queue comes on top.

    Args:
        spec: The fleet's specification.
    """

    def __init__(self, spec: SimulationSpec) -> None:
        self._spec = spec

    def timing(
        self, prompt: int, output: int, load: float, speed: float, key: tuple[object, ...]
    ) -> Timing:
        """Return how long one request takes.

        Args:
            prompt: Prompt tokens.
            output: Output tokens.
            load: Other requests running on the node, as a share of its slots.
            speed: The node's speed; 1 is the specification's.
            key: What the jitter is drawn from.

        Returns:
            The times.
        """
        spec = self._spec
        factor = 1.0 / (speed * spec.time_scale)
        if spec.jitter:
            factor *= math.exp(spec.jitter * normal(spec.seed, "jitter", *key))
        first = spec.ttft_s + prompt / spec.prefill_rate
        return Timing(
            first_s=first * factor,
            total_s=(first + output * spec.tpot_s * (1 + spec.alpha * load)) * factor,
        )
