"""What a model server says of its load, in the text of vLLM's ``/metrics``."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_GAUGE: Final = re.compile(
    rb"^vllm:num_requests_(running|waiting)(?:\{[^\n]*\})?[ \t]+([0-9.eE+]+)", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class Gauges:
    """The requests of one server, whoever sent them; None where it does not say.

    Attributes:
        running: Those that it works on.
        waiting: Those in its queue.
    """

    running: int | None = None
    waiting: int | None = None


def read_metrics(body: bytes) -> Gauges | None:
    """Read Prometheus' text with vLLM's names; None where it has none of them.

    A server with several engines has one line for each; they are added up.
    """
    sums = dict[bytes, float]()
    for name, value in _GAUGE.findall(body):
        sums[name] = sums.get(name, 0.0) + float(value)
    if not sums:
        return None
    return Gauges(_whole(sums.get(b"running")), _whole(sums.get(b"waiting")))


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)
