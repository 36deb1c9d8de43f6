"""Requests that are answered without a queue: embeddings, scores, ranks and transcriptions."""

from __future__ import annotations

import base64
import math
import re
import struct
import time
from collections.abc import Callable, Mapping
from random import Random
from typing import Any, Final

import orjson

from ..core.types import SIMULATED_FINGERPRINT
from .audio import answer_audio, read_form
from .node import Node, QuestionLog
from .requests import QuestionReader, load_object
from .server import Exchange
from .spec import SimulationSpec
from .values import ApiError, count_text_tokens, draw_uniform, hash_parts

_DIMENSIONS: Final = 64
_MOST_DIMENSIONS: Final = 4096
_WORD: Final = re.compile(r"\w+")
_LONG_WORD: Final = 8
"""Letters of a word above which its weight does not grow."""
_NODE: Final = re.compile(r"^/node-\d+")


class PoolingService:
    """Shared service of all nodes for embeddings, scores, ranks and transcriptions.

    Args:
        spec: The fleet's specification.
        reader: Checks the model.
        questions: Counts the requests.
        now: Returns simulated seconds since the start.
    """

    def __init__(
        self,
        spec: SimulationSpec,
        reader: QuestionReader,
        questions: QuestionLog,
        now: Callable[[], float],
    ) -> None:
        self._spec, self._reader = spec, reader
        self._questions, self._now = questions, now

    def embed(self, node: Node, exchange: Exchange) -> None:
        """Answer a request for embeddings."""
        self._serve(node, exchange, self._embed)

    def score(self, node: Node, exchange: Exchange) -> None:
        """Answer a request for scores of pairs of texts."""
        self._serve(node, exchange, self._score)

    def rerank(self, node: Node, exchange: Exchange) -> None:
        """Answer a request for documents in the order of their scores."""
        self._serve(node, exchange, self._rerank)

    def transcribe(self, node: Node, exchange: Exchange) -> None:
        """Answer a request for the text of audio, transcribed or translated."""
        self._serve(node, exchange, self._transcribe, read_form)

    def _serve(
        self,
        node: Node,
        exchange: Exchange,
        answer: Callable[[Mapping[str, Any]], tuple[dict[str, Any], int]],
        read: Callable[[Exchange], dict[str, Any]] = lambda exchange: load_object(exchange.body),
    ) -> None:
        node.counts.requests += 1
        try:
            data = read(exchange)
            self._reader.check_model(data)
            document, tokens = answer(data)
        except ApiError as error:
            node.counts.refused[str(error.status)] += 1
            exchange.reply(error.body, error.status)
            return
        asked = orjson.dumps(data, option=orjson.OPT_SORT_KEYS)
        path = _NODE.sub("", exchange.head.path)  # the same question to any node
        key = hash_parts(self._spec.seed, path, asked)
        node.counts.prompt_tokens += tokens
        self._questions.record_arrival(key)
        self._questions.record_answer(key, tokens, self._now())
        about = {
            "id": f"pool-{hash_parts(key, node.index).hex()}",
            "created": int(time.time()),
            "model": self._spec.model,
            "system_fingerprint": SIMULATED_FINGERPRINT,
        }
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        exchange.reply(orjson.dumps(about | {"usage": usage} | document))

    def _transcribe(self, data: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        return answer_audio(data, self._spec.seed), 0

    def _embed(self, data: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        texts = _read_inputs(data.get("input"))
        size = data.get("dimensions") or _DIMENSIONS
        if type(size) is not int or not 0 < size <= _MOST_DIMENSIONS:
            raise ApiError("dimensions must be a whole number above 0", param="dimensions")
        form = data.get("encoding_format") or "float"
        if form not in ("float", "base64"):
            raise ApiError(f"unknown encoding_format {form!r}", param="encoding_format")
        vectors = [embed_text(text, size, self._spec.seed) for text in texts]
        found = [
            {
                "index": index,
                "object": "embedding",
                "embedding": vector if form == "float" else _pack(vector),
            }
            for index, vector in enumerate(vectors)
        ]
        return {"object": "list", "data": found}, sum(map(_count_tokens, texts))

    def _score(self, data: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        first = _read_texts(data.get("text_1", data.get("queries")), "text_1")
        second = _read_texts(data.get("text_2", data.get("documents")), "text_2")
        if len(first) == 1:
            first *= len(second)
        if len(first) != len(second):
            raise ApiError("text_1 and text_2 differ in length", param="text_2")
        pairs = list(zip(first, second, strict=True))
        found = [
            {"index": index, "object": "score", "score": draw_uniform(self._spec.seed, one, two)}
            for index, (one, two) in enumerate(pairs)
        ]
        return {"object": "list", "data": found}, _count_pairs(pairs)

    def _rerank(self, data: Mapping[str, Any]) -> tuple[dict[str, Any], int]:
        query, documents = data.get("query"), _read_texts(data.get("documents"), "documents")
        if not isinstance(query, str):
            raise ApiError("query must be a text", param="query")
        scores = [draw_uniform(self._spec.seed, query, text) for text in documents]
        found = [
            {"index": n, "document": {"text": documents[n]}, "relevance_score": scores[n]}
            for n in sorted(range(len(documents)), key=lambda n: -scores[n])
        ]
        tokens = _count_pairs([(query, text) for text in documents])
        return {"results": found[: data.get("top_n") or None]}, tokens


def embed_text(text: Any, size: int, seed: int) -> list[float]:
    """Return the unit vector of a text, or of a list of token numbers.

    It is the sum of a random direction for each word, longer words counting more, so that texts
    with many words in common are near to each other, as those of a real model are.

    Args:
        text: The text, or token numbers.
        size: Dimensions.
        seed: Seed of the fleet.
    """
    words = _WORD.findall(text.casefold()) if isinstance(text, str) else list(map(str, text))
    total = [0.0] * size
    for word in words or [""]:
        weight = min(len(word), _LONG_WORD)
        bits = Random(int.from_bytes(hash_parts(seed, "word", word))).getrandbits(size)
        for n in range(size):
            total[n] += weight if bits >> n & 1 else -weight
    length = math.hypot(*total) or 1.0
    return [value / length for value in total]


def _read_inputs(value: Any) -> list[Any]:
    """Return the inputs of a request for embeddings: texts, or lists of token numbers."""
    if isinstance(value, str) or (isinstance(value, list) and value and _is_number(value[0])):
        return [value]
    if isinstance(value, list) and value and all(isinstance(one, str | list) for one in value):
        return value
    raise ApiError("input must be a text or a list of texts", param="input")


def _is_number(value: Any) -> bool:
    return isinstance(value, int)


def _read_texts(value: Any, name: str) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts):
        return texts
    raise ApiError(f"{name} must be a text or a list of texts", param=name)


def _count_tokens(given: Any) -> int:
    return count_text_tokens(given) if isinstance(given, str) else len(given)


def _count_pairs(pairs: list[tuple[str, str]]) -> int:
    return sum(count_text_tokens(one) + count_text_tokens(two) for one, two in pairs)


def _pack(vector: list[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
