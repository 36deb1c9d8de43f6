"""Small parsers: answers of models, chat messages, references in schemas, vLLM metrics text."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import unquote

import orjson

from .images import is_image
from .values import parse_json_text

_GAUGE: Final = re.compile(
    rb"^vllm:num_requests_(running|waiting)(?:\{[^\n]*\})?[ \t]+"
    rb"([0-9]{1,15}(?:\.[0-9]*)?(?:[eE]\+?[0-9]{1,2})?)(?![^\s])",
    re.MULTILINE,
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


def join_messages(messages: Iterable[Mapping[str, Any]], most: int | None = None) -> str:
    """Return the text of a conversation, in which equal beginnings of conversations are equal.

    Args:
        messages: The messages, without images.
        most: Number of characters from the beginning, or None for all.
    """
    parts, left = list[str](), most
    for message in messages:
        text = f"{message.get('role')}:{message.get('content')}"
        if left is None:
            parts.append(text)
            continue
        parts.append(text[:left])
        left -= len(text)
        if left <= 0:
            break
    return "".join(parts)


_OPEN_THINK: Final = re.compile(r"\s*<think>", re.IGNORECASE)
_END_THINK: Final = re.compile(r"</think>", re.IGNORECASE)
_MARKUP: Final = ("{", "[", '"', "```", "~~~")
"""Beginnings of a text that is JSON, also in a code fence."""


def split_reasoning(text: str, apart: str | None = None) -> tuple[str | None, str]:
    """Split an answer into its reasoning, if there is any, and the rest.

    The reasoning is what the server sent apart from the text, else a leading ``<think>…</think>``.
    Some chat templates end with the opening tag, so that the answer begins inside the block: then
    the closing tag must end a line, or precede JSON.

    Args:
        text: The text of the answer.
        apart: The reasoning that the server sent apart from it, or None.
    """
    block, rest = _split_block(text)
    return (apart.strip() if apart and apart.strip() else block), rest


def is_unfinished_reasoning(text: str) -> bool:
    """Return True if a text is only the beginning of a ``<think>…</think>``."""
    return _OPEN_THINK.match(text) is not None and _END_THINK.search(text) is None


def _split_block(text: str) -> tuple[str | None, str]:
    if "</" not in text or (end := _END_THINK.search(text)) is None:
        return None, text
    head, rest = text[: end.start()], text[end.end() :]
    if opening := _OPEN_THINK.match(head):
        return head[opening.end() :].strip(), rest.strip()
    begins_with_answer = head.lstrip().startswith(_MARKUP) or "<think>" in head.lower()
    ends_line = rest.startswith(("\n", "\r\n"))
    if begins_with_answer or not (ends_line or rest.lstrip().startswith(_MARKUP)):
        return None, text
    return head.strip(), rest.strip()


_CUT: Final = frozenset({"length", "max_tokens", "max_output_tokens", "max_length", "model_length"})
_WITHHELD: Final = frozenset(
    {"content_filter", "content_filtered", "safety", "prohibited_content", "guardrail_intervened"}
)
_LOOPED: Final = frozenset({"repetition"})

Stop: TypeAlias = Literal["cut", "withheld", "looped"]


def classify_finish(reason: str | None) -> Stop | None:
    """Return why an answer is not complete by its finish reason; None if the reason says nothing.

    Servers name a regular end in many ways, and some name none: only the known irregular ends
    count, in any letter case.
    """
    if reason in ("stop", None):
        return None
    name = reason.lower()
    if name in _CUT:
        return "cut"
    if name in _WITHHELD:
        return "withheld"
    return "looped" if name in _LOOPED else None


_FENCE_START: Final = r"(?P<fence>`{3,9}|~{3,9})[ \t]*(?:[A-Za-z][\w+.-]*(?=[\s{\[\"]))?"
_FENCE: Final = re.compile(_FENCE_START + r"(?P<body>.*?)(?:(?P=fence)|\Z)", re.DOTALL)
_OUTER_FENCE: Final = re.compile(_FENCE_START + r"(?P<body>.*)(?P=fence)", re.DOTALL)


def parse_answer(text: str) -> Iterator[Any]:
    """Yield the values that an answer in JSON may mean, the likeliest first.

    It is one value, unless the text as a whole is not JSON and has several code fences; then the
    last one is the likeliest. A second, tolerant parser reads what strict JSON forbids: a byte
    order mark, raw control characters in texts, halves of surrogate pairs, infinite numbers.

    Raises:
        ValueError: There is none; the message describes the error of the strict parser.
        RecursionError: A value is nested too deep to parse.
    """
    try:
        yield orjson.loads(text)
        return
    except orjson.JSONDecodeError as error:
        problem = str(error)
    found = False
    for part in _list_json_parts(text):
        try:
            value = parse_json_text(part)
        except ValueError:
            continue
        found = True
        yield value
    if not found:
        raise ValueError(problem)


def _list_json_parts(text: str) -> Iterator[str]:
    """Yield the parts of a text that may be JSON: all of it, then the content of code fences."""
    yield text
    if outer := _OUTER_FENCE.search(text):  # its JSON may contain fences in texts
        yield outer["body"].strip()
    yield from reversed([one["body"].strip() for one in _FENCE.finditer(text)])


def read_message_text(message: Mapping[str, Any]) -> str:
    """Return all text of a chat message; parts that are neither text nor image count as JSON."""
    content, calls = message.get("content"), message.get("tool_calls")
    parts = content if isinstance(content, list | tuple) else [content] if content else []
    texts = [_read_part_text(part) for part in parts if not is_image(part)]
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
