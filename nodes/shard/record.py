"""The journal record of an item: what is written when it ends."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, Final

import orjson

from ...backends.core.errors import (
    InvalidAnswerError,
)
from ...backends.core.images import mask_images, read_text
from ...backends.core.money import TokenPrices
from ...backends.core.protocols import CallLog, EndpointUsage
from ...backends.core.samples import SampleFold, find_row_error
from ...backends.core.types import Item, Json, Message, Outcome
from ...backends.core.values import MAX_COUNT, clamp_counts, replace_surrogates
from ..context import ItemJournal, RunTools
from ..item.item_state import ItemState

_MOST_RAW: Final = 16_000
"""Maximum number of bytes of an answer's text in a record."""


_CUT: Final = "…"


_REPAIR_MESSAGES: Final = 2
"""Messages by which a repair extends the question: the answer, and what is wrong with it."""

_SUMS: Final = ("lost_tokens", "useful_tokens", "nano_usd", "useful_nano_usd")


class ItemDigests:
    """Digests in the records of a run's items.

    Args:
        question: Digest of what all questions of the run share.
        constant_messages: Number of messages at the start of each question that it covers.
        fingerprint: Digest of the task and the model.
    """

    def __init__(self, question: bytes, constant_messages: int, fingerprint: bytes) -> None:
        self._question = hashlib.sha256(question)
        self._constant_messages = constant_messages
        self._fingerprint = hashlib.blake2b(fingerprint, digest_size=12)

    def compute_question(
        self,
        messages: Sequence[Message] | None,
        sample: int = 0,
        images: Sequence[Mapping[str, Json]] = (),
    ) -> str | None:
        """Return the digest of an item's first messages; repairs repeat them.

        Args:
            messages: The messages; None or empty gives None.
            sample: Number of the sample. The first one has the digest of an item without samples.
            images: What is known of the images, with their digests.
        """
        if not messages:
            return None
        digest = self._question.copy()
        for number, message in enumerate(messages[self._constant_messages :]):
            content = read_text(message["content"]).encode(errors="replace")
            digest.update(b"\0%d\0" % len(content) + content if number else content)
        for image in images:
            digest.update(f"\0image {image['sha256']}".encode())
        if sample:
            digest.update(b"\0sample %d" % sample)
        return digest.hexdigest()[:32]

    def compute_fingerprint(self, item: Item) -> str:
        """Return the digest of the task, the model and the item."""
        digest = self._fingerprint.copy()
        digest.update(orjson.dumps([item.id, item.row]))
        return digest.hexdigest()


class RecordBuilder:
    """Builds the journal records of a run; ``docs/resume.md`` describes them."""

    def __init__(self, tools: RunTools) -> None:
        self._tools = tools
        self._digests = ItemDigests(
            tools.question_digest, tools.constant_messages, tools.fingerprint
        )

    def build(
        self, item: Item, state: ItemState, calls: CallLog, latency_s: float
    ) -> dict[str, Json]:
        """Return the record of an item that has ended."""
        tools, error = self._tools, state.get("error")
        calls.close(done=error is None)
        usage = calls.usage
        messages = state.get("messages") or []
        sent_back = _REPAIR_MESSAGES * state.get("repairs", 0)
        pieces = state.get("pieces") or ()
        raw = state.get("raw") if error is not None or tools.keep_raw else None
        record = {
            "stage": tools.stage,
            "index": item.index,
            "id": item.id,
            "sample": item.sample,
            "status": "failed" if error else "done",
            "question": self._digests.compute_question(
                messages[: len(messages) - sent_back], item.sample, state.get("images") or ()
            ),
            "output": None if error else state.get("output"),
            "error_class": error["class"] if error else None,
            "error": error["text"] if error else None,
            "raw": raw,
            "endpoint": calls.endpoint,
            "model": calls.model,
            "requests": calls.requests,
            "attempts": calls.attempts,
            "repairs": state.get("repairs", 0) + sum(piece["repairs"] for piece in pieces),
            "reused": calls.reused,
            "prompt_tokens": usage.prompt,
            "cached_tokens": usage.cached,
            "completion_tokens": usage.completion,
            "lost_tokens": 0,
            "useful_tokens": 0,
            "nano_usd": 0,
            "useful_nano_usd": 0,
            "latency_s": round(latency_s, 4),
            "finished_at": _now(),
            "simulated": tools.simulated,
            "fingerprint": self._digests.compute_fingerprint(item),
            "origin": None,
        }
        if raw is not None:
            record |= _make_text_fields("raw", raw)
        if (reasoning := state.get("reasoning")) is not None:
            record |= _make_text_fields("reasoning", reasoning)
        if "certainty" in state:
            record["certainty"] = state["certainty"]
        if pieces:
            record["pieces"] = [{"start": one["start"], "end": one["end"]} for one in pieces]
        if images := state.get("images"):
            _leave_out_images(record)
            record["images"] = images
        usages = list(calls.usage_by_endpoint.values())
        if len(usages) == 1:
            record |= _cost_counts(usages[0], tools.token_prices)
        elif usages:
            shares = [_usage_json(usage, tools.token_prices) for usage in usages]
            sums = {name: min(MAX_COUNT, sum(share[name] for share in shares)) for name in _SUMS}
            record |= sums | {"shares": shares}
            for share in shares:
                clamp_counts(share)
        clamp_counts(record)
        return record


