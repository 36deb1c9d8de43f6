"""Faults that a test can inject into the service."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal


@dataclass(slots=True)
class Faults:
    """Faults of the service; a test sets them while it runs, each test begins without any.

    Attributes:
        latency_s: Seconds by which every HTTP answer comes later.
        fail_submits: So many submissions from now on are refused with `fail_status`.
        fail_status: The SDK repeats 429, 500, 502, 503 and 504 for about 18 s, others not at all.
        drop_results: So many results from now on are lost: neither stored nor forwarded.
        hold_results: So many results from now on wait for `GlobusService.release()`.
        pages: So many answers from now on are a proxy's page, with status 200.
        unknown: How the service answers for tasks that it has forgotten: it leaves them out, says
            that they failed, or refuses the whole request.
        submit_limit: Bytes of a request above which a submission is refused with 413.
    """

    latency_s: float = 0.0
    fail_submits: int = 0
    fail_status: int = 503
    drop_results: int = 0
    hold_results: int = 0
    pages: int = 0
    unknown: Literal["omitted", "failed", "refused"] = "omitted"
    submit_limit: int = 10 * 1024 * 1024

    def clear(self) -> None:
        """Go back to no faults."""
        for field in fields(self):
            setattr(self, field.name, field.default)

    def take(self, name: str) -> bool:
        """Say whether a counted fault strikes now, and count it."""
        left: int = getattr(self, name)
        if left > 0:
            setattr(self, name, left - 1)
        return left > 0
