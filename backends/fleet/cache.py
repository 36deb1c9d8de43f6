"""Request cache: single flight and cacheability rules."""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final, Protocol, Self

import jsonschema_rs
import orjson
from tenacity import wait_exponential

from ..core.aio import ThreadBatcher
from ..core.parsing import classify_finish, parse_answer, split_reasoning
from ..core.protocols import CURRENT_CALLS
from ..core.schemas import open_validator
from ..core.types import Json, Usage
from ..core.waits import ExtendedWait, pause_after
from . import transport

_SCHEMAS: Final = 64


class CachePolicy:
    """Decides which requests and answers may be cached, from their content.

    Args:
        sampled: Whether requests at a temperature above 0 may share an answer, too.
    """

    def __init__(self, sampled: bool) -> None:
        self._sampled = sampled
        self._validators: dict[bytes, jsonschema_rs.Validator | None] = {}

    def is_shareable(self, body: Mapping[str, Any]) -> bool:
        """Return True if a request's answer may be given to equal ones."""
        return self._sampled or body.get("temperature") == 0

    def is_cacheable(self, body: Mapping[str, Any], document: Mapping[str, Any]) -> bool:
        """Return True if an answer is whole, no refusal, and matches its request's format."""
        wanted = body.get("response_format")
        return not transport.is_empty(document) and all(
            _is_whole(choice) and self._matches_format(wanted, choice["message"])
            for choice in document["choices"]
        )

    def _matches_format(self, wanted: Json, message: Mapping[str, Any]) -> bool:
        kind = wanted.get("type") if isinstance(wanted, dict) else None
        if kind not in ("json_schema", "json_object") or not message.get("content"):
            return True
        schema = (wanted.get("json_schema") or {}).get("schema") if kind == "json_schema" else {}
        validator = self._validator(schema)
        try:
            values = parse_answer(split_reasoning(message["content"])[1])
            return validator is not None and any(map(validator.is_valid, values))
        except (ValueError, RecursionError):
            return False

    def _validator(self, schema: Json) -> jsonschema_rs.Validator | None:
        """Return the validator for a schema, or None if the schema is invalid."""
        name = orjson.dumps(schema)
        if name not in self._validators:
            if len(self._validators) >= _SCHEMAS:
                self._validators.clear()
            self._validators[name] = _validator_of(schema)
        return self._validators[name]


def _validator_of(schema: Json) -> jsonschema_rs.Validator | None:
    try:
        return open_validator(schema)
    except ValueError:
        return None


def _is_whole(choice: Json) -> bool:
    """Return True if the model ended a choice normally, and did not refuse."""
    message = choice.get("message") if isinstance(choice, dict) else None
    if not isinstance(message, dict) or message.get("refusal"):
        return False
    reason = choice.get("finish_reason")
    if reason == "tool_calls":
        return all(map(_is_callable, message.get("tool_calls") or [None]))
    return classify_finish(reason) is None


def _is_callable(call: Json) -> bool:
    """Return True if a tool can be called: it has a name, and its arguments are an object."""
    try:
        function = call["function"]
        return bool(function["name"]) and isinstance(orjson.loads(function["arguments"]), dict)
    except (TypeError, KeyError, orjson.JSONDecodeError):
        return False


_WAITS: Final = 2
"""Failures of others that a request waits for, before it is sent on its own."""

_SLOT_CHECK_S: Final = 0.1
_CLAIM_WAIT: Final = ExtendedWait(wait_exponential(0.05, 2.0, 1.5), jitter=1.0)
"""Pauses between two looks at a claim of another process."""

_FREE: Final = {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}


class ResponseStore(Protocol):
    """A store of answers, as JSON on one line, by keys of 16 bytes."""

    def find(self, key: bytes) -> int | None:
        """Return the position of a key's answer, or None; it does not block."""
        ...

    def read(self, key: bytes, position: int) -> bytes | None:
        """Return the answer at a position, or None if it cannot be read; it may block."""
        ...

    def put(self, key: bytes, answer: bytes) -> None:
        """Store an answer."""
        ...

    def forget(self, key: bytes, position: int) -> None:
        """Remove a key's position, which holds no usable answer."""
        ...

    @property
    def contested(self) -> bool:
        """Return True if other processes may store answers there at the same time."""
        ...

    def update_claims(self, requests: Sequence[tuple[bytes, bool]]) -> list[bool]:
        """Claim keys (True) or release claims; it may block.

        Returns:
            For each key, whether no other process holds it.
        """
        ...