def _leave_out_images(record: dict[str, Json]) -> None:
    """Leave out the content of images in texts that a model or a server may repeat."""
    for name in ("error", "raw", "reasoning"):
        if isinstance(text := record.get(name), str):
            record[name] = mask_images(text)


def put_record(journal: ItemJournal, record: dict[str, Any]) -> dict[str, Any]:
    """Record how an item ended; it fails if its answer cannot be written as JSON.

    Returns:
        The record that was written.

    Raises:
        JournalError: It could not be written.
    """
    try:
        journal.put(record)
    except TypeError as error:
        record = _without_answer(record, error)
        journal.put(record)
    return record


def _without_answer(record: dict[str, Any], error: TypeError) -> dict[str, Any]:
    """Return a record without a value that JSON cannot represent; its costs are unchanged."""
    if record["status"] != "failed":
        text = f"the answer cannot be recorded as JSON: {error}"
        failed = {"status": "failed", "output": None, "error_class": InvalidAnswerError.__name__}
        record = record | failed | {"error": text}
    return {name: _make_writable(value) for name, value in record.items()}


def _make_writable(value: Any) -> Any:
    """Return plain data whose texts can be encoded as UTF-8."""
    if isinstance(value, str):
        return replace_surrogates(value)
    if isinstance(value, list):
        return [_make_writable(one) for one in value]
    if isinstance(value, dict):
        return {key: _make_writable(one) for key, one in value.items()}
    return value


def _make_text_fields(name: str, text: str) -> dict[str, Json]:
    """Return the part of a model's text that a record keeps, and its size if it is cut."""
    if 4 * len(text) <= _MOST_RAW:
        return {name: text}
    data = text.encode(errors="replace")
    if len(data) <= _MOST_RAW:
        return {name: text}
    kept = data[: _MOST_RAW - len(_CUT.encode())].decode(errors="ignore")
    return {name: kept + _CUT, f"{name}_bytes": len(data)}


def _now() -> str:
    """Return the present time as ISO 8601 text in UTC."""
    seconds, ms = divmod(time.time_ns() // 1_000_000, 1000)
    return f"{_second(seconds)}.{ms:03}+00:00"


@lru_cache(maxsize=2)
def _second(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat()[:19]


def _usage_json(share: EndpointUsage, prices: TokenPrices) -> dict[str, Json]:
    """Return an endpoint's usage for an item; an item's record has the same names."""
    return {
        "endpoint": share.endpoint,
        "model": share.model,
        "requests": share.requests,
        "prompt_tokens": share.usage.prompt,
        "cached_tokens": share.usage.cached,
        "completion_tokens": share.usage.completion,
        **_cost_counts(share, prices),
    }


def _cost_counts(share: EndpointUsage, prices: TokenPrices) -> dict[str, int]:
    """Return the cost of one endpoint's answers, and the useful part of it."""
    usage, lost, useful = share.usage, share.lost, share.useful
    nano = prices.nano_usd(usage)
    useful_nano = nano if useful is usage else prices.nano_usd(useful)
    lost_tokens = lost.tokens
    if lost_tokens:
        nano += prices.nano_usd(lost)
    if nano > MAX_COUNT or lost_tokens > MAX_COUNT:  # prices and limits have no upper bound
        nano, lost_tokens = min(MAX_COUNT, nano), min(MAX_COUNT, lost_tokens)
        useful_nano = min(MAX_COUNT, useful_nano)
    return {
        "lost_tokens": lost_tokens,
        "useful_tokens": useful.tokens,
        "nano_usd": nano,
        "useful_nano_usd": useful_nano,
    }


def make_outcome(record: dict[str, Any], item: Item) -> Outcome:
    """Return the outcome of an item from its journal record."""
    return Outcome(
        item.index, item.id, record["status"], record["output"], record["error_class"], item.row
    )


class SampleCollector:
    """Collects the samples of each row until all have ended, and folds them.

    Args:
        fold: How the answers are folded.
    """

    def __init__(self, fold: SampleFold) -> None:
        self._fold = fold
        self._open = dict[int, dict[int, tuple[str, Json, str | None]]]()

    @property
    def has_open_rows(self) -> bool:
        """Return True if samples were added, and others of their row are missing."""
        return bool(self._open)

    def add(self, record: Mapping[str, Any], item: Item) -> Outcome | None:
        """Add a sample that has ended; return the outcome of its row if it was the last one."""
        number = item.index // self._fold.samples
        ended = self._open.setdefault(number, {})
        ended[item.sample] = record["status"], record["output"], record["error_class"]
        if len(ended) < self._fold.samples:
            return None
        del self._open[number]
        in_order = [ended[sample] for sample in sorted(ended)]
        folded = self._fold.fold([output for status, output, _ in in_order if status == "done"])
        return Outcome(
            number,
            item.row_id,
            "done" if folded.answers else "failed",
            folded.output,
            None if folded.answers else find_row_error([error for *_, error in in_order]),
            item.row,
            folded,
        )
