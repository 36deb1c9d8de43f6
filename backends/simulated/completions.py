"""Serves completions: reads, lets faults strike, answers, counts."""

from __future__ import annotations

import time
from collections.abc import Callable

from .accounting import ServingBook
from .answering import Answer, answer_to, spoiled
from .dice import digest
from .errors import ApiError
from .faults import Call, FaultBook, Strike
from .jobs import Job
from .latency import LatencyModel, Timing
from .node import Node
from .refusals import BROKEN, REFUSED_BY, refuse
from .requests import Question, QuestionReader
from .responders import Responder
from .responses import Envelope, usage_object
from .server import Exchange
from .spec import SimulationSpec


class CompletionService:
    """What all nodes share in answering ``/v1/chat/completions`` and ``/v1/completions``.

    Args:
        spec: The fleet's specification.
        responder: Writes the answers.
        faults: Decides what goes wrong.
        servings: Counts the questions.
        now: Gives simulated seconds since the start.
    """

    def __init__(
        self,
        spec: SimulationSpec,
        responder: Responder,
        faults: FaultBook,
        servings: ServingBook,
        now: Callable[[], float],
    ) -> None:
        self._spec = spec
        self._responder = responder
        self._faults = faults
        self._servings = servings
        self._now = now
        self._latency = LatencyModel(spec)
        self.reader = QuestionReader(spec.model, spec.seed)

    def serve(self, node: Node, exchange: Exchange, chat: bool) -> None:
        """Answer a request, now or later.

        Args:
            node: The node asked.
            exchange: The request.
            chat: Whether it asks for a chat completion.
        """
        node.arrivals += 1
        node.counts.requests += 1
        try:
            self._serve(node, exchange, chat)
        except ApiError as error:
            node.counts.refused[str(error.status)] += 1
            exchange.reply(error.body, error.status)

    def max_model_len(self, node: Node) -> int:
        """Return a node's context length in tokens."""
        return self._faults.max_model_len(node.index, self._now(), self._spec.max_model_len)

    def _serve(self, node: Node, exchange: Exchange, chat: bool) -> None:
        question = self.reader.read(exchange.body, chat, self.max_model_len(node))
        strike = self._strike(node, exchange, question)
        kind = strike.rule.kind if strike.rule else ""
        if kind:
            node.counts.injected[kind] += 1
        if strike.rule and kind in REFUSED_BY:
            refuse(exchange, strike.rule)
            return
        answer = spoiled(answer_to(question, self._responder), kind, question)
        envelope = self._envelope(node, exchange, question, answer)

        def clock() -> Timing:
            load = (node.running - 1) / node.slots
            speed = node.speed * strike.speed
            key = (question.key, node.index)
            return self._latency.timing(question.prompt_tokens, answer.tokens, load, speed, key)

        Job(exchange, node, question, answer, envelope, kind, clock, self._finished).submit()

    def _strike(self, node: Node, exchange: Exchange, question: Question) -> Strike:
        strike = self._faults.strike(
            Call(
                node=node.index,
                arrival=node.arrivals,
                key=question.key,
                attempt=self._servings.asked(question.key),
                now=self._now(),
                stream=question.stream,
                first_round=question.first_round,
                token=exchange.head.header(b"authorization"),
            )
        )
        if strike.speed != 1:
            node.counts.injected["slow"] += 1
        return strike

    def _envelope(
        self, node: Node, exchange: Exchange, question: Question, answer: Answer
    ) -> Envelope:
        name = exchange.head.header(b"x-request-id")
        if name is None:
            name = digest(question.key, node.index, node.arrivals).hex()
        mode = self._spec.usage
        return Envelope(
            id=f"{'chatcmpl' if question.chat else 'cmpl'}-{name}",
            created=int(time.time()),
            model=self._spec.model,
            chat=question.chat,
            usage=usage_object(mode, question.prompt_tokens, answer.tokens),
            omit_usage=mode == "omit",
        )

    def _finished(self, job: Job) -> None:
        counts, tokens = job.node.counts, job.answer.tokens
        counts.finished[job.answer.finish_reason] += 1
        counts.prompt_tokens += job.question.prompt_tokens
        counts.completion_tokens += tokens
        total = job.question.prompt_tokens + tokens
        if job.fault in BROKEN:
            counts.broken_tokens += total
        self._faults.record_tokens(job.node.index, total, self._now())
        if job.fault in {"", "no_usage"} and job.answer.finish_reason != "abort":
            self._servings.served(job.question.key, total, self._now())