class CacheMiss:
    """A request without a cached answer: a block in which its sender sends it.

    Args:
        cache: The cache.
        body: The request.
        key: Its key, or None if its answer must not be stored.

    Attributes:
        flight: What equal requests wait for, or None if others send it too.
        claimed: Whether it may be claimed, so that other processes wait.
    """

    __slots__ = ("_cache", "body", "claimed", "flight", "key")

    def __init__(self, cache: RequestCache, body: Mapping[str, Any], key: bytes | None) -> None:
        self._cache = cache
        self.body, self.key = body, key
        self.flight: asyncio.Future[bytes | None] | None = None
        self.claimed = False

    def __enter__(self) -> Self:
        """Return the miss itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Let equal requests go on."""
        self._cache.end(self)


class RequestCache:
    """Gives one answer to equal requests of one event loop.

    Requests are equal if their bodies are: model, messages, schema, sampling, seed, and any other
    field; their endpoint does not matter. Equal requests of several samples of a row are not equal:
    each sample gets its own answer. Only good answers are stored. A failure counts only for
    its own request: others that waited for it send theirs.

    Args:
        store: The store of answers.
        simulated: Whether the fleet is; answers of the other kind do not count.
        sampled: Whether requests at a temperature above 0 share an answer, too.
        marked: Whether only requests of one item do, and it asks for it (`CallLog.keeps_answers`).
        patience_s: Seconds to wait for an answer that another process requests.
    """

    def __init__(
        self,
        store: ResponseStore,
        *,
        simulated: bool,
        sampled: bool = False,
        marked: bool = False,
        patience_s: float = 600.0,
    ) -> None:
        self._store, self._simulated, self._sampled = store, simulated, sampled
        self._marked, self._patience_s = marked, patience_s
        self._policy = CachePolicy(sampled)
        self._in_flight: dict[bytes, asyncio.Future[bytes | None]] = {}
        self._read = ThreadBatcher(self._read_batch)
        self._claim = ThreadBatcher(store.update_claims)

    def copy_for_loop(self) -> RequestCache:
        """Return a cache for another loop, over the same store."""
        return RequestCache(
            self._store,
            simulated=self._simulated,
            sampled=self._sampled,
            marked=self._marked,
            patience_s=self._patience_s,
        )

    async def aclose(self) -> None:
        """Wait for claims that are being released."""
        await self._claim.wait_idle()

    async def find(self, body: Mapping[str, Any]) -> dict[str, Any] | CacheMiss:
        """Return the answer to an equal request, or a miss in whose block the caller sends it.

        If an equal request is being sent, here or by another process, its answer is awaited.

        Args:
            body: The request as it is sent.
        """
        if (self._marked and not _is_marked()) or not self._policy.is_shareable(body):
            return CacheMiss(self, body, None)
        key, waits = self._key(body), 0
        while True:
            flight = self._in_flight.get(key)
            if flight is None:
                document = await self._find_cached(key)
                if document is None and key not in self._in_flight:
                    return await self._lead(key, body)
            elif waits < _WAITS and not _is_holding_slot():
                if not await _follow(flight):
                    continue
                answer, waits = flight.result(), waits + 1
                document = None if answer is None else self._load_answer(answer)
            else:
                return CacheMiss(self, body, key)
            if document is not None:
                return document

    async def _find_cached(self, key: bytes) -> dict[str, Any] | None:
        """Return a stored answer, or None; does not suspend if none is known."""
        while (position := self._store.find(key)) is not None:
            answer = await self._read.run((key, position))
            if answer is not None and (document := self._load_answer(answer)) is not None:
                return document
            self._store.forget(key, position)
        return None

    def _read_batch(self, wanted: list[tuple[bytes, int]]) -> list[bytes | None]:
        return [self._store.read(key, position) for key, position in wanted]

    def _key(self, body: Mapping[str, Any]) -> bytes:
        text = orjson.dumps(body, option=orjson.OPT_SORT_KEYS)
        log = CURRENT_CALLS.get()
        if log is not None and log.sample:  # samples of a row ask the same, for several answers
            text += b"#%d" % log.sample
        if log is not None and self._marked:  # each item keeps its own answers only
            text += b"@%d" % (-1 if log.index is None else log.index)
        person = b"simulated" if self._simulated else b"real"
        return hashlib.blake2b(text, digest_size=16, person=person).digest()

    async def _lead(self, key: bytes, body: Mapping[str, Any]) -> dict[str, Any] | CacheMiss:
        """Make all equal requests that come meanwhile wait, here and in other processes."""
        miss = CacheMiss(self, body, key)
        miss.flight = self._in_flight[key] = asyncio.get_running_loop().create_future()
        if not self._store.contested or _is_holding_slot():
            return miss
        miss.claimed = True
        try:
            await self._wait_for_claim(key)
            document = await self._find_cached(key)
        except BaseException:
            self.end(miss)
            raise
        if document is None:
            return miss
        self.end(miss)
        return document

    def store(self, miss: CacheMiss, document: Mapping[str, Any]) -> None:
        """Store the answer to a request that missed, if it may be given to equal ones."""
        if miss.key is None or not self._policy.is_cacheable(miss.body, document):
            return
        answer = _as_line(document)
        if answer is not None:
            self._store.put(miss.key, answer)
            if miss.flight is not None:
                miss.flight.set_result(answer)

    def end(self, miss: CacheMiss) -> None:
        """Let equal requests go on: without an answer they send theirs."""
        if miss.key is None or miss.flight is None:
            return
        del self._in_flight[miss.key]
        if not miss.flight.done():
            miss.flight.set_result(None)
        if miss.claimed:  # also if the task was cancelled while it waited for the claim
            self._claim.submit((miss.key, False))

    async def _wait_for_claim(self, key: bytes) -> None:
        """Wait until no other process requests the answer, it is stored, or patience ends."""
        until = time.monotonic() + self._patience_s
        for polls in itertools.count(1):
            if await self._claim.run((key, True)):
                return
            if self._store.find(key) is not None or time.monotonic() > until:
                return
            if _is_holding_slot():
                return
            await asyncio.sleep(pause_after(_CLAIM_WAIT, polls))

    def _load_answer(self, answer: bytes) -> dict[str, Any] | None:
        """Return a stored answer at no cost, and count it; None if it does not fit this fleet."""
        document = orjson.loads(answer)
        if (
            not transport.is_completion(document)
            or transport.is_simulated(document) != self._simulated
        ):
            return None
        transport.normalize_completion(document)
        document["usage"] = dict(_FREE)
        log = CURRENT_CALLS.get()
        if log is not None:
            log.reused += 1
            log.usage += Usage(0, 0)
            log.model, log.simulated = document.get("model"), self._simulated
        found: dict[str, Any] = document
        return found


def _as_line(document: Mapping[str, Any]) -> bytes | None:
    """Return an answer as JSON on one line, or None if it is nested too deep to be written."""
    try:
        return orjson.dumps(document)
    except TypeError:
        return None


async def _follow(flight: asyncio.Future[bytes | None]) -> bool:
    """Wait for an equal request's end; return False once the item has come to hold a slot."""
    log = CURRENT_CALLS.get()
    if log is None:
        await asyncio.wait({flight})
        return True
    log.following += 1
    try:
        while not flight.done() and not _is_holding_slot():
            await asyncio.wait({flight}, timeout=_SLOT_CHECK_S)
    finally:
        log.following -= 1
    return flight.done()


def _is_marked() -> bool:
    """Return True if the answers to the caller's item are stored."""
    log = CURRENT_CALLS.get()
    return log is not None and log.keeps_answers


def _is_holding_slot() -> bool:
    """Return True if the caller's item has open streams that are not read.

    Another caller may wait for its slot, so it must not wait for that caller's answer.
    """
    log = CURRENT_CALLS.get()
    return log is not None and log.in_flight > 0 and log.stalled
