"""Answers to the questions of operators: orders of a noisy judge, and summaries that keep ids."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, TypeAlias

from ..core.parsing import read_message_text
from .requests import Question
from .values import SeededRandom, draw_normal, draw_uniform, hash_parts

_LETTERED: Final = re.compile(r"^([A-Z]): (\".*\")$", re.MULTILINE)
_QUOTED: Final = re.compile(r"^(\".*\")$", re.MULTILINE)
_HOSTILE: Final = ("ignore", "rank me", "rank this", "instruction")
"""Words by which the simulated judge recognises texts that speak to it."""
_NAMED: Final = re.compile(r"^\[([^\]\n]+)\] (.*)$", re.MULTILINE)
_STATEMENT: Final = re.compile(r"^(Statement): (.*)$", re.MULTILINE)
_TEXT: Final = re.compile(r"^()(\".*\")$", re.MULTILINE)
_SUPPORTED: Final = 0.85
"""Share of statements that the judge finds supported by texts that do not repeat them."""
_WORDS: Final = 12
"""Words of a text that a statement repeats."""

JUDGE_NOISE: Final = 0.1
"""Standard deviation of a judge's error; the true values of items have one of 1."""


Measure: TypeAlias = Callable[[str], float]
"""Returns the true value of a text, from about a standard normal; takes the text as JSON."""
Reason: TypeAlias = Callable[[str], str]
"""Returns the reason for the rank of a text; takes the text as JSON."""


def measure_text(text: str) -> float:
    """Return the true value of a text for the simulated judge, from a standard normal."""
    return draw_normal(hash_parts("value", text.encode()), "value")


def quote_text(text: str) -> str:
    """Return the reason of a judge that knows nothing of the subject."""
    words = " ".join(text.strip('"').split()[:_WORDS])
    return f"Its text says: {words}"


def answer_operator(
    question: Question, measure: Measure = measure_text, reason: Reason = quote_text
) -> dict[str, Any] | None:
    """Return the answer to a question of an operator, or None if it is another question.

    An order follows the true values of the texts with some noise. A summary repeats the beginnings
    of some texts, with their ids.

    Args:
        question: The question.
        measure: Returns the true value of a text.
        reason: Returns the reason for the rank of a text.
    """
    schema = question.form.schema
    if schema is None:
        return None
    fields = schema.schema.get("properties") if isinstance(schema.schema, Mapping) else None
    if not isinstance(fields, Mapping):
        return None
    answer = None
    if set(fields) == {"order"}:
        answer = _order(question, measure)
    elif set(fields) == {"reason", "tries_to_influence"}:
        answer = _explain(question, reason)
    elif set(fields) == {"supported"}:
        answer = _check(question)
    elif set(fields) == {"statements"}:
        answer = _summarize(question, fields["statements"])
    return answer if answer is not None and schema.accepts(answer) else None


def _find(question: Question, pattern: re.Pattern[str]) -> list[tuple[str, str]]:
    texts = [read_message_text(one) for one in question.messages if one.get("role") == "user"]
    return [(str(name), str(text)) for one in texts for name, text in pattern.findall(one)]


def _order(question: Question, measure: Measure) -> dict[str, Any] | None:
    found = dict(_find(question, _LETTERED))
    if not found:
        return None
    seen = {
        letter: measure(text) + JUDGE_NOISE * draw_normal(question.key, "judge", letter)
        for letter, text in found.items()
    }
    return {"order": sorted(seen, key=lambda letter: -seen[letter])}


def _explain(question: Question, reason: Reason) -> dict[str, Any] | None:
    texts = [read_message_text(one) for one in question.messages if one.get("role") == "user"]
    found = [text for one in texts for text in _QUOTED.findall(one)]
    if not found:
        return None
    text = str(found[-1])
    hostile = any(word in text.lower() for word in _HOSTILE)
    return {"reason": reason(text), "tries_to_influence": hostile}


def _check(question: Question) -> dict[str, Any] | None:
    found = [text for _, text in _find(question, _STATEMENT)]
    quoted = [text for _, text in _find(question, _TEXT)]
    if not found or not quoted:
        return None
    same = found[-1].rstrip(".") in quoted[-1]
    return {"supported": same or draw_uniform(question.key, "supported") < _SUPPORTED}


def _summarize(question: Question, form: Any) -> dict[str, Any] | None:
    found = _find(question, _NAMED)
    if not found:
        return None
    most = form.get("maxItems", len(found)) if isinstance(form, Mapping) else len(found)
    parts = max(1, min(int(most), -(-len(found) // 3)))
    return {"statements": [_state(found[at::parts], question.key) for at in range(parts)]}


def _state(texts: Sequence[tuple[str, str]], key: bytes) -> dict[str, Any]:
    _, text = texts[SeededRandom(hash_parts(key, texts[0][0])).below(len(texts))]
    words = " ".join(text.split()[:_WORDS])
    kept = [name for name, _ in texts if draw_uniform(key, "kept", name) < 0.9]  # noqa: PLR2004
    return {"text": words or "Nothing is stated.", "ids": kept or [texts[0][0]]}
