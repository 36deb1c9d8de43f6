"""Counts of a running run, for the live line."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(slots=True)
class Progress:
    """How far a run is.

    Attributes:
        total: Items of the run.
        done: Items answered.
        failed: Items that ended without an answer.
        before: Of both, those that an earlier life of the run had finished.
        requests: Requests sent over all lives for items that ended.
        prompt_tokens: Their prompt tokens, as far as reported.
        completion_tokens: Their completion tokens, as far as reported.
    """

    total: int = 0
    done: int = 0
    failed: int = 0
    before: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def count(self, record: Mapping[str, Any]) -> None:
        """Count an item that has just ended, by its journal record."""
        self.done += record["status"] == "done"
        self.failed += record["status"] == "failed"
        self.requests += record["attempts"]
        self.prompt_tokens += record["prompt_tokens"] or 0
        self.completion_tokens += record["completion_tokens"] or 0
