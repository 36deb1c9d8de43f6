"""Small parsers: fenced JSON, vLLM metrics text."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

_GAUGE: Final = re.compile(
    rb"^vllm:num_requests_(running|waiting)(?:\{[^\n]*\})?[ \t]+([0-9.eE+]+)", re.MULTILINE
)


@dataclass(frozen=True, slots=True)
class ServerLoad:
    """The requests of one server, from all clients; None if the server does not report them.

    Attributes:
        running: Requests that it processes.
        waiting: Requests in its queue.
    """

    running: int | None = None
    waiting: int | None = None


def parse_load_metrics(body: bytes) -> ServerLoad | None:
    """Parse Prometheus text with vLLM's names; None if it has none of them.

    A server with several engines has one line for each; they are summed.
    """
    sums = dict[bytes, float]()
    for name, value in _GAUGE.findall(body):
        sums[name] = sums.get(name, 0.0) + float(value)
    if not sums:
        return None
    return ServerLoad(_whole(sums.get(b"running")), _whole(sums.get(b"waiting")))


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


_FENCE: Final = re.compile(r"\A\s*```(?:json)?\s*\n(.*?)\n?\s*```\s*\Z", re.DOTALL)


def strip_fence(text: str) -> str:
    """Return a text without the Markdown fence around the whole of it, if there is one."""
    fenced = _FENCE.match(text)
    return fenced.group(1) if fenced else text
