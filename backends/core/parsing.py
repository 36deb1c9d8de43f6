"""Small parsers: fenced JSON, chat messages, references in schemas, vLLM metrics text."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import unquote

import orjson

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


def read_message_text(message: Mapping[str, Any]) -> str:
    """Return all text of a chat message; parts that are not text are included as JSON."""
    content, calls = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list | tuple) else [content] if content else []
    texts = [_read_part_text(part) for part in parts]
    return "\n".join([*texts, *([orjson.dumps(calls).decode()] if calls else [])])


def _read_part_text(part: Any) -> str:
    text = part.get("text") if isinstance(part, Mapping) else part
    return text if isinstance(text, str) else orjson.dumps(part).decode()


def resolve_reference(root: Any, reference: str) -> Any:
    """Return the part of a schema that a reference names by a JSON pointer (RFC 6901).

    Args:
        root: The whole schema.
        reference: ``#`` or ``#/...``.

    Raises:
        LookupError: The reference does not exist.
    """
    part = root
    for step in unquote(reference).split("/")[1:]:
        name = step.replace("~1", "/").replace("~0", "~")
        try:
            part = part[int(name)] if isinstance(part, list) else part[name]
        except (LookupError, TypeError, ValueError):
            msg = f"The reference {reference!r} does not exist."
            raise LookupError(msg) from None
    return part
